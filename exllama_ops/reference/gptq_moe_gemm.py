from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_expert_offsets, check_gptq_moe_gemm, check_row_order_values
from exllama_ops.layout.experts import Experts
from exllama_ops.layout.weight import Weight, from_op_arguments
from exllama_ops.reference.gptq_gemm import product


@from_op_arguments(Experts)
def gptq_moe_gemm(x: Tensor, experts: Experts) -> Tensor:
    """Reference of `torch.ops.exllama.gptq_moe_gemm`: `gptq_gemm` of the rows of each expert by its weight."""
    check_gptq_moe_gemm(x, experts)
    out = x.new_zeros((x.shape[0], experts.N))
    return of_each_expert("gptq_moe_gemm", x, experts, product, out)


def of_each_expert(
    op: str, rows: Tensor, experts: Experts, product: Callable[[Tensor, Weight], Tensor], out: Tensor
) -> Tensor:
    """``out`` with ``product(rows, weight)`` of each expert in its own rows; the others keep what they have.

    On a CPU each expert computes its own rows. Elsewhere, where the host does not read the offsets, each computes all.
    """
    offsets = experts.offsets
    check_expert_offsets(op, offsets, rows.shape[0])
    if offsets.device.type == "cpu":
        for expert, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
            if start < stop:
                weight, part = experts[expert], f"[{expert}]" if experts.row_order.dim() == 2 else ""
                check_row_order_values(op, weight, writes_to_its_rows=op.endswith("_dx"), part=part)
                out[start:stop] = product(rows[start:stop], weight)
        return out
    row = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    for expert in range(experts.E):
        is_its_own = (row >= offsets[expert]) & (row < offsets[expert + 1])
        out = torch.where(is_its_own[:, None], product(rows, experts[expert]), out)
    return out
