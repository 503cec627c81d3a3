"""The CPU library by its C functions: what it registers, its precision, its instruction sets."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from exllama_ops.backends.native import LoadError


class CpuLibrary:
    """A loaded library. Loading has no effect on torch; `register` has.

    Args:
        path: its file.

    Raises:
        LoadError: the system cannot load it, or it is not ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            library = ctypes.CDLL(str(path))
            self._register = library.exllama_cpu_register
            self._set_precision = library.exllama_cpu_set_matmul_precision
            self._get_precision = library.exllama_cpu_get_matmul_precision
            self._isa_name = library.exllama_cpu_isa_name
            self._isa_available = library.exllama_cpu_isa_available
            self._isa_in_use = library.exllama_cpu_isa_in_use
            self._use_isa = library.exllama_cpu_use_isa
        except (OSError, AttributeError) as error:
            raise LoadError(f"{path}: {error}") from error
        self._register.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
        self._register.restype = ctypes.c_char_p
        self._set_precision.argtypes = [ctypes.c_int32]
        self._set_precision.restype = None
        self._get_precision.restype = ctypes.c_int32
        self._isa_name.argtypes = [ctypes.c_int32]
        self._isa_name.restype = ctypes.c_char_p
        self._isa_available.argtypes = [ctypes.c_char_p]
        self._isa_available.restype = ctypes.c_bool
        self._isa_in_use.restype = ctypes.c_char_p
        self._use_isa.argtypes = [ctypes.c_char_p]
        self._use_isa.restype = None

    def register(self, namespace: str, op: str) -> None:
        """Give ``namespace::op`` its kernel for CPU tensors.

        Raises:
            RuntimeError: the library has no such kernel, or torch refuses it.
        """
        error = self._register(namespace.encode(), op.encode())
        if error is not None:
            raise RuntimeError(f"{self.path}: {namespace}::{op}: {error.decode()}")

    def set_precision(self, value: int) -> None:
        """Set the precision of gptq_gemm, a value of exllama::cpu::Precision."""
        self._set_precision(value)

    def precision(self) -> int:
        """The precision of gptq_gemm."""
        value: int = self._get_precision()
        return value

    def isas(self) -> dict[str, bool]:
        """The instruction sets that the library has kernels for, best first, and whether this CPU has them."""
        names: list[bytes] = []
        while name := self._isa_name(len(names)):
            names.append(name)
        return {name.decode(): bool(self._isa_available(name)) for name in names}

    def isa_in_use(self) -> str | None:
        """The one in use; None if one was named that this CPU has not, which every op refuses."""
        name: bytes | None = self._isa_in_use()
        return None if name is None else name.decode()

    def use_isa(self, name: str) -> None:
        """Use an instruction set from now on, the best if the name is empty."""
        self._use_isa(os.fsencode(name))
