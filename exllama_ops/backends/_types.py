"""What a backend is, and what the choice of one records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from exllama_ops.ops._library import NativeKernel


class Backend(Protocol):
    """Kernels of one kind for some ops and devices."""

    name: str

    def reasons_against(self, op: str, dispatch_key: str) -> list[str]:
        """Why this backend cannot serve an op on a device; empty if it can."""
        ...

    def detail(self) -> str:
        """What a user may want to know of it beside its name, for the report; may be empty."""
        ...

    def kernel(
        self, op: str, dispatch_key: str, passed_over: Mapping[str, Sequence[str]]
    ) -> NativeKernel | Callable[..., Any]:
        """The implementation of an op, with the op's arguments; ``passed_over`` says why no better backend serves."""
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
        notes = [f"not {name}: {', '.join(reasons)}" for name, reasons in self.passed_over.items()]
        if detail := self.backend.detail():
            notes.insert(0, detail)
        return f"{self.dispatch_key} {self.op}: {self.backend.name}" + (f" ({'; '.join(notes)})" if notes else "")
