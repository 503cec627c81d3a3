"""The gate before timing: each element of our results lies within its bound.

The bound is that of tests/conformance (backends.py, bounds.py), restated for the weights of `benchmarks.cases`, whose
groups are whole, and computed for all tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.cases import Weight
from exllama_ops import reference

# Rows of a block, of which activations share a scale, at most.
BLOCK_ROWS = 128
UNIT_ROUNDOFF = 2.0**-24

Errors = Callable[[Weight, Tensor, Tensor], Iterable[tuple[str, Tensor]]]


class ConformanceError(RuntimeError):
    """A result is wrong; its kernel is not timed."""


def gamma(n: int, unit: float = UNIT_ROUNDOFF) -> float:
    """``n u / (1 - n u)``, the relative error of n roundings in a row, to float32 by default (Higham, section 3.1)."""
    return n * unit / (1 - n * unit)


def half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the spacing of ``dtype`` at each magnitude of ``values`` (float64), subnormals included."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps / 2), exponent - 1)


def cpu_errors(weight: Weight, x: Tensor, W: Tensor) -> list[tuple[str, Tensor]]:
    """Of each precision of the CPU, before the final rounding: (M, N) float64."""
    K = weight.case.K
    size = min(weight.case.group_size, BLOCK_ROWS)
    order = weight.packed.perm.long() if weight.case.act_order else torch.arange(K)
    x, W = x.double().abs()[:, order], W[order].abs()
    x_blocks, W_blocks = x.unflatten(1, (-1, size)), W.unflatten(0, (-1, size))
    outliers = x_blocks.amax(2) > 16 * x_blocks.mean(2)
    by_norms = (x_blocks.norm(dim=2) * ~outliers) @ W_blocks.norm(dim=1)
    by_elements = (x_blocks * outliers.unsqueeze(2)).flatten(1) @ W if outliers.any() else 0.0
    floats = gamma(size + K // size + 2) * (x @ W)
    return [
        ("highest", floats),
        ("high", 2.0**-11 * (by_norms + by_elements)),
        ("medium", x_blocks.amax(2) / 127 @ W_blocks.sum(1) + floats),
    ]


class Gate:
    """The exact products of a weight, and how far results may lie from them.

    Args:
        weight: the weight.
        x: (M, K), the activations of every timing to come: a timing of fewer tokens takes its first rows.
        grad: (M, N), likewise for the gradient of x; None if that is not timed.
        errors: (weight, x, dense weight in float64) -> (precision, (M, N) float64) for each kernel that will be
            checked: the error of its sums. By default those of the CPU's precisions.
        dx_roundings: those in a sum of gptq_gemm_dx beside the N of its chain; by default the CPU's.
    """

    def __init__(
        self,
        weight: Weight,
        x: Tensor,
        grad: Tensor | None = None,
        *,
        errors: Errors = cpu_errors,
        dx_roundings: int = 3,
    ) -> None:
        arguments = weight.arguments()
        W = weight.dense.double()
        self.exact = reference.gptq_gemm(x.float(), *arguments).double()
        self.errors = {precision: error + UNIT_ROUNDOFF * self.exact.abs() for precision, error in errors(weight, x, W)}
        if grad is not None:
            self.exact_dx = reference.gptq_gemm_dx(grad.float(), *arguments).double()
            self.error_dx = gamma(weight.case.N + dx_roundings) * (grad.double().abs() @ W.t().abs())
            self.error_dx += UNIT_ROUNDOFF * self.exact_dx.abs()

    def check(self, out: Tensor, precision: str) -> None:
        """Refuse a result of gptq_gemm: the first rows of ``x @ W``.

        Raises:
            ConformanceError: an element lies beyond the bound of the precision.
        """
        _check(f"gptq_gemm, {precision}", out, self.exact, self.errors[precision])

    def check_dx(self, out: Tensor) -> None:
        """Refuse a result of gptq_gemm_dx: the first rows of ``grad @ W.T``.

        Raises:
            ConformanceError: an element lies beyond the bound.
        """
        _check("gptq_gemm_dx", out, self.exact_dx, self.error_dx)


def _check(what: str, out: Tensor, exact: Tensor, error: Tensor) -> None:
    M = out.shape[0]
    exact, error = exact[:M], error[:M]
    if out.shape != exact.shape:
        raise ConformanceError(f"{what}: must have shape {tuple(exact.shape)}; got {tuple(out.shape)}")
    # Not `excess > 0`: NaN is beyond every bound.
    within = (out.double() - exact).abs() <= error + half_ulp(exact.abs() + error, out.dtype)
    if not within.all():
        row, column = divmod(int((~within).flatten().nonzero()[0]), out.shape[1])
        raise ConformanceError(
            f"{what}: {int((~within).sum())} of {within.numel()} elements lie beyond the bound, the first at "
            f"({row}, {column}): {float(out[row, column])} for {float(exact[row, column])}"
        )


def relative_error(out: Tensor, x: Tensor, dense: Tensor) -> float:
    """``|out - x W|_F / |x W|_F`` against float64.

    Args:
        out: (M, N).
        x: (M, K).
        dense: (K, N).
    """
    exact = x.double() @ dense.double()
    return float((out.double() - exact).norm() / exact.norm())
