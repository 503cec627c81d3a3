"""The errors that the Triton kernels declare: of a sum, relative to |x| |W|, before its rounding."""

from __future__ import annotations

import math

from torch import Tensor

from conformance.bounds import UNIT_ROUNDOFF_F32, gamma
from conformance.weights import Weight
from exllama_ops.backends.batch_invariant import is_batch_invariant
from exllama_ops.layout.formats import FORMATS

# Tensor cores cut the terms of a sum off instead of rounding it.
TENSOR_CORE_UNIT = 2.0**-22


def gemm_error(x: Tensor, weight: Weight, *, truncates: bool) -> float:
    """Of gptq_gemm by the form that is chosen for x; ``truncates`` where it runs on tensor cores.

    The depth of a sum in gemv is a block of words, the steps of a split, the blocks of a step in halves, the splits;
    in dot a step, the steps and the splits; in float_dot, and in gemv with many groups in a block, all rows of a split.
    q - z is exact, and so is its product with x in 16 bits; scale * (q - z), and in the interpreter each product of a
    fused multiply-add, are one rounding more.
    """
    from exllama_ops.backends.triton import tiles
    from exllama_ops.backends.triton.weight import Weight as Packed

    packed = Packed.of(*weight.args)
    plan = tiles.plan_gemm(max(1, x.shape[0]), packed, x.dtype, tiles.device_of(x.device), is_batch_invariant())
    values = FORMATS[packed.bits].block_values
    step = plan.block_b * values
    if plan.form == "dot":
        unit = TENSOR_CORE_UNIT if truncates else UNIT_ROUNDOFF_F32
        return gamma(step + plan.steps_per_split + plan.splits + 2, unit)
    rows = plan.steps_per_split * (step if plan.form == "float_dot" else values)
    if plan.form == "gemv" and plan.groups_of != "row":
        rows = values + plan.steps_per_split
    return gamma(rows + int(math.log2(plan.block_b)) + plan.splits + 2)


def dx_error(N: int) -> float:
    """Of gptq_gemm_dx: a chain of N, and the rounding of the weight and of a product."""
    return gamma(N + 2)
