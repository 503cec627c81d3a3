"""How exactly gptq_gemm multiplies on a CPU: the setting, in Python and in the native library."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Literal, cast, get_args

if TYPE_CHECKING:
    from exllama_ops.backends.cpu.library import CpuLibrary

CpuMatmulPrecision = Literal["highest", "high", "medium"]

# In the order of exllama::cpu::Precision.
PRECISIONS: tuple[str, ...] = get_args(CpuMatmulPrecision)
VARIABLE = "EXLLAMA_OPS_CPU_MATMUL_PRECISION"
DEFAULT: CpuMatmulPrecision = "high"

_libraries: list[CpuLibrary] = []
# Held while the setting or a library changes: they agree when it is free.
_lock = threading.Lock()


def _checked(precision: object, source: str) -> CpuMatmulPrecision:
    if precision not in PRECISIONS:
        raise ValueError(f"{source} must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    return cast(CpuMatmulPrecision, precision)


_precision = _checked(os.environ.get(VARIABLE) or DEFAULT, VARIABLE)


def set_cpu_matmul_precision(precision: CpuMatmulPrecision) -> None:
    """Set how exactly `gptq_gemm` multiplies on a CPU, after the model of `torch.set_float32_matmul_precision`.

    The setting holds for the process, compiled code included. It is read by every call; the environment variable
    EXLLAMA_OPS_CPU_MATMUL_PRECISION gives its first value. Where the PyTorch reference computes, its results are
    exact whatever is set. `gptq_gemm_dx` always computes in float32.

    Args:
        precision: how far the result may lie from the exact sum, beside half an ulp of its dtype, for x of any dtype.
            A span b has min(group_size, 128) rows, and x_b and w_bj are the parts of x's row and of W's column j in it:

            * "highest": float32 arithmetic, ``gamma_(K+2) |x| |W|``.
            * "high", the default: ``2**-11 * sum over b of |x_b|_2 |w_bj|_2``; where the largest of a span's |x| is
              more than 16 times their mean, ``2**-11 |x_b| |w_bj| + 2**-29 max|x_b| |w_bj|_1`` instead.
            * "medium": activations rounded to int8, per row and span: ``sum over b of max|x_b| / 127 * |w_bj|_1``.

            A result near the smallest float32 numbers may differ by ``K 2**-149`` beside that. Where a float32 sum
            overflows, or x or a scale is NaN or inf, the result is that of a float64 sum at any precision.

    Raises:
        ValueError: precision is none of these.
    """
    global _precision
    checked = _checked(precision, "set_cpu_matmul_precision: precision")
    with _lock:
        _precision = checked
        for library in _libraries:
            library.set_precision(PRECISIONS.index(_precision))


def get_cpu_matmul_precision() -> CpuMatmulPrecision:
    """What `set_cpu_matmul_precision` set."""
    return _precision


def apply_to(library: CpuLibrary) -> None:
    """Let a library follow the setting from now on."""
    with _lock:
        _libraries.append(library)
        library.set_precision(PRECISIONS.index(_precision))
