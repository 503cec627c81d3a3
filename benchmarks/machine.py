"""The machine and the software that results hold for, and the command that made them."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_FLAGS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)
# What numbers a CPU, on x86 and on Arm.
_NUMBERS = ("cpu family", "model", "stepping", "CPU implementer", "CPU part")


def description(threads: int, isa: str, held: str, packages: Iterable[str]) -> dict[str, Any]:
    """What a reader needs to compare results with others.

    Args:
        threads: as the kernels were told.
        isa: the instruction set of our kernels.
        held: the value of --isa.
        packages: distributions whose versions matter.
    """
    model, flags = _cpu()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": isa,
        "held_to": held,
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "huge_pages": _huge_pages(),
        **_software(packages),
    }


def gpu_description(properties: Any, packages: Iterable[str]) -> dict[str, Any]:
    """The same of a GPU.

    Args:
        properties: of `torch.cuda.get_device_properties`.
        packages: distributions whose versions matter.
    """
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cpu": _cpu()[0],
        **_software(packages),
    }


def _software(packages: Iterable[str]) -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": commit(),
        "packages": {name: _version(name) for name in sorted(set(packages))},
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _cpu() -> tuple[str, set[str]]:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    numbers = ", ".join(f"{name} {fields[name]}" for name in _NUMBERS if name in fields)
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return f"{fields.get('model name', platform.machine())} ({numbers})", flags


def _huge_pages() -> str:
    """Who gets huge pages: "always" all, "madvise" those who ask for them, "never" none."""
    try:
        found = re.search(r"\[(\w+)\]", Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text())
    except OSError:
        return "unknown"
    return found[1] if found else "unknown"


def commit(folder: Path = Path(__file__).parent) -> str:
    """The commit of a checkout, with "+" if files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--", ":/csrc", ":/exllama_ops") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
