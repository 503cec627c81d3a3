"""`GptqWeight` -> `PackedWeight`, and the shuffled copy that both it and the kernel layer are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from exllama_ops.huge_pages import clone_in_huge_pages
from exllama_ops.layout.fill import fill, permutation_of_all_rows
from exllama_ops.layout.groups import sorting_order
from exllama_ops.layout.interning import intern
from exllama_ops.layout.weight import GptqWeight, PackedWeight, no_order


def prepare(weight: GptqWeight) -> PackedWeight:
    """Bring a weight into the form that `torch.ops.exllama.gptq_gemm` runs fastest.

    Without activation order the rows stay where they are. With it they are sorted by group,
    ``perm = argsort(g_idx, stable=True)``. In a shard of an act-order weight, or with groups of unequal sizes, sorted
    rows may not fall into groups of group_size. Then each group is filled up with rows that name no row of x, and the
    weight has a group_size of its own.
    Weights with equal orders get one tensor of it between them: never write to a perm.

    Args:
        weight: the weight as a checkpoint has it. It is neither changed nor shared.

    Returns:
        The packed weight, on the same device. Reads g_idx (a load-time step, not for the hot path).

    Raises:
        ValueError: g_idx names a group that has no row of scales.
    """
    shuffled = shuffled_copy(weight.qweight, weight.g_idx, weight.bits, weight.group_size, weight.scales.shape[0])
    return PackedWeight(
        qweight=shuffled.qweight,
        qzeros=clone_in_huge_pages(shuffled.of_its_groups(weight.qzeros)),
        scales=clone_in_huge_pages(shuffled.of_its_groups(weight.scales)),
        perm=intern(shuffled.perm),
        g_idx=no_order(weight.qweight),
        shuffled=True,
        bits=weight.bits,
        group_size=shuffled.group_size,
        bias=None if weight.bias is None else weight.bias.clone(),
        source_groups=shuffled.source_groups,
        source_group_size=None if shuffled.source_groups is None else weight.group_size,
    )


def unprepare(packed: PackedWeight) -> GptqWeight:
    """What `prepare` was given, bit for bit, in memory of its own."""
    weight, K, places = packed.weight, packed.in_features, packed.weight.places
    qweight, qzeros, scales, g_idx = packed.qweight, packed.qzeros, packed.scales, weight.g_idx
    if packed.shuffled:
        perm = permutation_of_all_rows(packed.perm, K) if weight.is_filled else packed.perm
        qweight = torch.ops.exllama.gptq_unshuffle(qweight, perm, packed.bits)[: K * packed.bits // 32]
        g_idx = None if places is None else weight.row_groups().index_select(0, places)
    group_size = packed.group_size
    if packed.source_groups is not None and packed.source_group_size is not None and g_idx is not None:
        # Every group is among them, and each part of one has its scales.
        groups = packed.source_groups
        table = groups.new_zeros(int(groups.max()) + 1, dtype=torch.int64)
        table[groups.long()] = torch.arange(groups.numel(), dtype=torch.int64, device=groups.device)
        qzeros, scales = qzeros.index_select(0, table), scales.index_select(0, table)
        g_idx, group_size = groups.index_select(0, g_idx), packed.source_group_size
    return GptqWeight(
        qweight=qweight.clone(),
        qzeros=qzeros.clone(),
        scales=scales.clone(),
        g_idx=None if g_idx is None else g_idx.clone(),
        bits=packed.bits,
        group_size=group_size,
        bias=None if packed.bias is None else packed.bias.detach().clone(),
    )


class ShuffledCopy(NamedTuple):
    """A packed weight in shuffled order.

    Args:
        qweight: contiguous.
        perm: what gptq_gemm takes as its g_idx.
        group_size: of its groups.
        source_groups: the group of the checkpoint that each group is a part of; None if the groups are the same.
    """

    qweight: Tensor
    perm: Tensor
    group_size: int
    source_groups: Tensor | None

    def of_its_groups(self, table: Tensor) -> Tensor:
        """Scales or zero points of the checkpoint's groups -> those of the copy's."""
        return table if self.source_groups is None else table.index_select(0, self.source_groups)


def shuffled_copy(qweight: Tensor, g_idx: Tensor | None, bits: int, group_size: int, G: int) -> ShuffledCopy:
    """Copy a packed weight, its rows sorted by group and its bits in shuffled order.

    Args:
        qweight: (K * bits / 32, N) int32 in checkpoint order, any strides.
        g_idx: (K,) int32, the group of each row; None for ``k // group_size``.
        bits: 2, 3, 4 or 8.
        group_size: rows of a group.
        G: rows of scales.

    Returns:
        The copy. Where sorted rows do not fall into groups of group_size, it is filled, and has more rows.

    Raises:
        ValueError: g_idx names a group that has no row of scales.
    """
    if g_idx is not None:
        low, high = (int(value) for value in g_idx.aminmax())
        if low < 0 or high >= G:
            raise ValueError(
                f"g_idx must lie in [0, G) = [0, {G}), the rows of scales; got values from {low} to {high}"
            )
    order, in_runs = sorting_order(g_idx, group_size, G)
    if g_idx is None or in_runs:
        perm = no_order(qweight) if order is None else order
        qweight = clone_in_huge_pages(qweight)
        torch.ops.exllama.gptq_shuffle(qweight, perm, bits)
        return ShuffledCopy(qweight, perm, group_size, None)
    filling = fill(g_idx, G, bits)
    words, K = qweight.shape[0], g_idx.numel()
    rows = (filling.row_order.numel() - K) * bits // 32
    filled = clone_in_huge_pages(qweight.new_zeros(()).expand(rows, qweight.shape[1]))
    filled[:words] = qweight
    torch.ops.exllama.gptq_shuffle(filled, permutation_of_all_rows(filling.row_order, K), bits)
    return ShuffledCopy(filled, filling.row_order, filling.group_size, filling.source_groups)
