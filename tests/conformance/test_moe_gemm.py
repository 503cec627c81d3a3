"""The products of several experts on every backend: each row has the numerics of gptq_gemm by its expert's weight."""

from __future__ import annotations

import functools
import itertools
import zlib

import pytest
import torch
from torch import Tensor

from conformance.backends import BackendUnderTest, at_every_precision, at_every_precision_of
from conformance.test_gemm import SMALL_SHAPES, activations
from conformance.weights import DTYPES, Case, Weight, build_experts, experts_args
from exllama_ops.testing.bounds import assert_within_bound

# Rows before and after all, no rows at once, one row, rows of a GEMV, of words and of panels, and no rows at last.
OFFSETS = (2, 2, 3, 11, 11, 30, 98, 98)
M = 101
E = len(OFFSETS) - 1
ORDERS = [("sorted", True), ("perm", True), ("sorted", False), ("raw", False)]
CASES = [
    Case(bits, *SMALL_SHAPES[bits], size, order, shuffled, v2=size != 16)
    for bits in SMALL_SHAPES
    for size in (16, 24)
    for order, shuffled in ORDERS
]
CASES += [Case(bits, *SMALL_SHAPES[bits], 16, "filled") for bits in SMALL_SHAPES]


def some_dtypes(case: Case) -> tuple[torch.dtype, ...]:
    """One, another for each case: which it is does not depend on the expert. tests/conformance/test_gemm.py has all."""
    return (DTYPES[zlib.crc32(str(case).encode()) % len(DTYPES)],)


@functools.lru_cache(maxsize=4)
def shared(case: Case) -> list[Weight]:
    """Experts for `OFFSETS`, of all backends. No test may write to them."""
    return build_experts(case, E)


def own_rows(offsets: tuple[int, ...] = OFFSETS) -> list[slice]:
    return [slice(start, stop) for start, stop in itertools.pairwise(offsets)]


def on_device(
    backend: BackendUnderTest, experts: list[Weight], offsets: tuple[int, ...] = OFFSETS
) -> tuple[object, ...]:
    return experts_args([expert.to(backend.device) for expert in experts], offsets)


def assert_rows_of_none_are_zero(out: Tensor) -> None:
    outside = torch.cat([out[: OFFSETS[0]], out[OFFSETS[-1] :]])
    assert len(outside) == M - OFFSETS[-1] + OFFSETS[0]
    assert not outside.any()


@at_every_precision_of(CASES)
def test_rows_are_within_the_bound_of_their_experts_product(backend: BackendUnderTest, case: Case) -> None:
    experts = shared(case)
    for dtype in some_dtypes(case):
        x = activations(M, case.K, dtype)
        out = backend.ops.gptq_moe_gemm(x.to(backend.device), *on_device(backend, experts)).cpu()
        assert_rows_of_none_are_zero(out)
        for expert, rows in zip(experts, own_rows(), strict=True):
            assert_within_bound(out[rows], x[rows], expert.dense, *backend.gemm_error(x[rows], expert, M, E))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dx_is_within_the_bound_of_its_experts_product(backend: BackendUnderTest, case: Case) -> None:
    experts = shared(case)
    for dtype in some_dtypes(case):
        grad = activations(M, case.N, dtype)
        dx = backend.ops.gptq_moe_gemm_dx(grad.to(backend.device), *on_device(backend, experts)).cpu()
        assert_rows_of_none_are_zero(dx)
        for expert, rows in zip(experts, own_rows(), strict=True):
            assert_within_bound(dx[rows], grad[rows], expert.dense.t(), *backend.dx_error(case.N))


