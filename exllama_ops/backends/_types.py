"""What a backend is, and what the choice of one records."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    def is_settled(self) -> bool:
        """Whether it knows which ops it serves. If not, a first call may find out that it cannot serve."""
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


@dataclass(frozen=True, repr=False)
class Choice:
    """Who serves one op on one device: an entry of `exllama_ops.backends.report`.

    Args:
        op: name of the op.
        dispatch_key: "CPU", "CUDA" or "XPU".
        backend: the backend that serves it.
        passed_over: the backends asked before it, each with its reasons against.
        later: the backends after it, each with its reasons against, or with none if it would serve. They are asked if
            the backend finds out at its first call that it cannot serve; there are none once it is settled.
    """

    op: str
    dispatch_key: str
    backend: Backend
    passed_over: Mapping[str, tuple[str, ...]]
    later: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """What to know of the backend, why no other serves, and which would if this one could not."""
        others = {**self.passed_over, **self.later}
        notes = [f"not {name}: {', '.join(reasons)}" for name, reasons in others.items() if reasons]
        if next_best := [name for name, reasons in self.later.items() if not reasons]:
            notes.append(f"else {', '.join(next_best)}")
        if detail := self.backend.detail(self.dispatch_key):
            notes.insert(0, detail)
        return "; ".join(notes)

    def __str__(self) -> str:
        why = self.why
        return f"{self.dispatch_key} {self.op}: {self.backend.name}" + (f" ({why})" if why else "")

    __repr__ = __str__


class Report(tuple[Choice, ...]):
    """The choices of every op and device. Printed, it is a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("device", "op", "backend", "why"), *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        """One row for a device if all of its ops are served alike, else one for each op."""
        for device, of_device in itertools.groupby(self, lambda choice: choice.dispatch_key):
            choices = list(of_device)
            if len({(choice.backend.name, choice.why) for choice in choices}) == 1:
                yield device, "every op", choices[0].backend.name, choices[0].why
            else:
                yield from ((device, choice.op, choice.backend.name, choice.why) for choice in choices)

    __repr__ = __str__
