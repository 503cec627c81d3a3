"""One sample of arguments per op, for the tests that go over all ops."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from conformance.weights import Case, build, build_parts, multi_args


def _gemm(case: Case, dtype: torch.dtype, M: int = 3) -> tuple[Any, ...]:
    return (torch.randn(M, case.K).to(dtype), *build(case).args)


def _gemm_multi(case: Case, dtype: torch.dtype, M: int = 3) -> tuple[Any, ...]:
    return (torch.randn(M, case.K).to(dtype), *multi_args(build_parts(case, (case.N, 2 * case.N))))


def _gemm_dx(case: Case, dtype: torch.dtype, M: int = 3) -> tuple[Any, ...]:
    return (torch.randn(M, case.N).to(dtype), *build(case).args)


def _dequantize(case: Case, dtype: torch.dtype, M: int = 3) -> tuple[Any, ...]:
    return build(case).args


def _shuffle(case: Case, dtype: torch.dtype, M: int = 3) -> tuple[Any, ...]:
    weight = build(case)
    return weight.qweight, weight.row_order if case.shuffled else torch.empty(0, dtype=torch.int32), case.bits


# name of the op -> its arguments for a case, an activation dtype and M tokens
SAMPLES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "gptq_shuffle": _shuffle,
    "gptq_unshuffle": _shuffle,
    "gptq_dequantize": _dequantize,
    "gptq_gemm": _gemm,
    "gptq_gemm_dx": _gemm_dx,
    "gptq_gemm_multi": _gemm_multi,
    "gptq_gemm.no_autograd": _gemm,
    "gptq_gemm_dx.no_autograd": _gemm_dx,
    "gptq_gemm_multi.no_autograd": _gemm_multi,
}


def op(name: str) -> Any:
    """``torch.ops.exllama.<name>``, which may be an overload."""
    return operator.attrgetter(name)(torch.ops.exllama)
