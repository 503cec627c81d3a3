"""gptq_dequantize: the weights of a tile of words, in the dtype of the scales."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from exllama_ops.backends.triton.launch import kernel_dtype, launch
from exllama_ops.backends.triton.unpack import block_values, checked_rows, load_weights
from exllama_ops.backends.triton.weight import Weight
from exllama_ops.layout.checks import check_gptq_dequantize
from exllama_ops.layout.formats import FORMATS

BLOCK_B, BLOCK_N = 8, 64


@triton.jit(do_not_specialize=["G", "group_size"])
def dequantize_kernel(
    qweight_ptr: tl.tensor,
    qzeros_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    out_ptr: tl.tensor,  # (K, N)
    K: tl.tensor,
    N: tl.tensor,
    G: tl.tensor,
    group_size: tl.tensor,
    BITS: tl.constexpr,
    SHUFFLED: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    HAS_ROWS: tl.constexpr,
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
        qweight_ptr, qzeros_ptr, scales_ptr, rows_ptr, blocks, offs_n, mask_b, mask_n, N, G, group_size,
        BITS, SHUFFLED, ZERO_OFFSET, HAS_ROWS, GROUPS_OF, True,
    )  # fmt: skip
    for j in tl.static_range(VALUES):
        rows = blocks * VALUES + j
        if HAS_ROWS and SHUFFLED:
            rows = checked_rows(rows_ptr, rows, mask_b, K)
        ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(ptrs, weights[j].to(out_ptr.dtype.element_ty), mask_b[:, None] & mask_n[None, :])


def gptq_dequantize(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    use_exllama: bool,
    bit: int,
    use_v2_format: bool = False,
    group_size: int = 0,
) -> Tensor:
    """`torch.ops.exllama.gptq_dequantize` in Triton."""
    check_gptq_dequantize(qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size)
    weight = Weight.of(qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size)
    out = weight.new_rows((weight.K, weight.N), kernel_dtype(scales.dtype))
    values = FORMATS[bit].block_values
    tiles = triton.cdiv(weight.K // values, BLOCK_B) * triton.cdiv(weight.N, BLOCK_N)
    constants = {"GROUPS_OF": weight.groups_of(BLOCK_B * values), "BLOCK_B": BLOCK_B, "BLOCK_N": BLOCK_N}
    launch(
        dequantize_kernel, (tiles,), {**weight.tensors, "out_ptr": out}, weight.sizes, {**weight.constants, **constants}
    )
    return out.to(scales.dtype)
