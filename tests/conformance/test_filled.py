"""Filled weights on every backend: groups of unequal sizes, and rows of the words that name no column of x."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conformance.backends import BackendUnderTest, at_every_precision, at_every_precision_of
from conformance.test_gemm import SMALL_SHAPES, activations, check_dx, check_gemm
from conformance.weights import DTYPES, Case, build, build_parts, multi_args

# Groups of whole words, of no whole words, and of more rows than a span of the CPU has.
SIZES = {2: (16, 24, 144), 3: (32, 40, 160), 4: (24, 12, 136), 8: (20, 6, 132)}
CASES = [Case(bits, *SMALL_SHAPES[bits], size, "filled", v2=size % 16 != 0) for bits in SIZES for size in SIZES[bits]]


@at_every_precision_of(CASES)
def test_gemm_is_within_the_bound(backend: BackendUnderTest, case: Case) -> None:
    weight = build(case)
    assert weight.rows > case.K
    for dtype, M in backend.thinned([(dtype, M) for dtype in DTYPES for M in (0, 1, 8, 9, 70)], case, False):
        check_gemm(backend, weight, M, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dx_is_within_the_bound(backend: BackendUnderTest, case: Case) -> None:
    weight = build(case)
    for dtype, M in backend.thinned([(dtype, M) for dtype in DTYPES for M in (0, 1, 9)], case, False):
        check_dx(backend, weight, M, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dequantize_has_the_rows_of_the_checkpoint(backend: BackendUnderTest, case: Case) -> None:
    for scales_dtype in DTYPES:
        weight = build(replace(case, scales_dtype=scales_dtype))
        out = backend.ops.gptq_dequantize(*weight.to(backend.device).args)
        assert torch.equal(out.cpu(), weight.dense.float().to(scales_dtype))


@at_every_precision_of(CASES)
def test_one_hot_x_returns_rows_of_dequantize(backend: BackendUnderTest, case: Case) -> None:
    weight = build(case).to(backend.device)
    W = backend.ops.gptq_dequantize(*weight.args)
    eye = torch.eye(case.K, dtype=case.scales_dtype, device=backend.device)
    assert torch.equal(backend.ops.gptq_gemm(eye, *weight.args), W)


@at_every_precision
@pytest.mark.parametrize("bits", SIZES)
def test_what_is_not_finite_in_x_meets_its_own_row_alone(backend: BackendUnderTest, bits: int) -> None:
    """A row that fills a group multiplies 0, wherever x has inf. A sum of inf and nothing else that is not is inf."""
    weight = build(Case(bits, *SMALL_SHAPES[bits], SIZES[bits][0], "filled"))
    K = weight.case.K
    x = torch.zeros(K, K, dtype=torch.float16).fill_diagonal_(torch.inf)
    x[-1, -1] = torch.nan
    out = backend.ops.gptq_gemm(x.to(backend.device), *weight.to(backend.device).args).cpu()
    expected = torch.where(weight.dense == 0, torch.nan, weight.dense.sign() * torch.inf)
    expected[-1] = torch.nan
    torch.testing.assert_close(out, expected.half(), rtol=0, atol=0, equal_nan=True)


@at_every_precision
def test_multi_is_gemm_of_each_part(backend: BackendUnderTest) -> None:
    parts = [part.to(backend.device) for part in build_parts(Case(4, *SMALL_SHAPES[4], 24, "filled"), (24, 64, 8))]
    for M in (1, 9):
        x = activations(M, parts[0].case.K, torch.float16).to(backend.device)
        out = backend.ops.gptq_gemm_multi(x, *multi_args(parts))
        each = torch.cat([backend.ops.gptq_gemm(x, *part.args) for part in parts], 1)
        if backend.parts_have_the_bits_of_gemm:
            assert torch.equal(out, each)
        else:
            torch.testing.assert_close(out, each)


def test_scales_of_groups_without_rows_may_follow(backend: BackendUnderTest) -> None:
    """`prepare` keeps them, for the checkpoint that a layer gives back."""
    weight = build(Case(4, *SMALL_SHAPES[4], 24, "filled"))
    more = replace(
        weight,
        scales=torch.cat([weight.scales, torch.full_like(weight.scales[:1], torch.nan)]),
        qzeros=torch.cat([weight.qzeros, weight.qzeros[:1]]),
    )
    for ours, theirs in zip(_results(backend, more), _results(backend, weight), strict=True):
        assert torch.equal(ours, theirs)


def _results(backend: BackendUnderTest, weight: object) -> list[torch.Tensor]:
    args = weight.to(backend.device).args  # type: ignore[attr-defined]
    K, N = SMALL_SHAPES[4]
    x, grad = (activations(5, size, torch.float16).to(backend.device) for size in (K, N))
    ops = backend.ops
    return [ops.gptq_gemm(x, *args), ops.gptq_gemm_dx(grad, *args), ops.gptq_dequantize(*args)]
