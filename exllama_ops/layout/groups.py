"""Which group of scales and zero points a row of the weight belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def num_groups(K: int, group_size: int) -> int:
    """G = ceil(K / group_size): the last group may be partial."""
    return -(-K // group_size)


def row_groups(K: int, G: int, group_size: int, device: torch.device) -> Tensor:
    """The groups of rows in sorted order, ``k // size``: (K,) int32. A group_size of 0 stands for ``K // G``."""
    size = min(group_size, K) or K // G  # int32 need not hold the size of a group that is larger than the weight
    return torch.arange(K, device=device, dtype=torch.int32) // size


def is_trivial(g_idx: Tensor, group_size: int) -> bool:
    """Whether ``g_idx[k] == k // group_size`` for every row, which is no activation order. Reads the data."""
    K = g_idx.numel()
    return torch.equal(g_idx, row_groups(K, num_groups(K, group_size), group_size, g_idx.device).to(g_idx.dtype))


def sorting_order(g_idx: Tensor | None, group_size: int, G: int) -> tuple[Tensor | None, bool]:
    """How the rows of a weight are brought into runs of ``group_size`` rows of one group. Reads the data.

    Args:
        g_idx: (K,) int32, the group of each row; None for rows that lie in runs already.
        group_size: rows of a group.
        G: rows of scales. With any other number than ceil(K / group_size), a run is not the row of scales it falls on.

    Returns:
        The permutation ``argsort(g_idx, stable=True)`` as int32, or None if none is needed; and whether sorting gives
        such runs at all, which it does not where groups have other sizes (a shard of an act-order weight).
    """
    if g_idx is None:
        return None, True
    if num_groups(g_idx.numel(), group_size) != G:
        return None, False
    if is_trivial(g_idx, group_size):
        return None, True
    order = g_idx.argsort(stable=True)
    if is_trivial(g_idx.index_select(0, order), group_size):
        return order.to(torch.int32), True
    return None, False
