"""The gate before timing: each element of our results lies within the bound that the tests hold it to.

The bound is that of `exllama_ops.testing`, computed once for all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.exllama import PRECISIONS
from exllama_ops import reference
from exllama_ops.testing.bounds import UNIT_ROUNDOFF_F32, beyond_bound, bound_of_products, sum_bound
from exllama_ops.testing.errors import Error, cpu_dx_error, cpu_gemm_error

Errors = Callable[[Weight, Tensor, Tensor], Iterable[tuple[str, Error]]]


class ConformanceError(RuntimeError):
    """A result is wrong; its kernel is not timed."""


def cpu_errors(weight: Weight, x: Tensor, W: Tensor) -> list[tuple[str, Error]]:
    """What each precision of the CPU declares."""
    groups = weight.groups.long()
    return [(precision, cpu_gemm_error(precision, x, W, groups)) for precision in PRECISIONS]


class Gate:
    """The exact products of a weight, and how far results may lie from them.

    Args:
        weight: the weight.
        x: (M, K), the activations of every timing to come: a timing of fewer tokens takes its first rows.
        grad: (M, N), likewise for the gradient of x; None if that is not timed.
        errors: (weight, x, dense weight in float64) -> (precision, the error that it declares) for each kernel that
            will be checked. The default is `cpu_errors`.
        dx_error: N -> the error that gptq_gemm_dx declares. The default is that of the CPU.
    """

    def __init__(
        self,
        weight: Weight,
        x: Tensor,
        grad: Tensor | None = None,
        *,
        errors: Errors = cpu_errors,
        dx_error: Callable[[int], Error] = cpu_dx_error,
    ) -> None:
        arguments = weight.op_weight.arguments
        W = weight.dense.double()
        self.exact = reference.gptq_gemm(x.float(), *arguments).double()
        # The exact products come rounded to float32.
        rounding = UNIT_ROUNDOFF_F32 * self.exact.abs()
        products = x.double().abs() @ W.abs()
        self.bounds = {
            name: bound_of_products(products, weight.case.K, *error) + rounding for name, error in errors(weight, x, W)
        }
        if grad is not None:
            self.exact_dx = reference.gptq_gemm_dx(grad.float(), *arguments).double()
            self.bound_dx = sum_bound(grad, W.t(), *dx_error(weight.case.N)) + UNIT_ROUNDOFF_F32 * self.exact_dx.abs()

    def check(self, out: Tensor, precision: str) -> None:
        """Refuse a result of gptq_gemm: the first rows of ``x @ W``.

        Raises:
            ConformanceError: an element lies beyond the bound of the precision.
        """
        _check(f"gptq_gemm, {precision}", out, self.exact, self.bounds[precision])

    def check_dx(self, out: Tensor) -> None:
        """Refuse a result of gptq_gemm_dx: the first rows of ``grad @ W.T``.

        Raises:
            ConformanceError: an element lies beyond the bound.
        """
        _check("gptq_gemm_dx", out, self.exact_dx, self.bound_dx)


def _check(what: str, out: Tensor, exact: Tensor, bound: Tensor) -> None:
    M = out.shape[0]
    exact, bound = exact[:M], bound[:M]
    if out.shape != exact.shape:
        raise ConformanceError(f"{what}: must have shape {tuple(exact.shape)}; got {tuple(out.shape)}")
    beyond = beyond_bound(out, exact, bound)
    if beyond.any():
        row, column = divmod(int(beyond.flatten().nonzero()[0]), out.shape[1])
        raise ConformanceError(
            f"{what}: {int(beyond.sum())} of {beyond.numel()} elements lie beyond the bound, the first at "
            f"({row}, {column}): {float(out[row, column])} for {float(exact[row, column])}"
        )


def relative_error(out: Tensor, exact: Tensor) -> float:
    """``|out - exact|_F / |exact|_F``, both (M, N)."""
    return float((out.double() - exact).norm() / exact.norm())
