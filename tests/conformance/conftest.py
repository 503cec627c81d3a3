"""The backends under test, and memory that is poisoned before use."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import exllama_ops
from conformance.backends import CPU_ISAS, BackendUnderTest
from exllama_ops import backends, reference
from exllama_ops.backends.cpu.library import CpuLibrary
from exllama_ops.backends.native import cache
from exllama_ops.backends.native.compile import CPU

# Every instruction set at the default precision, and every precision on the best. Between instruction sets results are
# the same bits at any precision: tests/backends/test_cpu_bitwise.py.
_CPU: list[tuple[str, str]] = [("", "highest"), ("", "medium"), *((isa, "high") for isa in CPU_ISAS)]

# A run of its own: EXLLAMA_OPS_BACKEND=triton TRITON_INTERPRET=1 python -m pytest tests/conformance
INTERPRETED = {choice.backend.name for choice in backends.report() if choice.dispatch_key == "CPU"} == {"triton"}
# Of the parameter sets of a test, each of which takes the interpreter seconds, one in so many; by default one in three.
_ONE_IN = {
    "test_gemm_and_dx_are_within_the_bound": 19,
    "test_dequantize_is_exact_up_to_one_rounding": 7,
    "test_one_hot_x_returns_rows_of_dequantize": 21,
    "test_one_hot_grad_returns_columns_of_dequantize": 21,
    "test_columns_of_a_part_are_those_of_gemm": 7,
    "test_nothing_overflows_over_the_whole_range": 5,
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


@pytest.fixture(
    params=[pytest.param(("ops", "cpu", None), id="triton-interpreted")]
    if INTERPRETED
    else [
        pytest.param(("reference", "cpu", None), id="reference"),
        *(pytest.param(("ops", "cpu", how), id=f"ops-cpu-{how[0] or 'best'}-{how[1]}") for how in _CPU),
        pytest.param(("ops", "cuda", None), id="ops-cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> Iterator[BackendUnderTest]:
    source, device, how = request.param
    ops = reference if source == "reference" else torch.ops.exllama
    if how is None:
        yield BackendUnderTest(f"{source}-{device}", ops, device)
        return
    isa, precision = how
    with cpu_isa(isa):
        before = exllama_ops.get_cpu_matmul_precision()
        exllama_ops.set_cpu_matmul_precision(precision)
        yield BackendUnderTest(f"{source}-{device}", ops, device, precision)
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
