"""`GptqWeight` -> `PackedWeight`: the one place where a weight is shuffled."""

from __future__ import annotations

import torch

from exllama_ops.layout.groups import sorting_order
from exllama_ops.layout.weight import GptqWeight, PackedWeight, no_rows


def prepare(weight: GptqWeight) -> PackedWeight:
    """Bring a weight into the form that `torch.ops.exllama.gptq_gemm` runs fastest.

    Without activation order the rows stay where they are. With it they are sorted by group,
    ``perm = argsort(g_idx, stable=True)``. If the sorted rows do not fall into groups of group_size (a shard of an
    act-order weight under tensor parallelism, groups of unequal sizes), the weight stays in checkpoint order and keeps
    its raw g_idx.

    Args:
        weight: the weight as a checkpoint has it. It is neither changed nor shared, except for zeros, scales and bias.

    Returns:
        The packed weight, on the same device. Reads g_idx (a load-time step, not for the hot path).
    """
    none = no_rows(weight.qweight)
    order, shuffled = sorting_order(weight.g_idx, weight.group_size)
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
