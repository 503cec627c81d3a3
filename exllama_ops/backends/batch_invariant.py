"""Whether a row's result may depend on the rows that it is batched with."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exllama_ops.backends.cuda.library import CudaLibrary

VARIABLE = "EXLLAMA_OPS_BATCH_INVARIANT"


def _from_environment() -> bool:
    value = os.environ.get(VARIABLE) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, or not set; got {value!r}")
    return value == "1"


_enabled = _from_environment()
_libraries: list[CudaLibrary] = []
# Held while the setting or a library changes: they agree when it is free.
_lock = threading.Lock()


def set_batch_invariant(enabled: bool) -> None:
    """Have ``gptq_gemm`` compute each row of x with the same bits whatever rows it is batched with.

    On a CUDA device, the fastest algorithm and the split of its sums depend on the number of rows M. When this is set,
    both are chosen without M, and dense products by a BLAS are not used. On a CPU a row's bits never depend on M.

    At the start it is what the environment variable EXLLAMA_OPS_BATCH_INVARIANT says, 0 or 1, by default 0.

    Args:
        enabled: True or False.
    """
    global _enabled
    with _lock:
        _enabled = bool(enabled)
        for library in _libraries:
            library.set_batch_invariant(_enabled)


def is_batch_invariant() -> bool:
    """What `set_batch_invariant` set."""
    return _enabled


def apply_to(library: CudaLibrary) -> None:
    """Let a library follow the setting from now on."""
    with _lock:
        _libraries.append(library)
        library.set_batch_invariant(_enabled)
