"""Holding every library in the process to an instruction set, and the process to a number of cores."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# What --isa sets. A library reads its variable once: this comes before any of them is imported.
VARIABLES: dict[str, dict[str, str]] = {
    "native": {},
    # All of AVX-512, and no AMX.
    "avx512": {"EXLLAMA_OPS_CPU_ISA": "avx512_vnni", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"},
    "avx2": {
        "EXLLAMA_OPS_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}


class HoldError(RuntimeError):
    """The process cannot be held to what was asked for."""


def hold_to(isa: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of an instruction set.

    Args:
        isa: a key of `VARIABLES`.
        environment: where to set them.

    Raises:
        HoldError: one of them is set to something else already.
    """
    for name, value in VARIABLES[isa].items():
        if environment.get(name, value) != value:
            raise HoldError(f"--isa {isa} needs {name}={value}; it is set to {environment[name]}")
        environment[name] = value


def hold_to_cores(threads: int) -> None:
    """Leave the process as many cores as it has threads, which also holds peers that choose their threads themselves.

    Raises:
        HoldError: it has fewer.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads:
        raise HoldError(f"--threads {threads} needs as many cores; this process may use {len(cores)}")
    os.sched_setaffinity(0, cores[:threads])
