"""gptq_dequantize: the weights of a tile of words, in the dtype of the scales."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from exllama_ops.backends.triton.arguments import constants, groups_of, new_rows, pointers, sizes, without_order
from exllama_ops.backends.triton.launch import kernel_dtype, launch
from exllama_ops.backends.triton.tiles import check_width
from exllama_ops.backends.triton.unpack import block_values, checked_rows, load_weights
from exllama_ops.layout.checks import check_gptq_dequantize
from exllama_ops.layout.formats import FORMATS
from exllama_ops.layout.weight import Weight, from_op_arguments

BLOCK_B, BLOCK_N = 8, 64


@triton.jit(do_not_specialize=["G", "group_size"])
def dequantize_kernel(
    qweight_ptr: tl.tensor,
    qzeros_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    row_order_ptr: tl.tensor,
    out_ptr: tl.tensor,  # (K, N)
    K: tl.tensor,
    N: tl.tensor,
    G: tl.tensor,
    group_size: tl.tensor,
    BITS: tl.constexpr,
    SHUFFLED: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    HAS_ROW_ORDER: tl.constexpr,
    GROUPS_OF: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    VALUES: tl.constexpr = block_values(BITS)
    column_tiles = tl.cdiv(N, BLOCK_N)
    offs_n = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    blocks = tl.program_id(0) // column_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b, mask_n = blocks < K // VALUES, offs_n < N
    weights, _ = load_weights(
        qweight_ptr, qzeros_ptr, scales_ptr, row_order_ptr, blocks, offs_n, mask_b, mask_n, N, G, group_size,
        BITS, SHUFFLED, ZERO_OFFSET, HAS_ROW_ORDER, GROUPS_OF, True,
    )  # fmt: skip
    for j in tl.static_range(VALUES):
        rows = blocks * VALUES + j
        if HAS_ROW_ORDER and SHUFFLED:
            rows = checked_rows(row_order_ptr, rows, mask_b, K)
        ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(ptrs, weights[j].to(out_ptr.dtype.element_ty), mask_b[:, None] & mask_n[None, :])


@from_op_arguments(Weight)
def gptq_dequantize(weight: Weight) -> Tensor:
    """`torch.ops.exllama.gptq_dequantize` in Triton."""
    check_gptq_dequantize(weight)
    check_width("gptq_dequantize", weight.bits)
    if weight.is_filled:
        return _dequantize(without_order(weight)).index_select(0, weight.row_order[weight.K :])
    return _dequantize(weight)


def _dequantize(weight: Weight) -> Tensor:
    K, N, dtype = weight.K, weight.N, weight.scales.dtype
    out = new_rows(weight, (K, N), kernel_dtype(dtype))
    values = FORMATS[weight.bits].block_values
    launch(
        dequantize_kernel,
        (triton.cdiv(K // values, BLOCK_B) * triton.cdiv(N, BLOCK_N),),
        {**pointers(weight), "out_ptr": out},
        sizes(weight),
        {
            **constants(weight),
            "GROUPS_OF": groups_of(weight, BLOCK_B * values),
            "BLOCK_B": BLOCK_B,
            "BLOCK_N": BLOCK_N,
        },
    )
    return out.to(dtype)
