"""What a backend is, and what the choice of one records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from exllama_ops.ops._library import NativeKernel

# The environment variable that names the one backend to be asked before the reference.
VARIABLE = "EXLLAMA_OPS_BACKEND"

# Given why a backend turned out not to serve, the kernel of the next one of its order that does.
NextBest = Callable[[Sequence[str]], Callable[..., Any]]


class Backend(Protocol):
    """Kernels of one kind for some ops and devices."""

    name: str

    def reasons_against(self, op: str, dispatch_key: str) -> list[str]:
        """Why this backend cannot serve an op on a device; empty if it can."""
        ...

    def detail(self, dispatch_key: str) -> str:
        """What a user may want to know of it beside its name, for the report; may be empty."""
        ...

    def kernel(
        self, op: str, dispatch_key: str, passed_over: Mapping[str, Sequence[str]], next_best: NextBest
    ) -> NativeKernel | Callable[..., Any]:
        """The implementation of an op, with the op's arguments.

        ``passed_over`` says why no better backend serves. A backend that finds out at its first call that it cannot
        serve takes what ``next_best`` gives.
        """
        ...


@dataclass(frozen=True)
class Choice:
    """One row of `exllama_ops.backends.report`.

    Args:
        op: name of the op.
        dispatch_key: "CPU", "CUDA" or "XPU".
        backend: the backend that serves it.
        passed_over: the backends asked before it, each with its reasons against.
        later: those after it, which are asked if it finds out at its first call that it cannot serve; likewise, without
            reasons where they would.
    """

    op: str
    dispatch_key: str
    backend: Backend
    passed_over: Mapping[str, tuple[str, ...]]
    later: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        others = {**self.passed_over, **self.later}
        notes = [f"not {name}: {', '.join(reasons)}" for name, reasons in others.items() if reasons]
        if next_best := [name for name, reasons in self.later.items() if not reasons]:
            notes.append(f"else {', '.join(next_best)}")
        if detail := self.backend.detail(self.dispatch_key):
            notes.insert(0, detail)
        return f"{self.dispatch_key} {self.op}: {self.backend.name}" + (f" ({'; '.join(notes)})" if notes else "")
