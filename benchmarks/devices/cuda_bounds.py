"""How far results of our kernels on a GPU may lie from the exact ones.

The bounds are those of tests/cuda/bounds.py and tests/triton_backend/bounds.py, restated for the weights of
`benchmarks.cases`, whose groups are whole and whose words are shuffled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.conformance import UNIT_ROUNDOFF, Gate, gamma
from benchmarks.peers.exllama_cuda import ALGORITHMS, AUTO
from exllama_ops.backends.batch_invariant import is_batch_invariant
from exllama_ops.backends.triton import tiles
from exllama_ops.backends.triton.weight import Weight as TritonWeight
from exllama_ops.layout.formats import FORMATS

TRITON = "triton"
# Tensor cores cut the terms of a sum off instead of rounding it.
TENSOR_CORE_UNIT = 2.0**-22
# Half a unit in the last place of what `dense` rounds W to.
_WEIGHT_ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# A chain of N and the roundings of the weight.
_DX_ROUNDINGS = 2


def cuda_gate(
    weight: Weight, x: Tensor, grad: Tensor | None, tokens: Sequence[int], triton_device: tiles.Device
) -> Gate:
    """The gate for every algorithm of the native library, for its own choice, and for Triton.

    Args:
        weight: on the host.
        x: as `Gate` takes it.
        grad: likewise.
        tokens: numbers of rows of x that will be timed, by which Triton chooses its form.
        triton_device: what it knows of the GPU.
    """

    def errors(weight: Weight, x: Tensor, W: Tensor) -> Iterator[tuple[str, Tensor]]:
        products = x.double().abs() @ W.abs()
        able = ("scalar", "tiled") if x.dtype == torch.float32 else ALGORITHMS
        relative = {algorithm: native_error(algorithm, weight, x.dtype) for algorithm in able}
        relative[AUTO] = max(relative.values())
        relative[TRITON] = max(triton_error(weight, x.dtype, M, triton_device) for M in tokens)
        for name, error in relative.items():
            yield name, error * products

    return Gate(weight, x, grad, errors=errors, dx_roundings=_DX_ROUNDINGS)


def native_error(algorithm: str, weight: Weight, dtype: torch.dtype) -> float:
    """Of gptq_gemm by an algorithm, relative to |x| |W|, before the final rounding."""
    K, groups = weight.case.K, weight.scales.shape[0]
    splits = -(-K // 256)
    if algorithm == "scalar":
        return gamma(64 * splits + groups + 4 + splits)
    if algorithm == "mma":
        return gamma(128 * -(-K // 512) + groups + 4 + splits, TENSOR_CORE_UNIT)
    if algorithm == "tiled":
        return gamma(K + 2)
    return _WEIGHT_ROUNDING[dtype] + gamma(K + 2)


def triton_error(weight: Weight, dtype: torch.dtype, M: int, device: tiles.Device) -> float:
    """Of gptq_gemm by the form that Triton chooses for M tokens, likewise."""
    packed = TritonWeight.of(*weight.arguments())
    plan = tiles.plan_gemm(M, packed, dtype, device, is_batch_invariant())
    values = FORMATS[packed.bits].block_values
    step = plan.block_b * values
    if plan.form == "dot":
        unit = UNIT_ROUNDOFF if device.arch == "host" else TENSOR_CORE_UNIT
        return gamma(step + plan.steps_per_split + plan.splits + 2, unit)
    rows = plan.steps_per_split * (step if plan.form == "float_dot" else values)
    if plan.form == "gemv" and plan.groups_of != "row":
        rows = values + plan.steps_per_split
    return gamma(rows + int(math.log2(plan.block_b)) + plan.splits + 2)
