"""The errors that the backends declare for their sums, before the last rounding: one function per backend and op.

An error is derived from how a kernel adds, and never from its results. `exllama_ops.testing.bounds` makes a bound of
it.
A new kernel adds a function here. Its tests and benchmarks then hold the kernel to the same number.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from exllama_ops.layout.formats import FORMATS
from exllama_ops.testing.bounds import UNIT_ROUNDOFF_F32, UNIT_ROUNDOFF_F64, gamma

if TYPE_CHECKING:
    from exllama_ops.backends.triton.tiles import Plan

# Tensor cores cut the terms of a sum off instead of rounding them.
TENSOR_CORE_UNIT = 2.0**-22
# The longest run of rows, all of one group, whose activations share a scale on a CPU.
CPU_SPAN_ROWS = 128
# CUDA's `dense` algorithm rounds W: half a unit in the last place of 1.
_DENSE_ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Error(NamedTuple):
    """What a backend declares for its sums: ``relative |x| |W| + absolute``."""

    relative: float
    absolute: Tensor | float = 0.0


def reference_error(depth: int) -> Error:
    """The error of a sum of ``depth`` products, which the reference takes in float64 and rounds to float32."""
    return Error(UNIT_ROUNDOFF_F32 + gamma(depth, UNIT_ROUNDOFF_F64))


def cpu_spans(groups: Tensor, *, by_row: bool = False) -> list[Tensor]:
    """The rows of each span of the native CPU backend, as indices into ``groups``.

    Args:
        groups: (K,), the group of each row.
        by_row: whether the op looks groups up row by row, so that a span may hold rows of any group.
    """
    if by_row:
        rows = torch.arange(len(groups), dtype=torch.int64, device=groups.device)
        return list(rows.split(CPU_SPAN_ROWS))
    order = groups.argsort(stable=True)
    _, sizes = groups[order].unique_consecutive(return_counts=True)
    return [span for group in order.split(sizes.tolist()) for span in group.split(CPU_SPAN_ROWS)]


def cpu_gemm_error(precision: str, x: Tensor, W: Tensor, groups: Tensor, *, by_row: bool = False) -> Error:
    """The error of ``x @ W`` on the native CPU backend.

    Args:
        precision: "highest", "high" or "medium", as `exllama_ops.set_cpu_matmul_precision` takes it.
        x: (M, K).
        W: (K, N) float64, the exact weight in the order of x.
        groups: as `cpu_spans` takes it.
        by_row: likewise; such weights are multiplied in floats at any precision.
    """
    spans = cpu_spans(groups, by_row=by_row)
    # Any precision adds up floats: the rows of a span or its sum, then the spans, after two roundings of a factor.
    floats = gamma(max((len(rows) for rows in spans), default=0) + len(spans) + 2)
    if precision == "highest" or by_row or not spans:
        return Error(floats)
    x, W = x.double().abs(), W.abs()
    x_spans, W_spans = [x[:, rows] for rows in spans], [W[rows] for rows in spans]
    largest = torch.stack([values.amax(1) for values in x_spans], 1)  # (M, spans)
    W_sums = torch.stack([values.sum(0) for values in W_spans])  # (spans, N)
    if precision == "medium":
        # Activations become int8 times a power of two, of which one half is at most max|x| / 127.
        return Error(floats, largest / 127 @ W_sums)
    assert precision == "high", precision
    # A span without outliers has an error by the norms. In one with outliers x keeps 30 bits, and the error is that of
    # each product.
    outliers = largest > 16 * torch.stack([values.mean(1) for values in x_spans], 1)
    x_norms = torch.stack([values.norm(dim=1) for values in x_spans], 1)
    W_norms = torch.stack([values.norm(dim=0) for values in W_spans])
    error = torch.where(outliers, 0, x_norms) @ W_norms
    if outliers.any():
        span_of_row = torch.empty_like(groups, dtype=torch.int64)
        for i, rows in enumerate(spans):
            span_of_row[rows] = i
        error += torch.where(outliers[:, span_of_row], x, 0) @ W
        error += 2.0**-18 * (torch.where(outliers, largest, 0) @ W_sums)
    return Error(0.0, 2.0**-11 * error)


def cpu_dx_error(N: int) -> Error:
    """The error of ``grad @ W.T`` on the native CPU backend.

    It is a chain of N in float32 at any precision, and three roundings.
    """
    return Error(gamma(N + 3))


def cuda_gemm_error(algorithm: str, dtype: torch.dtype, *, K: int, G: int, by_row: bool = False) -> Error:
    """The error of ``x @ W`` by an algorithm of the native CUDA backend.

    One warp of ``scalar`` adds 64 rows of each stage of 256, then come a sum per group, four warps and the splits of K.
    ``mma`` is alike with 128 rows of every 512. ``pipelined`` adds 128 rows, then the units of 32 or more rows of a
    split, then the splits. In all of them (q - z) and its products with x are exact. ``tiled`` and ``dense`` are one
    chain of K, and ``dense`` rounds W first.

    Args:
        algorithm: its name in EXLLAMA_OPS_CUDA_ALGORITHM.
        dtype: of x.
        K: rows of W.
        G: groups that have rows.
        by_row: whether groups are looked up row by row, each of which then costs one rounding of the weight.
    """
    groups, splits = K if by_row else G, -(-K // 256)
    if algorithm == "scalar":
        return Error(gamma(64 * splits + groups + 4 + splits))
    if algorithm == "mma":
        return Error(gamma(128 * -(-K // 512) + groups + 4 + splits, TENSOR_CORE_UNIT))
    if algorithm == "pipelined":
        return Error(gamma(128 + -(-K // 32) + splits, TENSOR_CORE_UNIT))
    if algorithm == "tiled":
        return Error(gamma(K + 2))
    assert algorithm == "dense", algorithm
    return Error(_DENSE_ROUNDING[dtype] + gamma(K + 2))


def cuda_dx_error(algorithm: str, N: int) -> Error:
    """The error of ``grad @ W.T`` by an algorithm of the native CUDA backend.

    ``tiled`` is a chain of N, and two roundings of the weight. ``dense`` takes the weight as an exact sum of up to
    three numbers of 16 bits. Tensor cores have a chain of N for each, and two additions follow. Each number is what
    rounding to 8 bits or more left of the one before. So their sizes add up to less than 1 + 2^-6 weights.

    Args:
        algorithm: "tiled" or "dense".
        N: columns of W.
    """
    if algorithm == "tiled":
        return Error(gamma(N + 2))
    assert algorithm == "dense", algorithm
    return Error((1 + 2.0**-6) * gamma(N + 2, TENSOR_CORE_UNIT))


def triton_gemm_error(plan: Plan, bits: int, *, truncates: bool) -> Error:
    """The error of ``x @ W`` by a plan of the Triton backend, which all experts of a mixture have in common.

    ``gemv`` adds the values of a block, the steps of a split, the blocks of a step in halves, then the splits.
    ``dot`` adds the rows of a step, the steps, then the splits. ``float_dot``, and ``gemv`` where a block has many
    groups, add all rows of a split one by one. q - z is exact, and so is its product with x in 16 bits. One rounding is
    that of ``scale * (q - z)``, and one more is that of a product where the interpreter splits a multiply-add.

    Args:
        plan: as `exllama_ops.backends.triton.tiles.plan_gemm` returns it.
        bits: width of a value.
        truncates: whether ``dot`` runs on tensor cores.
    """
    values = FORMATS[bits].block_values
    step = plan.block_b * values
    if plan.form == "dot":
        unit = TENSOR_CORE_UNIT if truncates else UNIT_ROUNDOFF_F32
        return Error(gamma(step + plan.steps_per_split + plan.splits + 2, unit))
    rows = plan.steps_per_split * (step if plan.form == "float_dot" else values)
    if plan.form == "gemv" and plan.groups_of != "row":
        rows = values + plan.steps_per_split
    return Error(gamma(rows + int(math.log2(plan.block_b)) + plan.splits + 2))


def triton_dx_error(N: int) -> Error:
    """The error of ``grad @ W.T`` on the Triton backend.

    It is a chain of N, and the roundings of the weight and of a product.
    """
    return Error(gamma(N + 2))
