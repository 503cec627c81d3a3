"""What a kernel under measurement is: a name, its arithmetic, and how it takes a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from benchmarks.cases import Weight

# How activations enter the products, which is also the peak that counts: as floats, as integers of 15 bits, of 8 bits.
Kind = Literal["float", "int16", "int8"]


class Unsupported(Exception):
    """A kernel does not compute such a weight, or cannot be held to the instruction set; the text says why."""


def nothing() -> None:
    """No preparation."""


@dataclass(frozen=True)
class Layer:
    """A weight in a kernel's own format, ready to be multiplied.

    Args:
        take: turns x (M, K) float16 into what ``run`` takes; not timed.
        run: the product; timed.
        give: turns what ``run`` returned into a tensor (M, N); not timed.
        nbytes: of the weight in this format, scales and zero points included.
        dense: (K, N), the weight that the format really holds, where it is not the given one.
        enter: called before each burst of ``run``; not timed.
    """

    take: Callable[[Tensor], Any]
    run: Callable[[Any], Any]
    give: Callable[[Any], Tensor]
    nbytes: int
    dense: Tensor | None = None
    enter: Callable[[], None] = nothing


@dataclass(frozen=True)
class Peer:
    """A kernel of another library, or dense. Its class is what `benchmarks.peer_class` finds.

    Args:
        name: as in tables.
        prepare: (weight, threads) -> a layer with memory of its own. May raise anything; it is reported.
        held: the values of --isa that it obeys.
        packages: the distributions whose versions matter.
    """

    name: str
    prepare: Callable[[Weight, int], Layer]
    held: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


def needs(weight: Weight, *, bits: tuple[int, ...], act_order: bool = False) -> None:
    """Refuse a weight of other bits, or of an activation order that the format has no place for.

    Raises:
        Unsupported: it is one.
    """
    if weight.case.bits not in bits:
        raise Unsupported(f"takes {', '.join(map(str, bits))} bits; this weight has {weight.case.bits}")
    if weight.case.act_order and not act_order:
        raise Unsupported("has no activation order")
