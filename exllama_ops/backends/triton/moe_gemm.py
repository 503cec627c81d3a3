"""gptq_moe_gemm: the kernels of gptq_gemm, whose programs find their expert by the offsets.

Where gptq_gemm gathers the columns of x before, a kernel does so for all experts.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from exllama_ops.backends.batch_invariant import is_batch_invariant
from exllama_ops.backends.triton.arguments import constants_of_experts, offsets_of
from exllama_ops.backends.triton.experts import row_tiles, rows_of_tile
from exllama_ops.backends.triton.gemm import compute
from exllama_ops.backends.triton.launch import launch
from exllama_ops.backends.triton.tiles import check_width, device_of, plan_gemm, rows_of_each
from exllama_ops.backends.triton.tuned_tiles import tuned
from exllama_ops.backends.triton.unpack import checked_rows
from exllama_ops.layout.checks import check_gptq_moe_gemm
from exllama_ops.layout.experts import Experts
from exllama_ops.layout.weight import from_op_arguments

BLOCK_M, BLOCK_K = 8, 256


@triton.jit(do_not_specialize=["M", "in_features"])
def gather_kernel(
    x_ptr: tl.tensor,  # (M, in_features)
    row_order_ptr: tl.tensor,  # (E, K), or (E, K + in_features) if FILLED
    expert_offsets_ptr: tl.tensor,  # (E + 1,)
    out_ptr: tl.tensor,  # (M, K)
    M: tl.tensor,
    K: tl.tensor,
    in_features: tl.tensor,
    FILLED: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """The rows of each expert with the columns that its order names, 0 where it names none; no rows of no expert."""
    column_tiles = tl.cdiv(K, BLOCK_K)
    expert, first_m, end_m = rows_of_tile(expert_offsets_ptr, tl.program_id(0) // column_tiles, M, E, BLOCK_M)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(0) % column_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m, mask_k = offs_m < end_m, offs_k < tl.where(expert < 0, 0, K)
    row_order_ptr += expert.to(tl.int64) * (K + in_features if FILLED else K)
    columns = checked_rows(row_order_ptr, offs_k, mask_k, in_features, -1 if FILLED else 0)
    mask = mask_m[:, None] & mask_k[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * in_features + columns[None, :], mask & (columns >= 0)[None, :], 0)
    tl.store(out_ptr + offs_m[:, None] * K + offs_k[None, :], x, mask)


def in_order_of_rows(x: Tensor, experts: Experts) -> tuple[Tensor, Experts]:
    """The same product by experts without permutations, whose x has a column for each of their rows."""
    M, K = x.shape[0], experts[0].K
    gathered = x.new_empty(M, K)
    launch(
        gather_kernel,
        (row_tiles(M, experts.E, BLOCK_M) * triton.cdiv(K, BLOCK_K),),
        {"x_ptr": x, "row_order_ptr": experts.row_order, **offsets_of(experts), "out_ptr": gathered},
        {"M": M, "K": K, "in_features": x.shape[1]},
        {"FILLED": experts[0].is_filled, **constants_of_experts(experts), "BLOCK_M": BLOCK_M, "BLOCK_K": BLOCK_K},
    )
    return gathered, replace(experts, row_order=experts.row_order.view(-1)[:0])


@from_op_arguments(Experts)
def gptq_moe_gemm(x: Tensor, experts: Experts) -> Tensor:
    """`torch.ops.exllama.gptq_moe_gemm` in Triton."""
    check_gptq_moe_gemm(x, experts)
    check_width("gptq_moe_gemm", experts.bits)
    M, E, weight = x.shape[0], experts.E, experts[0]
    if M == 0:
        return x.new_empty(0, experts.N)
    plan = plan_gemm(M, weight, x.dtype, device_of(x.device), is_batch_invariant(), E)
    if weight.is_filled or (weight.perm is not None and plan.form != "gemv"):
        x, experts = in_order_of_rows(x, experts)
    tile = tuned(plan, rows_of_each(M, E), weight, x.device).tile
    return compute(tile, [plan], x, [experts[0]], experts)
