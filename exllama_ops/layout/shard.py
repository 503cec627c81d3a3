"""A part of a weight, its rows or its columns, for a device of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exllama_ops.layout.formats import FORMATS
from exllama_ops.layout.groups import is_trivial

if TYPE_CHECKING:
    from exllama_ops.layout.weight import GptqWeight


def shard(
    weight: GptqWeight, rows: slice | range | None, columns: slice | range | None, bias: bool | None
) -> GptqWeight:
    """The weight of ``W[rows, columns]``, in memory of its own; `GptqWeight.shard` says the rules."""
    K, N = weight.in_features, weight.out_features
    row_run = _run("rows", rows, K, weight.bits)
    column_run = _run("columns", columns, N, weight.bits)
    keeps_bias = _keeps_bias(weight, row_run, bias)
    part = _take_rows(weight, row_run)
    part = _take_columns(part, column_run)
    return replace(
        part,
        qweight=_own(part.qweight),
        qzeros=_own(part.qzeros),
        scales=_own(part.scales),
        g_idx=None if part.g_idx is None else _own(part.g_idx),
        bias=_own(part.bias) if keeps_bias and part.bias is not None else None,
    )


def _run(name: str, given: slice | range | None, size: int, bits: int) -> range:
    """What is taken of a dimension, checked: one run of whole blocks."""
    if given is None:
        return range(size)
    start = 0 if given.start is None else given.start
    stop = size if given.stop is None else given.stop
    if given.step not in (None, 1) or not 0 <= start < stop <= size:
        raise ValueError(
            f"GptqWeight.shard: {name} must be a run start:stop with 0 <= start < stop <= {size}, in steps of 1; got "
            f"{given}"
        )
    fmt = FORMATS[bits]
    if start % fmt.block_values or stop % fmt.block_values:
        what = "a word" if fmt.block_words == 1 else f"a block of {fmt.block_words} words"
        raise ValueError(
            f"GptqWeight.shard: {name} must start and stop at multiples of {fmt.block_values}, or they cut {what} of "
            f"{bits}-bit values; got {start}:{stop}"
        )
    return range(start, stop)


def _keeps_bias(weight: GptqWeight, rows: range, bias: bool | None) -> bool:
    if bias is None and weight.bias is not None and len(rows) < weight.in_features:
        raise ValueError(
            "GptqWeight.shard: products of row shards are added up, so one shard alone may have the bias: say "
            "bias=True for that one and bias=False for the others"
        )
    if bias and weight.bias is None:
        raise ValueError("GptqWeight.shard: bias=True needs a weight with a bias; this one has none")
    return bias is not False


def _take_columns(weight: GptqWeight, columns: range) -> GptqWeight:
    """The words of qweight hold rows, those of qzeros columns."""
    start, stop = columns.start, columns.stop
    words = slice(start * weight.bits // 32, stop * weight.bits // 32)
    return replace(
        weight,
        qweight=weight.qweight[:, start:stop].contiguous(),
        qzeros=weight.qzeros[:, words].contiguous(),
        scales=weight.scales[:, start:stop].contiguous(),
        bias=None if weight.bias is None else weight.bias[start:stop],
    )


def _take_rows(weight: GptqWeight, rows: range) -> GptqWeight:
    if len(rows) == weight.in_features:
        return weight
    if weight.g_idx is None:
        groups, g_idx, group_size = _runs_of_groups(rows, weight.group_size, weight.qweight.device)
    else:
        groups, g_idx, group_size = _groups_named(weight.g_idx[rows.start : rows.stop], weight.group_size)
    return replace(
        weight,
        qweight=weight.qweight[rows.start * weight.bits // 32 : rows.stop * weight.bits // 32],
        qzeros=weight.qzeros.index_select(0, groups),
        scales=weight.scales.index_select(0, groups),
        g_idx=g_idx,
        group_size=group_size,
    )


def _runs_of_groups(rows: range, group_size: int, device: torch.device) -> tuple[Tensor, None, int]:
    """The groups that a run of rows meets, as runs of equal size.

    A run that starts within a group has shorter groups. Their size is the greatest that divides both
    what is left of that group and a whole one. Their scales are repeated. A raw g_idx would say the
    same, and would compute more slowly.
    """
    start, size = rows.start, group_size
    if start // size < (rows.stop - 1) // size:
        size = math.gcd(start, size)
    elif start % size:
        # All rows are of one group.
        size = len(rows)
    groups = torch.arange(-(-len(rows) // size), dtype=torch.int64, device=device) * size + start
    return groups // group_size, None, size


def _groups_named(g_idx: Tensor, group_size: int) -> tuple[Tensor, Tensor | None, int]:
    """The groups that rows name, numbered anew in their order.

    Their sizes may be any, and then only the g_idx says them. If all have one size, but for a shorter last one, that is
    the shard's group_size, and `prepare` sorts it as it does a whole weight.
    """
    groups, renamed, counts = g_idx.unique(return_inverse=True, return_counts=True)
    renamed = renamed.to(torch.int32)
    size = int(counts[0])
    sizes_are_one = bool((counts[:-1] == size).all()) and int(counts[-1]) <= size
    if not sizes_are_one:
        return groups, renamed, group_size
    return groups, None if is_trivial(renamed, size) else renamed, size


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
