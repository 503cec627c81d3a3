"""What a backend is, and what the choice of one records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Backend(Protocol):
    """Kernels of one kind for some ops and devices."""

    name: str

    def reasons_against(self, op: str, dispatch_key: str) -> list[str]:
        """Why this backend cannot serve an op on a device; empty if it can."""
        ...

    def kernel(self, op: str, dispatch_key: str) -> Callable[..., Any]:
        """The implementation of an op, with the op's arguments."""
        ...


@dataclass(frozen=True)
class Choice:
    """One row of `exllama_ops.backends.report`.

    Args:
        op: name of the op.
        dispatch_key: "CPU" or "CUDA".
        backend: the backend that serves it.
        passed_over: the backends asked before it, each with its reasons against.
    """

    op: str
    dispatch_key: str
    backend: Backend
    passed_over: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        others = "; ".join(f"not {name}: {', '.join(reasons)}" for name, reasons in self.passed_over.items())
        return f"{self.dispatch_key} {self.op}: {self.backend.name}" + (f" ({others})" if others else "")
