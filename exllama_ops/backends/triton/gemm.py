"""gptq_gemm: three kernels, and the sum of their parts where K is split. No atomics: a result repeats bit for bit.

* gemv: few rows of x, multiplied and added in float32, in the layout in which the words were loaded. Each thread has
  sums of its own for its blocks of words, which are added up pairwise at the end.
* dot: tl.dot of x's dtype on tensor cores, whose other operand is the integer q - z, exact in 16 bits: an outlier of x
  costs nothing where q = z. A step lies in one group, and its scale is applied to the float32 sum of the step.
* float_dot: tl.dot in float32 with scale * (q - z), for everything else: float32 x, groups of any size, devices whose
  tensor cores Triton does not use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from exllama_ops.backends.batch_invariant import is_batch_invariant
from exllama_ops.backends.triton.launch import kernel_dtype, launch
from exllama_ops.backends.triton.tiles import Plan, device_of, plan_gemm
from exllama_ops.backends.triton.tuned_tiles import tuned
from exllama_ops.backends.triton.unpack import block_values, checked_rows, load_weights, rows_of
from exllama_ops.backends.triton.weight import Weight
from exllama_ops.layout.checks import check_gptq_gemm, check_gptq_gemm_multi

_ADD_BLOCK = 256
_OPERANDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def zero_sums(COUNT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tuple:
    zeros = (tl.zeros((BLOCK_B, BLOCK_N), tl.float32),)
    if COUNT == 1:
        return zeros
    else:
        return zeros + zero_sums(COUNT - 1, BLOCK_B, BLOCK_N)


@triton.jit
def sum_blocks(sums: tl.tensor) -> tl.tensor:
    """The sum over the first axis, [1, BLOCK_N]: in halves, so that its order does not depend on the layout."""
    if sums.shape[0] == 1:
        return sums
    else:
        low, high = tl.split(sums.reshape(2, sums.shape[0] // 2, sums.shape[1]).permute(1, 2, 0))
        return sum_blocks(low + high)


@triton.jit(do_not_specialize=["M", "G", "group_size", "steps_per_split"])
def gemv_kernel(
    x_ptr: tl.tensor,  # (M, K)
    qweight_ptr: tl.tensor,
    qzeros_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    out_ptr: tl.tensor,  # (splits, M, N)
    M: tl.tensor,
    K: tl.tensor,
    N: tl.tensor,
    G: tl.tensor,
    group_size: tl.tensor,
    steps_per_split: tl.tensor,
    BITS: tl.constexpr,
    SHUFFLED: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    GROUPS_OF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    VALUES: tl.constexpr = block_values(BITS)
    column_tiles = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(1)
    offs_n = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    first_m = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_M
    mask_n = offs_n < N
    totals = zero_sums(BLOCK_M, BLOCK_B, BLOCK_N)
    first = split * steps_per_split
    for step in range(first, tl.minimum(first + steps_per_split, tl.cdiv(K, BLOCK_B * VALUES))):
        blocks = step * BLOCK_B + tl.arange(0, BLOCK_B)
        mask_b = blocks < K // VALUES
        weights, scales = load_weights(
            qweight_ptr, qzeros_ptr, scales_ptr, rows_ptr, blocks, offs_n, mask_b, mask_n, N, G, group_size,
            BITS, SHUFFLED, ZERO_OFFSET, HAS_ROWS, GROUPS_OF, GROUPS_OF == "row",
        )  # fmt: skip
        sums = totals if GROUPS_OF == "row" else zero_sums(BLOCK_M, BLOCK_B, BLOCK_N)
        for j in tl.static_range(VALUES):
            columns = blocks * VALUES + j
            if HAS_ROWS and SHUFFLED:
                columns = checked_rows(rows_ptr, columns, mask_b, K)
            added = ()
            for m in tl.static_range(BLOCK_M):
                mask = blocks < tl.where(first_m + m < M, K // VALUES, 0)
                x = tl.load(x_ptr + (first_m + m) * K + columns, mask, 0).to(tl.float32)
                added = added + (tl.fma(x[:, None], weights[j], sums[m]),)
            sums = added
        if GROUPS_OF == "row":
            totals = sums
        else:
            scaled = ()
            for m in tl.static_range(BLOCK_M):
                scaled = scaled + (tl.fma(sums[m], scales, totals[m]),)
            totals = scaled
    for m in tl.static_range(BLOCK_M):
        ptrs = out_ptr + (split.to(tl.int64) * M + first_m + m) * N + offs_n[None, :]
        mask = offs_n < tl.where(first_m + m < M, N, 0)
        tl.store(ptrs, sum_blocks(totals[m]).to(out_ptr.dtype.element_ty), mask[None, :])


@triton.jit(do_not_specialize=["M", "G", "group_size", "steps_per_split"])
def dot_kernel(
    x_ptr: tl.tensor,  # (M, K), its columns in the order of the words' rows
    qweight_ptr: tl.tensor,
    qzeros_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    out_ptr: tl.tensor,  # (splits, M, N)
    M: tl.tensor,
    K: tl.tensor,
    N: tl.tensor,
    G: tl.tensor,
    group_size: tl.tensor,
    steps_per_split: tl.tensor,
    BITS: tl.constexpr,
    SHUFFLED: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    GROUPS_OF: tl.constexpr,
    SCALED: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    VALUES: tl.constexpr = block_values(BITS)
    BLOCK_K: tl.constexpr = BLOCK_B * VALUES
    column_tiles = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(1)
    offs_n = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m, mask_n = offs_m < M, offs_n < N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * steps_per_split
    for step in range(first, tl.minimum(first + steps_per_split, tl.cdiv(K, BLOCK_K))):
        blocks = step * BLOCK_B + tl.arange(0, BLOCK_B)
        weights, scales = load_weights(
            qweight_ptr, qzeros_ptr, scales_ptr, rows_ptr, blocks, offs_n, blocks < K // VALUES, mask_n, N, G,
            group_size, BITS, SHUFFLED, ZERO_OFFSET, HAS_ROWS, GROUPS_OF, SCALED,
        )  # fmt: skip
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :], mask_m[:, None] & (offs_k < K)[None, :], 0)
        w = rows_of(weights, OPERAND, BLOCK_B, BLOCK_N)
        if SCALED:
            total = tl.dot(x.to(OPERAND), w, total, input_precision="ieee")
        else:
            total = tl.fma(tl.dot(x.to(OPERAND), w, input_precision="ieee"), scales, total)
    ptrs = out_ptr + (split.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
    tl.store(ptrs, total.to(out_ptr.dtype.element_ty), mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["elements", "splits"])
def add_splits_kernel(
    partials_ptr: tl.tensor, out_ptr: tl.tensor, elements: tl.tensor, splits: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """out = the sum of the splits of partials (splits, elements), always from the first to the last."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    total = tl.load(partials_ptr + offs, mask, 0)
    ptrs = partials_ptr + offs
    for _ in range(1, splits):
        ptrs += elements
        total += tl.load(ptrs, mask, 0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask)


