"""Sums at the edge of the range that gptq_gemm promises, by the emulated CUDA kernels."""

from __future__ import annotations

import pytest
import torch

from conformance.bounds import assert_within_bound
from conformance.weights import Case, build
from cuda import bounds, emulated
from emulation.emulator import reasons_against

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
