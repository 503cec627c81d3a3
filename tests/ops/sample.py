"""One sample of arguments per op, for the tests that go over all ops."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from conformance.weights import Case, build, build_experts, build_parts, experts_args, multi_args


def _gemm(case: Case, dtype: torch.dtype, M: int = 3) -> tuple[Any, ...]:
    return (torch.randn(M, case.K).to(dtype), *build(case).args)


def _gemm_multi(case: Case, dtype: torch.dtype, M: int = 3) -> tuple[Any, ...]:
    return (torch.randn(M, case.K).to(dtype), *multi_args(build_parts(case, (case.N, 2 * case.N))))


def _gemm_dx(case: Case, dtype: torch.dtype, M: int = 3) -> tuple[Any, ...]:
    return (torch.randn(M, case.N).to(dtype), *build(case).args)


def _experts(case: Case, M: int) -> tuple[Any, ...]:
    """Three experts: one without rows, and a row of none where there are several."""
    return experts_args(build_experts(case, 3), [0, M // 2, M // 2, max(M - 1, M // 2)])


def _moe_gemm(case: Case, dtype: torch.dtype, M: int = 3) -> tuple[Any, ...]:
    return (torch.randn(M, case.K).to(dtype), *_experts(case, M))


def _moe_gemm_dx(case: Case, dtype: torch.dtype, M: int = 3) -> tuple[Any, ...]:
    return (torch.randn(M, case.N).to(dtype), *_experts(case, M))


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
    "gptq_moe_gemm": _moe_gemm,
    "gptq_moe_gemm_dx": _moe_gemm_dx,
    "gptq_gemm.no_autograd": _gemm,
    "gptq_gemm_dx.no_autograd": _gemm_dx,
    "gptq_gemm_multi.no_autograd": _gemm_multi,
    "gptq_moe_gemm.no_autograd": _moe_gemm,
    "gptq_moe_gemm_dx.no_autograd": _moe_gemm_dx,
}


def op(name: str) -> Any:
    """``torch.ops.exllama.<name>``, which may be an overload."""
    return operator.attrgetter(name)(torch.ops.exllama)
