"""Nothing overflows before the final rounding, over the whole range of float32, bfloat16 and float16.

On a CPU that holds whatever x and the scales are, on a GPU for the results that stay below the limit of the README.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conformance.backends import BackendUnderTest, at_every_precision, at_every_precision_of
from conformance.extremes import Products, drawn, extremes
from conformance.weights import BLOCK_VALUES, DTYPES, Case, build, multi_args
from exllama_ops.testing.bounds import assert_within_bound
from exllama_ops.testing.errors import Error


def cases_of(
    backend: BackendUnderTest, bits: int, dtype: torch.dtype, request: pytest.FixtureRequest
) -> Iterator[Products]:
    """What was drawn, as the backend takes it."""
    products = drawn(bits, dtype)
    for one in backend.thinned(products, products[0].weight.case, request.config.getoption("slow")):
        yield one.flushed() if backend.flushes_bfloat16 else one


@at_every_precision
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BLOCK_VALUES)
def test_nothing_overflows_in_gemm_over_the_whole_range(
    backend: BackendUnderTest, bits: int, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    for products in cases_of(backend, bits, dtype, request):
        weight, x, _ = products
        on_device, x_on_device = weight.to(backend.device), x.to(backend.device)
        out = backend.ops.gptq_gemm(x_on_device, *on_device.args)
        where = None if backend.never_overflows else products.gemm_stays_below_the_limit()
        assert_within_bound(out, x, weight.dense, *backend.gemm_error(x, weight), where=where)
        if backend.parts_have_the_bits_of_gemm:
            both = backend.ops.gptq_gemm_multi(x_on_device, *multi_args([on_device, on_device]))
            torch.testing.assert_close(both, out.repeat(1, 2), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BLOCK_VALUES)
def test_nothing_overflows_in_dx_and_dequantize_over_the_whole_range(
    backend: BackendUnderTest, bits: int, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    for products in cases_of(backend, bits, dtype, request):
        weight, _, grad = products
        on_device, W = weight.to(backend.device), weight.dense
        dx = backend.ops.gptq_gemm_dx(grad.to(backend.device), *on_device.args)
        where = None if backend.never_overflows else products.dx_stays_below_the_limit()
        assert_within_bound(dx, grad, W.t(), *backend.dx_error(W.shape[1]), where=where)
        dequantized = backend.ops.gptq_dequantize(*on_device.args)
        assert torch.equal(dequantized.cpu(), W.float().to(weight.case.scales_dtype))


def not_finite(case: Case, dtype: torch.dtype) -> Products:
    """NaN and inf of each operand beside numbers whose sums overflow in float32."""
    rng = torch.Generator().manual_seed(case.bits)
    weight = build(case)
    weight = replace(weight, scales=extremes(tuple(weight.scales.shape), torch.bfloat16, rng))
    x, grad = (extremes((24, size), dtype, rng) for size in (case.K, case.N))
    for values, places in ((x, 9), (grad, 9), (weight.scales, 3)):
        at = torch.randint(0, values.numel(), (places,), generator=rng)
        values.view(-1)[at] = torch.tensor([torch.inf, -torch.inf, torch.nan]).to(values.dtype).repeat(places // 3)
    return Products(weight, x, grad)


def assert_not_finite_as_the_exact_one(result: Tensor, x: Tensor, W: Tensor, error: Error) -> None:
    exact = x.double() @ W
    assert exact.isnan().any()
    assert exact.isinf().any()
    assert exact.isfinite().any()
    assert_within_bound(result, x, W, *error, where=exact.isfinite())
    assert torch.equal(result.isnan(), exact.isnan())
    assert torch.equal(result[exact.isinf()].double(), exact[exact.isinf()])


NOT_FINITE_CASES = [
    Case(bits, 96, 64, BLOCK_VALUES[bits], order, shuffled, scales_dtype=torch.bfloat16)
    for order, shuffled in (("perm", True), ("sorted", False), ("raw", False))
    for bits in BLOCK_VALUES
]


@at_every_precision_of(NOT_FINITE_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_of_gemm_are_those_of_the_exact_product(
    backend: BackendUnderTest, case: Case, dtype: torch.dtype
) -> None:
    if not backend.never_overflows:
        pytest.skip("promised on a CPU alone")
    weight, x, _ = not_finite(case, dtype)
    out = backend.ops.gptq_gemm(x, *weight.args)
    assert_not_finite_as_the_exact_one(out, x, weight.dense, backend.gemm_error(x, weight))


@pytest.mark.parametrize("case", NOT_FINITE_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_of_dx_are_those_of_the_exact_product(
    backend: BackendUnderTest, case: Case, dtype: torch.dtype
) -> None:
    if not backend.never_overflows:
        pytest.skip("promised on a CPU alone")
    weight, _, grad = not_finite(case, dtype)
    dx = backend.ops.gptq_gemm_dx(grad, *weight.args)
    assert_not_finite_as_the_exact_one(dx, grad, weight.dense.t(), backend.dx_error(case.N))
