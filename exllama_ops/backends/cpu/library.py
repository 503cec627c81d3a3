"""The CPU library by its C functions: what it registers, its precision, its instruction sets."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from exllama_ops.backends.native import Library
from exllama_ops.backends.native.library import names_of

_FUNCTIONS = (
    *("set_matmul_precision", "get_matmul_precision"),
    *("isa_name", "isa_available", "isa_in_use", "use_isa"),
)


class CpuLibrary(Library):
    """A loaded library of CPU kernels.

    Args:
        path: its file.

    Raises:
        LoadError: the system cannot load it, or it is not ours.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "exllama_cpu", _FUNCTIONS)
        self._set_precision = self._declare("set_matmul_precision", [ctypes.c_int32], None)
        self._get_precision = self._declare("get_matmul_precision", [], ctypes.c_int32)
        self._isa_name = self._declare("isa_name", [ctypes.c_int32], ctypes.c_char_p)
        self._isa_available = self._declare("isa_available", [ctypes.c_char_p], ctypes.c_bool)
        self._isa_in_use = self._declare("isa_in_use", [], ctypes.c_char_p)
        self._use_isa = self._declare("use_isa", [ctypes.c_char_p], None)

    def set_precision(self, value: int) -> None:
        """Set the precision of gptq_gemm, a value of exllama::cpu::Precision."""
        self._set_precision(value)

    def precision(self) -> int:
        """The precision of gptq_gemm."""
        value: int = self._get_precision()
        return value

    def isas(self) -> dict[str, bool]:
        """The instruction sets that the library has kernels for, best first, and whether this CPU has them."""
        return {name: bool(self._isa_available(name.encode())) for name in names_of(self._isa_name)}

    def isa_in_use(self) -> str | None:
        """The one in use; None if one was named that this CPU has not, which every op refuses."""
        name: bytes | None = self._isa_in_use()
        return None if name is None else name.decode()

    def use_isa(self, name: str) -> None:
        """Use an instruction set from now on, the best if the name is empty."""
        self._use_isa(os.fsencode(name))
