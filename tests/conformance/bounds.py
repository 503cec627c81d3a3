"""The per-element error bound that every backend is held to (Higham, Accuracy and Stability, section 3.1)."""

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
    """``relative |x| |W| + absolute``, what a sum may be wrong by before its rounding; float64.

    Args:
        x: (M, K), taken exactly.
        W: (K, N) float64, exact.
        relative: what the backend declares for its sums, e.g. gamma(depth).
        absolute: what it declares beside it, (M, N).
    """
    K = x.shape[1]
    # 2 K roundings of this float64 computation itself are covered by doubling its share. Each product and each scaling
    # of a sum may lose half of float32's smallest number.
    return (relative + gamma(2 * K, UNIT_ROUNDOFF_F64)) * (x.double().abs() @ W.abs()) + absolute + K * 2.0**-149


def error_bound(x: Tensor, W: Tensor, relative: float, absolute: Tensor | float = 0.0) -> Tensor:
    """`sum_bound`, then half an ulp of the result."""
    before_rounding = sum_bound(x, W, relative, absolute)
    return before_rounding + half_ulp((x.double() @ W).abs() + before_rounding, x.dtype)


def assert_within_bound(
    result: Tensor,
    x: Tensor,
    W: Tensor,
    relative: float,
    absolute: Tensor | float = 0.0,
    *,
    where: Tensor | None = None,
) -> None:
    """Every element of ``result``, or those of a mask, is a sum within `sum_bound` of ``x @ W``, rounded.

    Rounding keeps the order of numbers, so that a result lies between the rounded ends of the bound: it is inf where
    they are inf.
    """
    assert result.dtype == x.dtype
    assert result.shape == (x.shape[0], W.shape[1])
    assert result.is_contiguous()
    x, result = x.cpu(), result.cpu()
    exact, bound = x.double() @ W, sum_bound(x, W, relative, absolute)
    lowest, highest = ((exact + sign * bound).float().to(result.dtype) for sign in (-1, 1))
    wrong = ~((lowest <= result) & (result <= highest))
    if where is not None:
        wrong &= where
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements beyond the bound; the first, ({row}, {column}), is "
            f"{result[row, column]:.6e}, not {exact[row, column]:.6e} +- {bound[row, column]:.1e}"
        )