@at_every_precision
@pytest.mark.parametrize("bits", SMALL_SHAPES)
@pytest.mark.parametrize("order", ["sorted", "perm", "filled"])
def test_rows_have_the_bits_of_gemm(backend: BackendUnderTest, bits: int, order: str) -> None:
    experts = shared(Case(bits, *SMALL_SHAPES[bits], 8, order))
    if not backend.experts_have_the_bits_of_gemm:
        pytest.skip("the backend adds up the products of experts in another order")
    for dtype in DTYPES:
        x = activations(M, experts[0].case.K, dtype).to(backend.device)
        grad = activations(M, experts[0].case.N, dtype).to(backend.device)
        out = backend.ops.gptq_moe_gemm(x, *on_device(backend, experts))
        dx = backend.ops.gptq_moe_gemm_dx(grad, *on_device(backend, experts))
        for expert, rows in zip(experts, own_rows(), strict=True):
            args = expert.to(backend.device).args
            assert torch.equal(out[rows], backend.ops.gptq_gemm(x[rows].contiguous(), *args))
            assert torch.equal(dx[rows], backend.ops.gptq_gemm_dx(grad[rows].contiguous(), *args))


@at_every_precision
def test_one_hot_x_returns_rows_of_each_expert(backend: BackendUnderTest) -> None:
    experts = build_experts(Case(4, *SMALL_SHAPES[4], 8, "perm"), 3)
    K = experts[0].case.K
    x = torch.eye(K, dtype=torch.float16).repeat(3, 1).to(backend.device)
    out = backend.ops.gptq_moe_gemm(x, *on_device(backend, experts, (0, K, 2 * K, 3 * K))).cpu()
    assert torch.equal(out, torch.cat([expert.dense for expert in experts]).half())


@at_every_precision
def test_what_is_not_finite_stays_in_its_rows(backend: BackendUnderTest) -> None:
    """Neither the rows of other experts see it, nor those of the same one, nor do those of none get it."""
    experts = build_experts(Case(4, *SMALL_SHAPES[4], 8), E)
    x = activations(M, experts[0].case.K, torch.float16)
    clean = backend.ops.gptq_moe_gemm(x.to(backend.device), *on_device(backend, experts)).cpu()
    bad = [0, 2, 5, 50, M - 1]
    x[bad, 3] = torch.tensor([torch.nan, torch.inf, torch.nan, torch.inf, torch.nan], dtype=torch.float16)
    out = backend.ops.gptq_moe_gemm(x.to(backend.device), *on_device(backend, experts)).cpu()
    assert not out[bad[1:4]].isfinite().any(1).all()
    bad_rows = torch.zeros(M, dtype=torch.bool).index_fill_(0, torch.tensor(bad[1:4]), True)
    assert torch.equal(out[~bad_rows], clean[~bad_rows])


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_one_expert_is_gemm_and_no_rows_are_none(backend: BackendUnderTest, tokens: int) -> None:
    (expert,) = build_experts(Case(4, *SMALL_SHAPES[4], 8), 1)
    x = activations(tokens, expert.case.K, torch.bfloat16).to(backend.device)
    out = backend.ops.gptq_moe_gemm(x, *on_device(backend, [expert], (0, tokens)))
    assert torch.equal(out, backend.ops.gptq_gemm(x, *expert.to(backend.device).args))
    nothing = backend.ops.gptq_moe_gemm(x, *on_device(backend, [expert], (tokens, tokens)))
    assert nothing.shape == out.shape
    assert not nothing.any()


def test_hundreds_of_experts_of_which_few_have_rows(backend: BackendUnderTest) -> None:
    """The orders and scales of experts without rows are not read."""
    experts = build_experts(Case(4, 16, 8, 8, "perm"), 512)
    for i, expert in enumerate(experts):
        if i not in (7, 300, 511):
            expert.row_order.fill_(-5)
            expert.scales.fill_(torch.nan)
    offsets = [1] * 8 + [4] * 293 + [5] * 211 + [10]
    assert len(offsets) == 513
    x = activations(11, 16, torch.float32)
    out = backend.ops.gptq_moe_gemm(x.to(backend.device), *on_device(backend, experts, tuple(offsets))).cpu()
    assert not out[[0, 10]].any()
    for i, rows in ((7, slice(1, 4)), (300, slice(4, 5)), (511, slice(5, 10))):
        assert_within_bound(out[rows], x[rows], experts[i].dense, *backend.gemm_error(x[rows], experts[i], 11, 512))
