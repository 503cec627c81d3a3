"""`GptqWeight` -> `PackedWeight`, and the shuffled copy that both it and the kernel layer are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from exllama_ops.huge_pages import clone_in_huge_pages
from exllama_ops.layout.groups import sorting_order
from exllama_ops.layout.interning import intern
from exllama_ops.layout.weight import GptqWeight, PackedWeight, no_order


def prepare(weight: GptqWeight) -> PackedWeight:
    """Bring a weight into the form that `torch.ops.exllama.gptq_gemm` runs fastest.

    Without activation order the rows stay where they are. With it they are sorted by group,
    ``perm = argsort(g_idx, stable=True)``. In a shard of an act-order weight, or with groups of unequal sizes, sorted
    rows may not fall into groups of group_size. Such a weight stays in checkpoint order and keeps its raw g_idx.
    Weights with equal orders get one tensor of it between them: never write to a perm or g_idx.

    Args:
        weight: the weight as a checkpoint has it. It is neither changed nor shared.

    Returns:
        The packed weight, on the same device. Reads g_idx (a load-time step, not for the hot path).

    Raises:
        ValueError: g_idx names a group that has no row of scales.
    """
    qweight, perm, shuffled = shuffled_copy(
        weight.qweight, weight.g_idx, weight.bits, weight.group_size, weight.scales.shape[0]
    )
    raw = weight.g_idx is not None and not shuffled
    return PackedWeight(
        qweight=qweight,
        qzeros=clone_in_huge_pages(weight.qzeros),
        scales=clone_in_huge_pages(weight.scales),
        perm=intern(perm),
        g_idx=intern(weight.g_idx.clone()) if raw and weight.g_idx is not None else no_order(weight.qweight),
        shuffled=shuffled,
        bits=weight.bits,
        group_size=weight.group_size,
        bias=None if weight.bias is None else weight.bias.clone(),
    )


def shuffled_copy(
    qweight: Tensor, g_idx: Tensor | None, bits: int, group_size: int, G: int
) -> tuple[Tensor, Tensor, bool]:
    """Copy a packed weight, its rows sorted by group and its bits in shuffled order if its groups allow it.

    Args:
        qweight: (K * bits / 32, N) int32 in checkpoint order, any strides.
        g_idx: (K,) int32, the group of each row; None for ``k // group_size``.
        bits: 2, 3, 4 or 8.
        group_size: rows of a group.
        G: rows of scales.

    Returns:
        The copy, contiguous; the permutation, empty for none; and whether the copy is shuffled. If not, its rows are
        where they were, and its groups are g_idx.

    Raises:
        ValueError: g_idx names a group that has no row of scales.
    """
    if g_idx is not None:
        low, high = (int(value) for value in g_idx.aminmax())
        if low < 0 or high >= G:
            raise ValueError(
                f"g_idx must lie in [0, G) = [0, {G}), the rows of scales; got values from {low} to {high}"
            )
    order, shuffled = sorting_order(g_idx, group_size, G)
    perm = no_order(qweight) if order is None else order
    qweight = clone_in_huge_pages(qweight)
    if shuffled:
        torch.ops.exllama.gptq_shuffle(qweight, perm, bits)
    return qweight, perm, shuffled
