"""gptq_gemm: three kernels, in one launch where K is split too. A result repeats bit for bit.

* gemv: few rows of x, multiplied and added in float32, in the layout in which the words were loaded. Each thread has
  sums of its own for its blocks of words, which are added up pairwise at the end.
* dot: tl.dot of x's dtype on tensor cores, whose other operand is the integer q - z, exact in 16 bits. An outlier of x
  costs nothing where q = z. A step lies in one group, and its scale is applied to the float32 sum of the step.
* float_dot: tl.dot in float32 with scale * (q - z), for everything else: float32 x, groups of any size, devices whose
  tensor cores Triton does not use.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from exllama_ops.backends.batch_invariant import is_batch_invariant
from exllama_ops.backends.triton.arguments import (
    constants,
    constants_of_experts,
    offsets_of,
    sizes,
    without_order,
)
from exllama_ops.backends.triton.experts import place_of, pointers_of, row_tiles
from exllama_ops.backends.triton.launch import kernel_dtype, launch
from exllama_ops.backends.triton.splits import PARTS, add_splits, arguments_of_splits, of_each_part, store_tile, sum_of
from exllama_ops.backends.triton.tickets import tickets_for
from exllama_ops.backends.triton.tiles import Plan, Tile, adds_splits, check_width, device_of, plan_gemm
from exllama_ops.backends.triton.tuned_tiles import tuned
from exllama_ops.backends.triton.unpack import block_values, checked_rows, load_weights, rows_of
from exllama_ops.layout.checks import check_gptq_gemm, check_gptq_gemm_multi
from exllama_ops.layout.experts import Experts
from exllama_ops.layout.weight import Parts, Weight, from_op_arguments

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


@triton.jit
def part_of(
    qweight_ptrs: tl.tuple,
    qzeros_ptrs: tl.tuple,
    scales_ptrs: tl.tuple,
    N: tl.tuple,
    steps_per_split: tl.tuple,
    steps: tl.tensor,
    row_tiles: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> tl.tuple:
    """The part whose sums this program takes: its pointers, N and steps, the program's place, the columns and the tiles
    before it.

    A part has a program for each tile of columns, of rows and each split, in this order.
    """
    qweight_ptr, qzeros_ptr, scales_ptr = qweight_ptrs[0], qzeros_ptrs[0], scales_ptrs[0]
    n, per_split = N[0], steps_per_split[0]
    program, first_column, first_tile = tl.program_id(0), 0, 0
    for i in tl.static_range(1, len(N)):
        tiles = tl.cdiv(n, BLOCK_N) * row_tiles
        programs = tiles * tl.cdiv(steps, per_split)
        is_later = program >= programs
        program = tl.where(is_later, program - programs, program)
        first_tile = tl.where(is_later, first_tile + tiles, first_tile)
        first_column = tl.where(is_later, first_column + n, first_column)
        qweight_ptr = tl.where(is_later, qweight_ptrs[i], qweight_ptr)
        qzeros_ptr = tl.where(is_later, qzeros_ptrs[i], qzeros_ptr)
        scales_ptr = tl.where(is_later, scales_ptrs[i], scales_ptr)
        n = tl.where(is_later, N[i], n)
        per_split = tl.where(is_later, steps_per_split[i], per_split)
    return qweight_ptr, qzeros_ptr, scales_ptr, n, per_split, program, first_column, first_tile


@triton.jit(do_not_specialize=["M", "G", "group_size", "steps_0", "steps_1", "steps_2", "steps_3"])
def gemv_kernel(
    x_ptr: tl.tensor,  # (M, K)
    qweight_ptrs: tl.tuple,  # of each part, as its N
    qzeros_ptrs: tl.tuple,
    scales_ptrs: tl.tuple,
    row_order_ptr: tl.tensor,
    expert_offsets_ptr: tl.tensor,  # (E + 1,), None if E is 0: of one weight, or of several that are parts
    out_ptr: tl.tensor,  # (M, all N)
    partials_ptr: tl.tensor,  # (splits, M, all N), None if no part splits K
    tickets_ptr: tl.tensor,  # (tiles,), None with it
    M: tl.tensor,
    K: tl.tensor,
    N: tl.tuple,
    G: tl.tensor,
    group_size: tl.tensor,
    steps_0: tl.tensor,
    steps_1: tl.tensor,
    steps_2: tl.tensor,
    steps_3: tl.tensor,
    BITS: tl.constexpr,
    SHUFFLED: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    HAS_ROW_ORDER: tl.constexpr,
    E: tl.constexpr,
    GROUPS_OF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    VALUES: tl.constexpr = block_values(BITS)
    steps, row_tiles = tl.cdiv(K, BLOCK_B * VALUES), tl.cdiv(M, BLOCK_M)
    qweight_ptr, qzeros_ptr, scales_ptr, n, steps_per_split, program, first_column, first_tile = part_of(
        qweight_ptrs, qzeros_ptrs, scales_ptrs, N, (steps_0, steps_1, steps_2, steps_3), steps, row_tiles, BLOCK_N
    )
    column_tiles = tl.cdiv(n, BLOCK_N)
    offs_n = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    split, tile, expert, first_m, end_m = place_of(
        expert_offsets_ptr, program // column_tiles, row_tiles, tl.cdiv(steps, steps_per_split), M, E, BLOCK_M
    )
    if E > 0:
        steps = tl.where(expert < 0, 0, steps)
        qweight_ptr, qzeros_ptr, scales_ptr = pointers_of(expert, qweight_ptr, qzeros_ptr, scales_ptr, K, n, G, BITS)
        row_order_ptr += expert.to(tl.int64) * K
    totals = zero_sums(BLOCK_M, BLOCK_B, BLOCK_N)
    first = split * steps_per_split
    for step in range(first, tl.minimum(first + steps_per_split, steps)):
        blocks = step * BLOCK_B + tl.arange(0, BLOCK_B)
        mask_b = blocks < K // VALUES
        weights, scales = load_weights(
            qweight_ptr, qzeros_ptr, scales_ptr, row_order_ptr, blocks, offs_n, mask_b, mask_n, n, G, group_size,
            BITS, SHUFFLED, ZERO_OFFSET, HAS_ROW_ORDER, GROUPS_OF, GROUPS_OF == "row",
        )  # fmt: skip
        sums = totals if GROUPS_OF == "row" else zero_sums(BLOCK_M, BLOCK_B, BLOCK_N)
        for j in tl.static_range(VALUES):
            columns = blocks * VALUES + j
            if HAS_ROW_ORDER and SHUFFLED:
                columns = checked_rows(row_order_ptr, columns, mask_b, K)
            added = ()
            for m in tl.static_range(BLOCK_M):
                mask = blocks < tl.where(first_m + m < end_m, K // VALUES, 0)
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
    sums = ()
    for m in tl.static_range(BLOCK_M):
        sums = sums + (sum_blocks(totals[m]),)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    store_tile(
        out_ptr, partials_ptr, tickets_ptr, rows_of(sums, tl.float32, 1, BLOCK_N), offs_m, first_column + offs_n,
        (offs_m < end_m)[:, None] & mask_n[None, :], M, sum_of(N),
        first_tile + tile * column_tiles + program % column_tiles, split,
        tl.cdiv(tl.cdiv(K, BLOCK_B * VALUES), steps_per_split),
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "G", "group_size", "steps_0", "steps_1", "steps_2", "steps_3"])
def dot_kernel(
    x_ptr: tl.tensor,  # (M, K), its columns in the order of the words' rows
    qweight_ptrs: tl.tuple,  # of each part, as its N
    qzeros_ptrs: tl.tuple,
    scales_ptrs: tl.tuple,
    row_order_ptr: tl.tensor,
    expert_offsets_ptr: tl.tensor,  # (E + 1,), None if E is 0: of one weight, or of several that are parts
    out_ptr: tl.tensor,  # (M, all N)
    partials_ptr: tl.tensor,  # (splits, M, all N), None if no part splits K
    tickets_ptr: tl.tensor,  # (tiles,), None with it
    M: tl.tensor,
    K: tl.tensor,
    N: tl.tuple,
    G: tl.tensor,
    group_size: tl.tensor,
    steps_0: tl.tensor,
    steps_1: tl.tensor,
    steps_2: tl.tensor,
    steps_3: tl.tensor,
    BITS: tl.constexpr,
    SHUFFLED: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    HAS_ROW_ORDER: tl.constexpr,
    E: tl.constexpr,
    GROUPS_OF: tl.constexpr,
    SCALED: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    VALUES: tl.constexpr = block_values(BITS)
    BLOCK_K: tl.constexpr = BLOCK_B * VALUES
    steps, row_tiles = tl.cdiv(K, BLOCK_K), tl.cdiv(M, BLOCK_M)
    qweight_ptr, qzeros_ptr, scales_ptr, n, steps_per_split, program, first_column, first_tile = part_of(
        qweight_ptrs, qzeros_ptrs, scales_ptrs, N, (steps_0, steps_1, steps_2, steps_3), steps, row_tiles, BLOCK_N
    )
    column_tiles = tl.cdiv(n, BLOCK_N)
    offs_n = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    split, tile, expert, first_m, end_m = place_of(
        expert_offsets_ptr, program // column_tiles, row_tiles, tl.cdiv(steps, steps_per_split), M, E, BLOCK_M
    )
    if E > 0:
        steps = tl.where(expert < 0, 0, steps)
        qweight_ptr, qzeros_ptr, scales_ptr = pointers_of(expert, qweight_ptr, qzeros_ptr, scales_ptr, K, n, G, BITS)
        row_order_ptr += expert.to(tl.int64) * K
    offs_m = first_m + tl.arange(0, BLOCK_M)
    mask_m, mask_n = offs_m < end_m, offs_n < n
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * steps_per_split
    for step in range(first, tl.minimum(first + steps_per_split, steps)):
        blocks = step * BLOCK_B + tl.arange(0, BLOCK_B)
        weights, scales = load_weights(
            qweight_ptr, qzeros_ptr, scales_ptr, row_order_ptr, blocks, offs_n, blocks < K // VALUES, mask_n, n, G,
            group_size, BITS, SHUFFLED, ZERO_OFFSET, HAS_ROW_ORDER, GROUPS_OF, SCALED,
        )  # fmt: skip
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :], mask_m[:, None] & (offs_k < K)[None, :], 0)
        w = rows_of(weights, OPERAND, BLOCK_B, BLOCK_N)
        if SCALED:
            total = tl.dot(x.to(OPERAND), w, total, input_precision="ieee")
        else:
            total = tl.fma(tl.dot(x.to(OPERAND), w, input_precision="ieee"), scales, total)
    store_tile(
        out_ptr, partials_ptr, tickets_ptr, total, offs_m, first_column + offs_n, mask_m[:, None] & mask_n[None, :],
        M, sum_of(N), first_tile + tile * column_tiles + program % column_tiles, split,
        tl.cdiv(tl.cdiv(K, BLOCK_K), steps_per_split),
    )  # fmt: skip


def compute(
    tile: Tile, plans: Sequence[Plan], x: Tensor, weights: Sequence[Weight], experts: Experts | None = None
) -> Tensor:
    """``[x @ W[0], x @ W[1], ...]`` in one launch, each part by its plan, in one tile; M > 0.

    The parts share K, the groups, the options and the dtype of their scales; so their plans differ in the splits alone.
    With a permutation, x has the columns of `in_order_of_rows`. The weights of `experts` take the place of the one
    weight, which is that of any of them.
    """
    M, N = x.shape[0], tuple(weight.N for weight in weights)
    plan, weight = plans[0], weights[0]
    dtype = kernel_dtype(x.dtype)
    out = x.new_empty(M, sum(N), dtype=dtype)
    rows = row_tiles(M, experts.E if experts else 0, tile.block_m)
    column_tiles = [triton.cdiv(n, tile.block_n) for n in N]
    most, partials, tickets = max(plan.splits for plan in plans), None, None
    if most > 1:
        partials = x.new_empty(most, *out.shape, dtype=torch.float32)
        if adds_splits(plan.form, tile):
            tickets = tickets_for(x.device, rows * sum(column_tiles))
    given, without = arguments_of_splits(partials, tickets)
    compiled_in = {
        "GROUPS_OF": plan.groups_of,
        "BLOCK_M": tile.block_m,
        "BLOCK_B": plan.block_b,
        "BLOCK_N": tile.block_n,
    }
    if plan.form == "gemv":
        kernel = gemv_kernel
    else:
        kernel = dot_kernel
        compiled_in["SCALED"] = plan.form == "float_dot"
        compiled_in["OPERAND"] = _OPERANDS[dtype if plan.form == "dot" else torch.float32]
    sources = weights if experts is None else [experts]
    steps = of_each_part("steps", [plan.steps_per_split for plan in plans])
    launch(
        kernel,
        (rows * sum(column_tiles[i] * plans[i].splits for i in range(len(N))),),
        {
            "x_ptr": x,
            "qweight_ptrs": tuple(source.qweight for source in sources),
            "qzeros_ptrs": tuple(source.qzeros for source in sources),
            "scales_ptrs": tuple(source.scales for source in sources),
            "row_order_ptr": sources[0].row_order,
            **offsets_of(experts),
            "out_ptr": out,
            **given,
        },
        {"M": M, **sizes(weight), "N": N, **steps},
        {**constants(weight), **constants_of_experts(experts), **without, **compiled_in},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if partials is not None and tickets is None:
        add_splits(partials, out, N, [plan.splits for plan in plans])
    return out.to(x.dtype)


def in_order_of_rows(x: Tensor, plan: Plan, weight: Weight) -> Tensor:
    """x as `compute` takes it: the columns of a dot with a permutation are gathered before."""
    return x if plan.form == "gemv" or weight.perm is None else x.index_select(1, weight.perm)


def without_filling(x: Tensor, weights: Sequence[Weight]) -> tuple[Tensor, Sequence[Weight]]:
    """The same product by weights that the kernels take: of filled ones the words, for the columns that they name."""
    if not weights[0].is_filled:
        return x, weights
    with_zeros, named = torch.nn.functional.pad(x, (1, 0)), weights[0].row_order[: weights[0].K]
    return with_zeros.index_select(1, named + 1), [without_order(weight) for weight in weights]


@from_op_arguments(Weight)
def gptq_gemm(x: Tensor, weight: Weight) -> Tensor:
    """`torch.ops.exllama.gptq_gemm` in Triton."""
    check_gptq_gemm(x, weight)
    check_width("gptq_gemm", weight.bits)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.N)
    return _products(x, [weight])


@from_op_arguments(Parts)
def gptq_gemm_multi(x: Tensor, parts: Parts) -> Tensor:
    """`torch.ops.exllama.gptq_gemm_multi` in Triton."""
    check_gptq_gemm_multi(x, parts)
    check_width("gptq_gemm_multi", parts.bits)
    weights = parts.weights
    if x.shape[0] == 0:
        return x.new_empty(0, sum(weight.N for weight in weights))
    return _products(x, weights)


def _products(x: Tensor, weights: Sequence[Weight]) -> Tensor:
    """``x @ W`` of every part, in one launch for up to `PARTS` neighbours whose scales have one dtype.

    A part's plan, and so its bits, are those that it has alone. The tile changes no bit; it is the widest part's.
    """
    x, weights = without_filling(x, weights)
    M, device = x.shape[0], device_of(x.device)
    plans = [plan_gemm(M, weight, x.dtype, device, is_batch_invariant()) for weight in weights]
    x = in_order_of_rows(x, plans[0], weights[0])
    widest = max(range(len(weights)), key=lambda part: weights[part].N)
    tile = tuned(plans[widest], M, weights[widest], x.device).tile
    results = []
    for _, neighbours in itertools.groupby(range(len(weights)), lambda part: weights[part].scales.dtype):
        parts = list(neighbours)
        for first in range(0, len(parts), PARTS):
            chosen = parts[first : first + PARTS]
            results.append(compute(tile, [plans[i] for i in chosen], x, [weights[i] for i in chosen]))
    return results[0] if len(results) == 1 else torch.cat(results, 1)