def compute(plan: Plan, x: Tensor, weight: Weight) -> Tensor:
    """``x @ W`` by a plan; M > 0."""
    M, N = x.shape[0], weight.N
    dtype = kernel_dtype(x.dtype)
    out = x.new_empty(M, N, dtype=dtype)
    target = out if plan.splits == 1 else x.new_empty(plan.splits, M, N, dtype=torch.float32)
    tile = plan.tile
    constants = {"GROUPS_OF": plan.groups_of, "BLOCK_M": tile.block_m, "BLOCK_B": plan.block_b, "BLOCK_N": tile.block_n}
    if plan.form == "gemv":
        kernel = gemv_kernel
    else:
        kernel = dot_kernel
        constants["SCALED"] = plan.form == "float_dot"
        constants["OPERAND"] = _OPERANDS[dtype if plan.form == "dot" else torch.float32]
        if weight.perm is not None:
            x = x.index_select(1, weight.perm)
    launch(
        kernel,
        (triton.cdiv(N, tile.block_n) * triton.cdiv(M, tile.block_m), plan.splits),
        {"x_ptr": x, **weight.tensors, "out_ptr": target},
        {"M": M, **weight.sizes, "steps_per_split": plan.steps_per_split},
        {**weight.constants, **constants},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if plan.splits > 1:
        launch(
            add_splits_kernel,
            (triton.cdiv(M * N, _ADD_BLOCK),),
            {"partials_ptr": target, "out_ptr": out},
            {"elements": M * N, "splits": plan.splits},
            {"BLOCK": _ADD_BLOCK},
        )
    return out.to(x.dtype)


def gptq_gemm(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    use_exllama: bool,
    bit: int,
    use_v2_format: bool = False,
    group_size: int = 0,
) -> Tensor:
    """`torch.ops.exllama.gptq_gemm` in Triton."""
    check_gptq_gemm(x, qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size)
    weight = Weight.of(qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.N)
    plan = plan_gemm(x.shape[0], weight, x.dtype, device_of(x.device), is_batch_invariant())
    return compute(tuned(plan, x.shape[0], weight, x.device), x, weight)


def gptq_gemm_multi(
    x: Tensor,
    qweight: Sequence[Tensor],
    qzeros: Sequence[Tensor],
    scales: Sequence[Tensor],
    g_idx: Tensor,
    use_exllama: bool,
    bit: int,
    use_v2_format: bool = False,
    group_size: int = 0,
) -> Tensor:
    """`torch.ops.exllama.gptq_gemm_multi` in Triton: each part as `gptq_gemm` has it, and their columns put together.

    A part's plan depends on its own N, and its bits on its plan.
    """
    check_gptq_gemm_multi(x, qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size)
    parts = zip(qweight, qzeros, scales, strict=True)
    return torch.cat([gptq_gemm(x, *part, g_idx, use_exllama, bit, use_v2_format, group_size) for part in parts], 1)
