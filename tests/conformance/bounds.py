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


def error_bound(x: Tensor, W: Tensor, relative: float, absolute: Tensor | float = 0.0) -> Tensor:
    """``relative |x| |W| + absolute`` before the final rounding, then half an ulp of the result; float64.

    Args:
        x: (M, K), taken exactly.
        W: (K, N) float64, exact.
        relative: what the backend declares for its sums, e.g. gamma(depth).
        absolute: what it declares beside it, (M, N).
    """
    exact = x.double() @ W
    # 2 K roundings of this float64 computation itself are covered by doubling its share.
    before_rounding = (relative + gamma(2 * x.shape[1], UNIT_ROUNDOFF_F64)) * (x.double().abs() @ W.abs()) + absolute
    return before_rounding + half_ulp(exact.abs() + before_rounding, x.dtype)


def assert_within_bound(result: Tensor, x: Tensor, W: Tensor, relative: float, absolute: Tensor | float = 0.0) -> None:
    """Every element of ``result`` lies within `error_bound` of ``x @ W``."""
    assert result.dtype == x.dtype
    assert result.shape == (x.shape[0], W.shape[1])
    assert result.is_contiguous()
    x, result = x.cpu(), result.cpu()
    error = (result.double() - x.double() @ W).abs()
    excess = error - error_bound(x, W, relative, absolute)
    assert not error.isnan().any()
    assert not (excess > 0).any(), (
        f"{int((excess > 0).sum())} of {excess.numel()} elements beyond the bound, worst at "
        f"{divmod(int(excess.argmax()), W.shape[1])}: error {error.flatten()[excess.argmax()]:.3e}"
    )
