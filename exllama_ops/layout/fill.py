"""Groups of unequal sizes, filled up to one size by rows that no row of the checkpoint is. docs/format.md draws it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from exllama_ops.layout.formats import FORMATS

# The time that a group takes beside its rows, counted in rows: docs/decisions/filled-groups.md.
_ROWS_OF_A_GROUP = 12
# GPUs multiply the rows of a group in steps of so many at least.
_GPU_ROWS = 32


class Filling(NamedTuple):
    """How a weight is filled.

    Args:
        row_order: (rows + K,) int32. The row of the checkpoint that each row of the filled weight is, or -1; and then
            the row of the filled weight that each row of the checkpoint is.
        group_size: rows of each group.
        source_groups: (G,) int32, the group of the checkpoint that each group is, or is a part of. After those of the
            rows come the groups that have none.
    """

    row_order: Tensor
    group_size: int
    source_groups: Tensor


def fill(g_idx: Tensor, G: int, bits: int) -> Filling:
    """Sort rows by group, and fill each group up to a multiple of one size. Reads the data.

    A group of more rows than that becomes several.

    Args:
        g_idx: (K,) int32 in [0, G), the group of each row.
        G: rows of scales.
        bits: 2, 3, 4 or 8.
    """
    device, K = g_idx.device, g_idx.numel()
    sizes = torch.bincount(g_idx, minlength=G)
    unit = FORMATS[bits].block_values
    group_size = _group_size(sizes, unit if device.type == "cpu" else max(unit, _GPU_ROWS))
    parts = _parts(sizes, group_size)
    of_rows = torch.arange(G, dtype=torch.int64, device=device).repeat_interleave(parts)
    order = g_idx.argsort(stable=True)
    groups = g_idx.index_select(0, order)
    # Where each group begins: among the sorted rows, and among the filled ones.
    begins, filled_begins = sizes.cumsum(0) - sizes, (parts.cumsum(0) - parts) * group_size
    sorted_places = torch.arange(K, dtype=torch.int64, device=device) + (filled_begins - begins).index_select(0, groups)
    named = torch.full((of_rows.numel() * group_size,), -1, dtype=torch.int64, device=device).index_copy(
        0, sorted_places, order
    )
    source_groups = torch.cat([of_rows, (sizes == 0).nonzero().flatten()])
    places = torch.empty_like(order).index_copy(0, order, sorted_places)
    return Filling(torch.cat([named, places]).to(torch.int32), group_size, source_groups.to(torch.int32))


def _group_size(sizes: Tensor, unit: int) -> int:
    """The multiple of ``unit`` by which groups of these sizes take the least time."""
    most = -(-int(sizes.max()) // unit)
    candidates = unit * torch.arange(1, most + 1, dtype=torch.int64, device=sizes.device)
    costs = torch.stack([_parts(sizes, size).sum() * (size + _ROWS_OF_A_GROUP) for size in candidates])
    return int(candidates[costs.argmin()])


def _parts(sizes: Tensor, group_size: int | Tensor) -> Tensor:
    """Filled groups for each group."""
    return (sizes + group_size - 1) // group_size


def permutation_of_all_rows(row_order: Tensor, K: int) -> Tensor:
    """What `gptq_shuffle` takes for a filled weight: its rows are those of the checkpoint, and after them as many more.

    Args:
        row_order: that of a `Filling`.
        K: rows of the checkpoint.

    Returns:
        (rows,) int32, in which the numbers from K on stand for -1.
    """
    named = row_order[: row_order.numel() - K]
    fills = named < 0
    return torch.where(fills, K - 1 + fills.cumsum(0), named).to(torch.int32)
