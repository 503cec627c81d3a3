"""The native CPU backend: csrc/cpu behind torch's stable ABI, in one library for every Python and torch >= 2.10.

How the library is found, built and called is `exllama_ops.backends.native`'s.
"""

from __future__ import annotations

import os

from exllama_ops.backends.cpu import precision
from exllama_ops.backends.cpu.library import CpuLibrary
from exllama_ops.backends.cpu.precision import get_cpu_matmul_precision, set_cpu_matmul_precision
from exllama_ops.backends.native import NativeBackend
from exllama_ops.backends.native.compile import CPU

__all__ = ["BACKEND", "CpuBackend", "get_cpu_matmul_precision", "set_cpu_matmul_precision"]


class CpuBackend(NativeBackend[CpuLibrary]):
    """Serves every op on CPU tensors."""

    def __init__(self) -> None:
        super().__init__(CPU, CpuLibrary)

    def settings(self, library: CpuLibrary) -> str:
        return f", {library.isa_in_use()}, {get_cpu_matmul_precision()}"

    def prepare(self, library: CpuLibrary) -> None:
        library.use_isa(os.environ.get("EXLLAMA_OPS_CPU_ISA", ""))
        precision.apply_to(library)


BACKEND = CpuBackend()
