"""The backends under test, and memory that is poisoned before use."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import exllama_ops
from conformance.backends import BACKENDS, INTERPRETED, BackendUnderTest, OnEveryIsa
from exllama_ops import backends, reference
from exllama_ops.backends.cpu.library import CpuLibrary
from exllama_ops.backends.native import cache
from exllama_ops.backends.native.compile import CPU

# Each parameter set of a test takes Triton's interpreter seconds. It runs one in so many, and one in three by default.
_ONE_IN = {
    "test_gemm_is_within_the_bound": 19,
    "test_dx_is_within_the_bound": 19,
    "test_dequantize_is_exact_up_to_one_rounding": 7,
    "test_one_hot_x_returns_rows_of_dequantize": 21,
    "test_one_hot_grad_returns_columns_of_dequantize": 21,
    "test_columns_of_a_part_are_those_of_gemm": 7,
    "test_rows_are_within_the_bound_of_their_experts_product": 5,
    "test_dx_is_within_the_bound_of_its_experts_product": 5,
    "test_nothing_overflows_in_gemm_over_the_whole_range": 5,
    "test_nothing_overflows_in_dx_and_dequantize_over_the_whole_range": 5,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow what the interpreter has no time for."""
    if not INTERPRETED:
        return
    seen: Counter[str] = Counter()
    for item in items:
        name = item.originalname if isinstance(item, pytest.Function) else item.name
        if seen[name] % _ONE_IN.get(name, 3):
            item.add_marker(pytest.mark.slow)
        seen[name] += 1


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[BackendUnderTest]:
    source, device, precision = request.param
    if precision is None:
        ops = reference if source == "reference" else torch.ops.exllama
        yield BackendUnderTest(f"{source}-{device}", ops, device)
        return
    with cpu_isa("") as library:
        before = exllama_ops.get_cpu_matmul_precision()
        exllama_ops.set_cpu_matmul_precision(precision)
        yield BackendUnderTest(f"{source}-{device}", OnEveryIsa(library), device, precision)
        exllama_ops.set_cpu_matmul_precision(before)


@contextmanager
def cpu_isa(isa: str) -> Iterator[CpuLibrary]:
    """The native CPU library with an instruction set in use, "" for the best; skips where it or the CPU has it not."""
    native = backends.cpu.BACKEND
    native.build()
    if native.library is None:
        if not cache.reasons_against_building(CPU):
            pytest.fail(f"the native CPU library could be built here, and was not: {native.failure}")
        pytest.skip(f"needs the native CPU library: {native.failure[0].splitlines()[0]}")
    if isa and not native.library.isas().get(isa):
        pytest.skip(f"needs a CPU with {isa}")
    native.library.use_isa(isa)
    yield native.library
    native.library.use_isa(os.environ.get("EXLLAMA_OPS_CPU_ISA", ""))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN and the largest integers, so that a read of unwritten memory shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
