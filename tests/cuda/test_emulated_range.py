"""Sums within the range that README promises of a GPU, and at its edge, by the emulated CUDA kernels."""

from __future__ import annotations

import itertools

import pytest
import torch

from conformance.extremes import drawn
from conformance.weights import DTYPES, Case, build
from cuda import bounds, emulated
from cuda.test_emulated import ALGORITHMS, can
from exllama_ops.testing.bounds import assert_within_bound
from ptx_emulator.emulator import reasons_against

pytestmark = pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")


@pytest.mark.parametrize("algorithm", ["scalar", "mma", "tiled"])
def test_sums_are_finite_up_to_the_promised_range(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 x, and a group's sum of |x| * 2**bits just below 2**127, before its scale makes less of it."""
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
    bits, K, N = 4, 256, 72
    weight = build(Case(bits, K, N, 128), q=torch.full((K, N), 2**bits - 1))
    weight.scales.fill_(2.0**-14)
    x = torch.full((2, K), 0.99 * 2.0**127 / (2**bits * 128)).bfloat16()
    out = emulated.ops(80).gptq_gemm(x, *weight.args)
    assert out.isfinite().all()
    assert_within_bound(out, x, weight.dense, bounds.gemm_error(algorithm, weight, x.dtype))


@pytest.mark.parametrize(
    ("algorithm", "dtype"),
    [(a, d) for a, d in itertools.product(ALGORITHMS, DTYPES) if can(a, 80, Case(4, 128, 80, 32), d)],
)
def test_sums_below_the_limit_are_within_the_bound(
    algorithm: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
    inside = 0
    for one in drawn(4, dtype):
        weight, x, _ = one
        if not can(algorithm, 80, weight.case, dtype):
            continue
        where, absolute = one.gemm_stays_below_the_limit(), 0.0
        if algorithm == "dense":
            # W is rounded to the dtype of x, subnormals too.
            where &= (weight.dense.abs() < torch.finfo(dtype).max).all(0)
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            absolute = x.double().abs().sum(1, keepdim=True) * smallest / 2
        out = emulated.ops(80).gptq_gemm(x, *weight.args)
        assert_within_bound(out, x, weight.dense, bounds.gemm_error(algorithm, weight, dtype), absolute, where=where)
        inside += int(where.sum())
    assert inside > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_dx_below_the_limit_are_within_the_bound(dtype: torch.dtype) -> None:
    for one in drawn(4, dtype):
        weight, _, grad = one
        dx = emulated.ops(80).gptq_gemm_dx(grad, *weight.args)
        error = bounds.dx_error(weight.case.N)
        assert_within_bound(dx, grad, weight.dense.t(), error, where=one.dx_stays_below_the_limit())
