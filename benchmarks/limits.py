"""Limits of the machine, measured between the kernels: DRAM reading and the peaks of multiply-and-add."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

from exllama_ops.backends.native.compile import CPU, find_compiler, no_compiler
from exllama_ops.huge_pages import empty_in_huge_pages

SOURCE = Path(__file__).with_name("limits.cpp")
DRAM = "dram"
# GPUs have these too: the nominal speed of DRAM, and a dense product (`benchmarks.devices.cuda_limits`).
DRAM_PEAK = "dram_peak"
MATMUL = "matmul"
DOTS = ("float", "int16", "int8")
ARM_ISAS = ("neon_i8mm", "neon_dotprod", "neon")
ISAS = ("amx", "avx512_vnni", "avx512", "avx2_vnni", "avx2", *ARM_ISAS)

# Of memory that no cache keeps, read a part at a time: a part is not read again before all the others were.
_MEMORY_BYTES = 512 << 20
_PART_BYTES = 32 << 20


class LimitsError(RuntimeError):
    """The limits cannot be measured here."""


class Limits:
    """Measures the limits.

    Args:
        isa: the instruction set whose peaks count, one of `ISAS`.
        threads: how many threads measure.

    Raises:
        LimitsError: there is no compiler, or no peak is known for the instruction set.
    """

    def __init__(self, isa: str, threads: int) -> None:
        if isa not in ISAS:
            raise LimitsError(f"limits are known for {', '.join(ISAS)}; the kernels use {isa}")
        self._isa = isa.encode()
        self._threads = threads
        self._library = _compiled()
        # As weights lie in memory: huge pages are read faster.
        self._memory = empty_in_huge_pages(_MEMORY_BYTES).fill_(1)
        self._begin = 0

    def measure(self) -> dict[str, float]:
        """Bytes per second for `DRAM`, operations per second for each of `DOTS`; takes a few milliseconds."""
        data = self._memory.data_ptr() + self._begin
        self._begin = (self._begin + _PART_BYTES) % _MEMORY_BYTES
        limits: dict[str, float] = {DRAM: self._library.limits_dram(data, _PART_BYTES, self._threads)}
        for kind in DOTS:
            limits[kind] = self._library.limits_dot(self._isa, kind.encode(), self._threads)
        return limits


def _compiled() -> ctypes.CDLL:
    compiler = find_compiler(CPU)
    if compiler is None:
        raise LimitsError(no_compiler(CPU))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "limits.so"
        flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        result = subprocess.run(
            [*compiler.command, *flags, SOURCE, "-o", path], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise LimitsError(f"{compiler} failed:\n{result.stderr}")
        library = ctypes.CDLL(str(path))
    library.limits_dram.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.limits_dram.restype = ctypes.c_double
    library.limits_dot.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
    library.limits_dot.restype = ctypes.c_double
    return library
