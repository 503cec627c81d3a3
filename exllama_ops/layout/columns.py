"""Output columns of packed weights: taken in another order, and laid side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from exllama_ops.layout.pack import pack_columns, unpack_columns
from exllama_ops.layout.weight import PackedWeight


def take_columns(weight: PackedWeight, columns: Tensor) -> PackedWeight:
    """The weight of ``(x @ W + bias)[:, columns]``, in new memory.

    Args:
        weight: any packed weight.
        columns: (N,) integers, a permutation, on any device.
    """
    columns = columns.to(weight.qweight.device)
    # The words of qweight hold rows, those of qzeros columns.
    zeros = unpack_columns(weight.qzeros, weight.bits).index_select(1, columns)
    return replace(
        weight,
        qweight=weight.qweight.index_select(1, columns),
        qzeros=pack_columns(zeros, weight.bits),
        scales=weight.scales.index_select(1, columns),
        bias=None if weight.bias is None else weight.bias.index_select(0, columns),
    )


def side_by_side(weights: Sequence[PackedWeight]) -> PackedWeight:
    """The weight of ``cat([x @ W for each weight], 1)``, in new memory and without a bias.

    Args:
        weights: at least one, of one format (`same_format`).
    """
    first = weights[0]
    return replace(
        first,
        qweight=torch.cat([weight.qweight for weight in weights], 1),
        qzeros=torch.cat([weight.qzeros for weight in weights], 1),
        scales=torch.cat([weight.scales for weight in weights], 1),
        bias=None,
    )


def same_format(first: PackedWeight, second: PackedWeight) -> bool:
    """Whether `side_by_side` takes the two: all but their columns is equal. Reads the order of the rows."""

    def form(weight: PackedWeight) -> tuple[object, ...]:
        rows, device = weight.qweight.shape[0], weight.qweight.device
        options = (weight.shuffled, weight.bits, weight.group_size, weight.source_group_size)
        return (*options, rows, weight.scales.shape[0], weight.scales.dtype, device, weight.row_order.shape)

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    return (
        form(first) == form(second)
        and torch.equal(first.row_order, second.row_order)
        and same(first.source_groups, second.source_groups)
    )
