"""What a run asks of a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.conformance import Gate
from benchmarks.peers.peer import Kind, Layer, Peer
from benchmarks.results import LimitRule
from benchmarks.timing import Timer


class DeviceError(RuntimeError):
    """The device is not there, or nothing can be measured on it."""


@dataclass(frozen=True)
class OurKernel:
    """A kernel of ours.

    Args:
        name: as in tables.
        op: that it computes.
        kind: how activations enter the products.
        prepare: returns a layer with memory of its own; raises Unsupported where the kernel cannot run.
        check: raises ConformanceError for a result that is wrong.
    """

    name: str
    op: Literal["gptq_gemm", "gptq_gemm_dx"]
    kind: Kind
    prepare: Callable[[], Layer]
    check: Callable[[Tensor], None]


class Device(Protocol):
    """Where kernels run.

    Args:
        peers: the kernels beside ours that it can have.
        place: where weights and activations lie.
        threads: that every kernel on it uses on the host.
        timer: times a kernel.
        rotates: whether a timer finds weights in memory because copies of them take turns; else it flushes the caches.
        limit_rule: which of its limits bounds a kernel.
    """

    peers: Sequence[Peer]
    place: torch.device
    threads: int
    timer: Timer
    rotates: bool
    limit_rule: LimitRule

    def open(self) -> None:
        """Get ready to measure.

        Raises:
            DeviceError, LimitsError: it cannot.
        """

    def admit(self, peer: Peer) -> None:
        """Refuse a peer that cannot be held to what the run is held to.

        Raises:
            Unsupported: it is one.
        """

    def gate(self, weight: Weight, x: Tensor, grad: Tensor | None, tokens: Sequence[int]) -> Gate:
        """The bounds of our kernels; arguments as `benchmarks.conformance.Gate` has them, on the host."""
        ...

    def kernels(self, weight: Weight, gate: Gate, dtype: torch.dtype) -> Sequence[OurKernel]:
        """Our kernels for x of a dtype and a weight that is at ``place``."""
        ...

    def measure_limits(self) -> Mapping[str, float]:
        """Bytes or operations per second, by the name of each limit."""
        ...

    def machine(self, packages: Iterable[str]) -> dict[str, Any]:
        """What a reader needs to compare results with others; ``packages`` are those whose versions matter."""
        ...

    @property
    def label(self) -> str:
        """What names its results files."""
        ...
