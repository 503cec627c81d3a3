"""What is measured: the weights of real models, and numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from exllama_ops import GptqWeight, PackedWeight, prepare, quantize, reference
from exllama_ops.layout.groups import row_groups
from exllama_ops.layout.pack import unpack_columns, unpack_rows
from exllama_ops.layout.weight import Weight as OpWeight

# (K, N) of Llama-2-7B: attention, MLP up, MLP down.
SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))
TOKENS = (1, 4, 16, 64, 256, 1024)
# M of the x gradient: a training step, never a single token.
DX_TOKENS = (64, 256)

W = TypeVar("W", GptqWeight, PackedWeight)


@dataclass(frozen=True)
class Case:
    """A weight (K, N). With act_order its rows belong to groups in a random order."""

    K: int
    N: int
    bits: int = 4
    group_size: int = 128
    act_order: bool = False

    def __str__(self) -> str:
        order = ", act-order" if self.act_order else ""
        return f"{self.K}x{self.N}, {self.bits} bits, group {self.group_size}{order}"


class Weight:
    """A random weight in every form that a kernel may want; forms are made when they are first asked for.

    Args:
        case: the weight's sizes. Normal values are rounded to nearest, asymmetrically, with float16 scales.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        random = torch.Generator().manual_seed(0)
        g_idx = None
        if case.act_order:
            groups = row_groups(case.K, -(-case.K // case.group_size), case.group_size, torch.device("cpu"))
            g_idx = groups[torch.randperm(case.K, generator=random)]
        dense = torch.randn(case.N, case.K, generator=random) * 0.02
        self.checkpoint: GptqWeight = quantize(dense, case.bits, case.group_size, g_idx=g_idx)
        self.packed: PackedWeight = prepare(self.checkpoint)

    def to(self, place: torch.device) -> Weight:
        """The weight with all its forms in the memory of a device."""
        if place == self.packed.qweight.device:
            return self
        weight = Weight.__new__(Weight)  # not a copy, which would have the forms that were made here
        weight.case = self.case
        weight.checkpoint, weight.packed = _moved(self.checkpoint, place), _moved(self.packed, place)
        return weight

    @property
    def nbytes(self) -> int:
        """The bytes of qweight, qzeros and scales."""
        return sum(tensor.nbytes for tensor in (self.packed.qweight, self.packed.qzeros, self.packed.scales))

    @cached_property
    def q(self) -> Tensor:
        """(K, N) uint8, the stored integers in checkpoint order."""
        return unpack_rows(self.checkpoint.qweight, self.case.bits).to(torch.uint8)

    @cached_property
    def zeros(self) -> Tensor:
        """(G, N) uint8, the zero points."""
        return unpack_columns(self.checkpoint.qzeros, self.case.bits).to(torch.uint8)

    @property
    def scales(self) -> Tensor:
        """(G, N) float16."""
        return self.checkpoint.scales

    @cached_property
    def groups(self) -> Tensor:
        """(K,) int32, the group of each row in checkpoint order."""
        g_idx = self.checkpoint.g_idx
        if g_idx is not None:
            return g_idx
        return row_groups(self.case.K, self.scales.shape[0], self.case.group_size, self.scales.device)

    @cached_property
    def symmetric(self) -> Tensor:
        """(K, N) float32, the weight that formats without zero points hold: the same integers, zero in the middle."""
        middle = 1 << (self.case.bits - 1)
        return (self.q.float() - middle) * self.scales.float()[self.groups.long()]

    @cached_property
    def dense(self) -> Tensor:
        """(K, N) float32, exact: an integer of at most 9 bits times 11 bits."""
        exact = replace(self.op_weight, scales=self.scales.float())
        return reference.gptq_dequantize(*exact.arguments)

    @property
    def op_weight(self) -> OpWeight:
        """The weight as our ops take it."""
        return self.packed.weight


def _moved(weight: W, place: torch.device) -> W:
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    tensors: dict[str, Any] = {name: part.to(place) for name, part in values.items() if isinstance(part, Tensor)}
    return replace(weight, **tensors)


def activations(M: int, K: int, seed: int = 1) -> Tensor:
    """(M, K) float16, normal."""
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).half()
