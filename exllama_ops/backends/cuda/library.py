"""The CUDA library by its C functions: what it registers, and whether it is batch-invariant."""

from __future__ import annotations

import ctypes
from pathlib import Path

from exllama_ops.backends.native import Library


class CudaLibrary(Library):
    """A loaded library of CUDA kernels.

    Args:
        path: its file.

    Raises:
        LoadError: the system cannot load it, or it is not ours.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "exllama_cuda", ("set_batch_invariant", "get_batch_invariant"))
        self._set_batch_invariant = self._declare("set_batch_invariant", [ctypes.c_bool], None)
        self._get_batch_invariant = self._declare("get_batch_invariant", [], ctypes.c_bool)

    def set_batch_invariant(self, enabled: bool) -> None:
        """Whether a row's bits must not depend on the rows that it is batched with."""
        self._set_batch_invariant(enabled)

    def batch_invariant(self) -> bool:
        """What `set_batch_invariant` set."""
        value: bool = self._get_batch_invariant()
        return value

    def read_environment(self) -> None:
        """Read EXLLAMA_OPS_CUDA_ALGORITHM and EXLLAMA_OPS_CUDA_LOG again, which loading has read once."""
        ctypes.CDLL(str(self.path)).exllama_cuda_read_environment()
