"""The backend of last resort: the pure PyTorch reference, on every device, with one warning that it runs."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from exllama_ops import reference
from exllama_ops.backends._types import NextBest


class ReferenceBackendWarning(UserWarning):
    """The slow reference computes, because no kernel is built for the device."""


class ReferenceBackend:
    """Serves every op with `exllama_ops.reference`."""

    name = "reference"

    def reasons_against(self, op: str, dispatch_key: str) -> list[str]:
        return [] if hasattr(reference, op) else [f"the reference has no {op}"]

    def is_settled(self) -> bool:
        return True

    def detail(self, dispatch_key: str) -> str:
        return ""

    def kernel(
        self, op: str, dispatch_key: str, passed_over: Mapping[str, Sequence[str]], next_best: NextBest
    ) -> Callable[..., Any]:
        del next_best  # nothing comes after it
        compute = getattr(reference, op)
        because = "; ".join(f"{name} ({', '.join(reasons)})" for name, reasons in passed_over.items())

        @functools.wraps(compute)
        def warn_and_compute(*args: Any, **kwargs: Any) -> Any:
            with _lock:
                _warn_once(dispatch_key, because)
            # The ops own their gradients: without this, autograd would record the steps of the reference.
            with torch.no_grad():
                return compute(*args, **kwargs)

        return warn_and_compute


# Whoever shows a warning may call an op.
_lock = threading.RLock()


@functools.cache
def _warn_once(dispatch_key: str, because: str) -> None:
    warnings.warn(
        f"exllama_ops runs its PyTorch reference for {dispatch_key} tensors: results are right, but slow. "
        + (f"Passed over: {because}. " if because else "")
        + "exllama_ops.backends.report() says what serves each op.",
        ReferenceBackendWarning,
        stacklevel=4,
    )


BACKEND = ReferenceBackend()
