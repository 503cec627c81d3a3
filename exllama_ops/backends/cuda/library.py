"""The CUDA library by its C functions: what it registers, and whether it is batch-invariant."""

from __future__ import annotations

import ctypes
from pathlib import Path

from exllama_ops.backends.native import LoadError


class CudaLibrary:
    """A loaded library. Loading has no effect on torch or a device; `register` has, on torch.

    Args:
        path: its file.

    Raises:
        LoadError: the system cannot load it, or it is not ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            library = ctypes.CDLL(str(path))
            self._register = library.exllama_cuda_register
            self._set_batch_invariant = library.exllama_cuda_set_batch_invariant
            self._get_batch_invariant = library.exllama_cuda_get_batch_invariant
        except (OSError, AttributeError) as error:
            raise LoadError(f"{path}: {error}") from error
        self._register.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
        self._register.restype = ctypes.c_char_p
        self._set_batch_invariant.argtypes = [ctypes.c_bool]
        self._set_batch_invariant.restype = None
        self._get_batch_invariant.restype = ctypes.c_bool

    def register(self, namespace: str, op: str) -> None:
        """Give ``namespace::op`` its kernel for CUDA tensors.

        Raises:
            RuntimeError: the library has no such kernel, or torch refuses it.
        """
        error = self._register(namespace.encode(), op.encode())
        if error is not None:
            raise RuntimeError(f"{self.path}: {namespace}::{op}: {error.decode()}")

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
