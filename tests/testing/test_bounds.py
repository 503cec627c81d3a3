"""The bounds that every result is held to: their formulas in exact arithmetic, and faults that they must show."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from exllama_ops.testing.bounds import (
    UNIT_ROUNDOFF_F32,
    UNIT_ROUNDOFF_F64,
    assert_within_bound,
    beyond_bound,
    error_bound,
    gamma,
    half_ulp,
    sum_bound,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("unit", "digits"), [(UNIT_ROUNDOFF_F32, 24), (UNIT_ROUNDOFF_F64, 53)])
def test_gamma_is_the_fraction_of_its_formula(unit: float, digits: int) -> None:
    for n in (0, 1, 7, 4096, 10**6):
        exact = Fraction(n, 2**digits) / (1 - Fraction(n, 2**digits))
        assert gamma(n, unit) == pytest.approx(float(exact), rel=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_ulp_is_half_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        patterns = torch.randint(0, 0x7F7FFFFF, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    else:  # every finite one
        patterns = torch.arange(int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16))).short()
    values, following = patterns.view(dtype).double(), (patterns + 1).view(dtype).double()
    assert torch.equal(half_ulp(values, dtype), (following - values) / 2)
    assert torch.equal(half_ulp(-values, dtype), (following - values) / 2)


def test_the_bound_of_a_sum_is_that_of_its_formula_term_by_term() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float16)
    W = torch.tensor([[3.0, -1.0], [0.25, 4.0], [-8.0, 2.0]], dtype=torch.float64)
    products = torch.tensor([[3 + 0.5 + 4, 1 + 8 + 1]], dtype=torch.float64)
    bound = sum_bound(x, W, 2.0**-10, 0.125)
    torch.testing.assert_close(bound, products * 2.0**-10 + 0.125, rtol=1e-12, atol=0)
    exact = torch.tensor([[-1.5, -8.0]], dtype=torch.float64)
    expected = bound + half_ulp(exact.abs() + bound, torch.float16)
    torch.testing.assert_close(error_bound(x, W, 2.0**-10, 0.125), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_between_the_rounded_ends_is_within_and_its_neighbours_are_beyond(dtype: torch.dtype) -> None:
    exact = torch.tensor([1.0], dtype=torch.float64)
    ulp = torch.finfo(dtype).eps
    for steps, expected in ((-4, True), (-2, False), (0, False), (1, False), (2, True)):
        # Numbers below 1 lie half as far apart.
        result = (exact + steps * (ulp if steps > 0 else ulp / 2)).to(dtype)
        assert beyond_bound(result, exact, torch.tensor([1.25 * ulp], dtype=torch.float64)).item() == expected, steps


def test_nan_is_beyond_and_inf_is_where_the_ends_are_inf() -> None:
    exact = torch.tensor([1.0, 70000.0, 1.0, -70000.0], dtype=torch.float64)
    result = torch.tensor([torch.nan, torch.inf, torch.inf, torch.inf], dtype=torch.float16)
    assert beyond_bound(result, exact, torch.ones(4, dtype=torch.float64)).tolist() == [True, False, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_product_that_is_left_out_is_beyond_the_bound(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(4, 256, generator=generator).to(dtype), torch.randn(256, 8, generator=generator).double()
    right = (x.double() @ W).float().to(dtype)
    assert_within_bound(right, x, W, gamma(256))
    largest = (x[1].double().abs() * W[:, 3].abs()).argmax()
    wrong = right.clone()
    wrong[1, 3] -= float(x[1, largest].double() * W[largest, 3])
    with pytest.raises(AssertionError, match=r"^1 of 32 elements beyond the bound; the first, \(1, 3\), is"):
        assert_within_bound(wrong, x, W, gamma(256))
    elsewhere = torch.ones(4, 8, dtype=torch.bool)
    elsewhere[1, 3] = False
    assert_within_bound(wrong, x, W, gamma(256), where=elsewhere)


def test_a_result_of_another_dtype_shape_or_layout_is_refused() -> None:
    x, W = torch.ones(2, 4), torch.ones(4, 2, dtype=torch.float64)
    for wrong in (torch.full((2, 2), 4.0).double(), torch.full((2, 1), 4.0), torch.full((4, 2), 4.0)[::2]):
        with pytest.raises(AssertionError):
            assert_within_bound(wrong, x, W, 1.0)
