"""Nothing overflows before the final rounding, over the whole range of float32, bfloat16 and float16.

On a CPU that holds whatever x and the scales are, on a GPU for the results that stay below the limit of the README.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conformance.backends import BackendUnderTest
from conformance.extremes import Products, drawn, extremes
from conformance.weights import BLOCK_VALUES, DTYPES, Case, build, multi_args
from exllama_ops.testing.bounds import assert_within_bound


def check_products(backend: BackendUnderTest, products: Products) -> None:
    products = products.flushed() if backend.flushes_bfloat16 else products
    weight, x, grad = products
    on_device, W = weight.to(backend.device), weight.dense
    always = backend.never_overflows
    out = backend.ops.gptq_gemm(x.to(backend.device), *on_device.args)
    where = None if always else products.gemm_stays_below_the_limit()
    assert_within_bound(out, x, W, *backend.gemm_error(x, weight), where=where)
    if backend.parts_have_the_bits_of_gemm:
        both = backend.ops.gptq_gemm_multi(x.to(backend.device), *multi_args([on_device, on_device]))
        torch.testing.assert_close(both, out.repeat(1, 2), rtol=0, atol=0, equal_nan=True)
    dx = backend.ops.gptq_gemm_dx(grad.to(backend.device), *on_device.args)
    where = None if always else products.dx_stays_below_the_limit()
    assert_within_bound(dx, grad, W.t(), *backend.dx_error(W.shape[1]), where=where)
    dequantized = backend.ops.gptq_dequantize(*on_device.args)
    assert torch.equal(dequantized.cpu(), W.float().to(weight.case.scales_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BLOCK_VALUES)
def test_nothing_overflows_over_the_whole_range(
    backend: BackendUnderTest, bits: int, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    products = drawn(bits, dtype)
    for one in backend.thinned(products, products[0].weight.case, request.config.getoption("slow")):
        check_products(backend, one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("order", "shuffled"), [("perm", True), ("sorted", False), ("raw", False)])
def test_nan_and_inf_of_any_operand_are_those_of_the_reference(
    backend: BackendUnderTest, order: str, shuffled: bool, dtype: torch.dtype
) -> None:
    """Beside numbers whose sums overflow in float32."""
    if not backend.never_overflows:
        pytest.skip("promised on a CPU alone")
    rng = torch.Generator().manual_seed(1)
    for bits in BLOCK_VALUES:
        case = Case(bits, 96, 64, BLOCK_VALUES[bits], order, shuffled, scales_dtype=torch.bfloat16)
        weight = build(case)
        weight = replace(weight, scales=extremes(tuple(weight.scales.shape), torch.bfloat16, rng))
        x, grad = (extremes((24, size), dtype, rng) for size in (case.K, case.N))
        for values, places in ((x, 9), (grad, 9), (weight.scales, 3)):
            at = torch.randint(0, values.numel(), (places,), generator=rng)
            values.view(-1)[at] = torch.tensor([torch.inf, -torch.inf, torch.nan]).to(values.dtype).repeat(places // 3)
        W = weight.dense
        out, dx = backend.ops.gptq_gemm(x, *weight.args), backend.ops.gptq_gemm_dx(grad, *weight.args)
        for result, a, b, error in (
            (out, x, W, backend.gemm_error(x, weight)),
            (dx, grad, W.t(), backend.dx_error(case.N)),
        ):
            exact = a.double() @ b
            assert_within_bound(result, a, b, *error, where=exact.isfinite())
            assert exact.isnan().any()
            assert exact.isinf().any()
            assert exact.isfinite().any()
            assert torch.equal(result.isnan(), exact.isnan())
            assert torch.equal(result[exact.isinf()].double(), exact[exact.isinf()])
