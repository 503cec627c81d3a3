"""`GptqWeight` -> `PackedWeight`: the one place where a weight is shuffled."""

from __future__ import annotations

import torch
from torch import Tensor

from exllama_ops.layout.groups import sorting_order
from exllama_ops.layout.weight import GptqWeight, PackedWeight, no_rows


def prepare(weight: GptqWeight) -> PackedWeight:
    """Bring a weight into the form that `torch.ops.exllama.gptq_gemm` runs fastest.

    Without activation order the rows stay where they are. With it they are sorted by group,
    ``perm = argsort(g_idx, stable=True)``. If the sorted rows do not fall into groups of group_size (a shard of an
    act-order weight under tensor parallelism, groups of unequal sizes), the weight stays in checkpoint order and keeps
    its raw g_idx.

    Args:
        weight: the weight as a checkpoint has it. It is not changed. Its zeros, scales, bias and a raw g_idx are shared
            with the result; qweight is copied.

    Returns:
        The packed weight, on the same device. Reads g_idx (a load-time step, not for the hot path).

    Raises:
        ValueError: g_idx names a group that has no row of scales.
    """
    none = no_rows(weight.qweight)
    G = weight.scales.shape[0]
    _check_range(weight.g_idx, G)
    order, shuffled = sorting_order(weight.g_idx, weight.group_size, G)
    perm = none if order is None else order
    g_idx = none if shuffled or weight.g_idx is None else weight.g_idx
    qweight = weight.qweight.clone()
    if shuffled:
        torch.ops.exllama.gptq_shuffle(qweight, perm, weight.bits)
    return PackedWeight(
        qweight=qweight,
        qzeros=weight.qzeros,
        scales=weight.scales,
        perm=perm,
        g_idx=g_idx,
        shuffled=shuffled,
        bits=weight.bits,
        group_size=weight.group_size,
        bias=weight.bias,
    )


def _check_range(g_idx: Tensor | None, G: int) -> None:
    if g_idx is None:
        return
    low, high = (int(value) for value in g_idx.aminmax())
    if low < 0 or high >= G:
        raise ValueError(f"prepare: g_idx must lie in [0, G) = [0, {G}); got values from {low} to {high}")
