"""The bound for each element of a result, after Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.

A kernel declares the error of its sums before their last rounding. The bound adds the rounding of the result. No
tolerance here was chosen by looking at results.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_ROUNDOFF_F32 = 2.0**-24
UNIT_ROUNDOFF_F64 = 2.0**-53


def gamma(n: int, unit: float = UNIT_ROUNDOFF_F32) -> float:
    """``n u / (1 - n u)``: the relative error of n roundings in a row."""
    return n * unit / (1 - n * unit)


def half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the spacing of ``dtype`` at each magnitude of ``values`` (float64), subnormals included."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps / 2), exponent - 1)


def sum_bound(x: Tensor, W: Tensor, relative: float, absolute: Tensor | float = 0.0) -> Tensor:
    """``relative |x| |W| + absolute``: the error that a sum may have before it is rounded; float64.

    Args:
        x: (M, K), taken exactly.
        W: (K, N) float64, exact.
        relative: what the backend declares for its sums, for example ``gamma(depth)``.
        absolute: what it declares in addition, (M, N).
    """
    return bound_of_products(x.double().abs() @ W.abs(), x.shape[1], relative, absolute)


def bound_of_products(products: Tensor, K: int, relative: float, absolute: Tensor | float = 0.0) -> Tensor:
    """`sum_bound` where ``products = |x| |W|`` is known, float64, with its K."""
    # The float64 products have 2 K roundings of their own, and doubling their share covers them. Each product and each
    # scaling of a sum may lose half of float32's smallest number.
    return (relative + gamma(2 * K, UNIT_ROUNDOFF_F64)) * products + absolute + K * 2.0**-149


def error_bound(x: Tensor, W: Tensor, relative: float, absolute: Tensor | float = 0.0) -> Tensor:
    """`sum_bound` plus half an ulp of the result."""
    before_rounding = sum_bound(x, W, relative, absolute)
    return before_rounding + half_ulp((x.double() @ W).abs() + before_rounding, x.dtype)


def beyond_bound(result: Tensor, exact: Tensor, bound: Tensor) -> Tensor:
    """Which elements of ``result`` are no rounding of a number within ``bound`` of ``exact``; NaN always is beyond.

    Rounding keeps the order of numbers. A result therefore lies between the rounded ends of its bound, and it is inf
    where they are inf.

    Args:
        result: in the dtype of the op.
        exact: the exact results, float64.
        bound: as `sum_bound` returns it, float64.

    Returns:
        A boolean tensor.
    """
    lowest, highest = ((exact + sign * bound).float().to(result.dtype) for sign in (-1, 1))
    return ~((lowest <= result) & (result <= highest))


def assert_within_bound(
    result: Tensor,
    x: Tensor,
    W: Tensor,
    relative: float,
    absolute: Tensor | float = 0.0,
    *,
    where: Tensor | None = None,
) -> None:
    """Every element of ``result`` is a sum within `sum_bound` of ``x @ W``, rounded to the dtype of x.

    Args:
        result: (M, N), contiguous, on any device.
        x: (M, K), likewise.
        W: as `sum_bound` takes it.
        relative: likewise.
        absolute: likewise.
        where: (M, N), the elements to look at; all of them by default.

    Raises:
        AssertionError: an element is not, or the result has another dtype, shape or layout.
    """
    assert result.dtype == x.dtype
    assert result.shape == (x.shape[0], W.shape[1])
    assert result.is_contiguous()
    x, result = x.cpu(), result.cpu()
    exact, bound = x.double() @ W, sum_bound(x, W, relative, absolute)
    beyond = beyond_bound(result, exact, bound)
    if where is not None:
        beyond &= where
    if beyond.any():
        row, column = beyond.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(beyond.sum())} of {beyond.numel()} elements beyond the bound; the first, ({row}, {column}), is "
            f"{result[row, column]:.6e}, not {exact[row, column]:.6e} +- {bound[row, column]:.1e}"
        )
