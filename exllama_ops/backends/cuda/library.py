"""The CUDA library by its C functions: what it registers, and whether it is batch-invariant."""

from __future__ import annotations

import ctypes
from pathlib import Path

from exllama_ops.backends.native import Library

_FUNCTIONS = ("set_batch_invariant", "get_batch_invariant", "read_environment", "toolkit_version")


class CudaLibrary(Library):
    """A loaded library of CUDA kernels.

    Args:
        path: its file.

    Raises:
        LoadError: the system cannot load it, or it is not ours.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "exllama_cuda", _FUNCTIONS)
        self._set_batch_invariant = self._declare("set_batch_invariant", [ctypes.c_bool], None)
        self._get_batch_invariant = self._declare("get_batch_invariant", [], ctypes.c_bool)
        self._read_environment = self._declare("read_environment", [], None)
        self._toolkit_version = self._declare("toolkit_version", [], ctypes.c_int32)

    def set_batch_invariant(self, enabled: bool) -> None:
        """Whether a row's bits must not depend on the rows that it is batched with."""
        self._set_batch_invariant(enabled)

    def batch_invariant(self) -> bool:
        """What `set_batch_invariant` set."""
        value: bool = self._get_batch_invariant()
        return value

    def toolkit(self) -> tuple[int, int]:
        """The version of CUDA that it was compiled with: (13, 0)."""
        version: int = self._toolkit_version()
        return version // 1000, version % 1000 // 10

    def read_environment(self) -> None:
        """Read EXLLAMA_OPS_CUDA_ALGORITHM, EXLLAMA_OPS_CUDA_LOG and CUBLAS_WORKSPACE_CONFIG again, as loading did."""
        self._read_environment()
