"""A row's result is the same bits on every instruction set, at any number of threads and tokens, and run to run.

This is the strongest test of a kernel. Sums of integers and one order of float operations make it possible. A wrong
tail, a race or a value that is read twice shows in it, whatever the error bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import exllama_ops
from conformance.backends import CPU_ISAS
from conformance.conftest import cpu_isa
from conformance.weights import DTYPES, Case, build, build_experts, experts_args

PRECISIONS = ("highest", "high", "medium")
THREADS = (1, 2, 5)
TOKENS = (1, 2, 7, 16, 33, 130)
CASES = [
    Case(2, 480, 144, 32, "perm"),
    Case(3, 480, 96, 96, v2=False),
    Case(4, 1032, 200, 128),
    Case(4, 480, 1048, 24, "perm"),
    Case(4, 488, 24, 160, "raw", shuffled=False),
    Case(8, 484, 100, 128, shuffled=False, scales_dtype=torch.bfloat16),
]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), exllama_ops.get_cpu_matmul_precision()
    yield
    torch.set_num_threads(threads)
    exllama_ops.set_cpu_matmul_precision(precision)


def products(case: Case, dtype: torch.dtype, M: int = TOKENS[-1]) -> tuple[torch.Tensor, ...]:
    """gptq_gemm, gptq_gemm_dx and gptq_dequantize.

    Among the rows of x and grad some have an outlier or one sign, and some are of the largest numbers: in float32, but
    not in float16, their sums overflow.
    """
    generator = torch.Generator().manual_seed(3)
    weight = build(case)
    x = torch.randn(TOKENS[-1], case.K, generator=generator)
    x[::5, 7] = 300.0
    x[::3] = x[::3].abs()
    grad = torch.randn(TOKENS[-1], case.N, generator=generator)
    for rows in (x[1::43], grad[1::43]):
        rows.copy_(rows.sign() * torch.finfo(dtype).max)
    ops: Any = torch.ops.exllama
    return (
        ops.gptq_gemm(x[:M].to(dtype), *weight.args),
        ops.gptq_gemm_dx(grad[:M].to(dtype), *weight.args),
        ops.gptq_dequantize(*weight.args),
    )


def assert_same(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], what: str) -> None:
    for op, result, want in zip(("gptq_gemm", "gptq_gemm_dx", "gptq_dequantize"), results, expected, strict=True):
        rows = min(len(result), len(want))
        assert torch.equal(result[:rows], want[:rows]), f"{op}: {what}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_do_not_depend_on_isa_threads_or_tokens(case: Case, precision: str) -> None:
    exllama_ops.set_cpu_matmul_precision(precision)
    with cpu_isa("scalar") as library:
        isas = library.isas()
        for dtype in DTYPES:
            library.use_isa("scalar")
            torch.set_num_threads(1)
            expected = products(case, dtype)
            for isa in (isa for isa in CPU_ISAS if isas.get(isa)):
                library.use_isa(isa)
                for threads in THREADS:
                    torch.set_num_threads(threads)
                    assert_same(products(case, dtype), expected, f"{isa}, {threads} threads, {dtype}")
                for M in TOKENS:
                    assert_same(products(case, dtype, M), expected, f"{isa}, M={M}, {dtype}")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_experts_that_are_packed_in_several_batches_have_the_bits_of_gemm(precision: str) -> None:
    """A batch is as many experts as 1 MiB of packed x for each thread has, or one that has more alone."""
    exllama_ops.set_cpu_matmul_precision(precision)
    counts = [700, 0, 5, 120, 90, 1100, 3, 0, 400]
    offsets = tuple(itertools.accumulate(counts, initial=0))
    experts = build_experts(Case(4, 1024, 72, 128, "perm"), len(counts))
    x = torch.randn(offsets[-1], 1024, generator=torch.Generator().manual_seed(5)).half()
    x[::50, 7] = torch.inf
    torch.set_num_threads(2)
    out = torch.ops.exllama.gptq_moe_gemm(x, *experts_args(experts, offsets))
    for expert, (start, stop) in zip(experts, itertools.pairwise(offsets), strict=True):
        alone = torch.ops.exllama.gptq_gemm(x[start:stop], *expert.args)
        assert torch.equal(out[start:stop].view(torch.int16), alone.view(torch.int16))
