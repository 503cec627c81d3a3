"""Mixtures of experts on an emulated sm_80: launches, offsets that are wrong, and the rows that tiles can take."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs Triton's compiler, and TRITON_INTERPRET=1 replaces it", allow_module_level=True)

from conformance.weights import Case, Weight, build_experts, experts_args
from exllama_ops.backends.triton import experts as tiles_of_experts
from exllama_ops.backends.triton import ops
from exllama_ops.testing.bounds import assert_within_bound
from ptx_emulator.emulator import EmulationError, reasons_against
from triton_backend import bounds
from triton_backend.emulated import EmulatedDriver

emulated = pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")
SLOW = pytest.mark.slow

# Rows of none, one row, none, more than a tile, rows of none.
OFFSETS, M = (1, 2, 2, 21), 22


def check(out: Tensor, x: Tensor, experts: list[Weight]) -> None:
    assert not out[: OFFSETS[0]].any()
    assert not out[OFFSETS[-1] :].any()
    for expert, (start, stop) in zip(experts, itertools.pairwise(OFFSETS), strict=True):
        rows = slice(start, stop)
        error = bounds.gemm_error(x[rows], expert, truncates=True, tokens=len(x), experts=len(experts))
        assert_within_bound(out[rows], x[rows], expert.dense, error)


@emulated
@pytest.mark.parametrize(
    ("case", "dtype", "launches"),
    [
        (Case(4, 256, 40, 32, "perm"), torch.float16, ["gather_kernel", "dot_kernel"]),
        pytest.param(Case(4, 96, 40, 48), torch.bfloat16, ["dot_kernel"], marks=SLOW),
        pytest.param(
            Case(4, 96, 40, 16, "filled"),
            torch.float16,
            ["gather_kernel", "dot_kernel"],
            marks=SLOW,
        ),
    ],
    ids=str,
)
def test_experts_share_a_launch(device: EmulatedDriver, case: Case, dtype: torch.dtype, launches: list[str]) -> None:
    experts = build_experts(case, 3)
    x = torch.randn(M, case.K, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = ops.gptq_moe_gemm(x, *experts_args(experts, OFFSETS))
    check(out, x, experts)
    assert device.launches == launches


@emulated
@pytest.mark.parametrize("order", ["perm", pytest.param("filled", marks=SLOW)])
def test_dx_of_experts(device: EmulatedDriver, order: str) -> None:
    experts = build_experts(Case(4, 96, 40, 16, order), 3)
    grad = torch.randn(M, 40, generator=torch.Generator().manual_seed(1)).half()
    dx = ops.gptq_moe_gemm_dx(grad, *experts_args(experts, OFFSETS))
    assert not dx[: OFFSETS[0]].any()
    assert not dx[OFFSETS[-1] :].any()
    for expert, (start, stop) in zip(experts, itertools.pairwise(OFFSETS), strict=True):
        assert_within_bound(dx[start:stop], grad[start:stop], expert.dense.t(), bounds.dx_error(40))
    assert device.launches == ["gemm_dx_kernel"]


@emulated
@pytest.mark.parametrize("wrong", [(-1, 2, 2), (0, 2, 1), (0, 2, 4), (-(2**31), 0, 2**31 - 1)])
@pytest.mark.parametrize("op", ["gptq_moe_gemm", "gptq_moe_gemm_dx"])
def test_offsets_that_lead_outside_stop_the_kernel(device: EmulatedDriver, op: str, wrong: tuple[int, ...]) -> None:
    experts = build_experts(Case(4, 32, 32, 32), 2)
    with pytest.raises(EmulationError, match="expert_offsets decrease, or one leads outside"):
        getattr(ops, op)(torch.randn(3, 32).half(), *experts_args(experts, wrong))


@emulated
@pytest.mark.parametrize("op", ["gptq_moe_gemm", pytest.param("gptq_moe_gemm_dx", marks=SLOW)])
def test_an_order_that_leads_outside_stops_the_kernel(device: EmulatedDriver, op: str) -> None:
    """The order of an expert without rows is not looked at."""
    experts = build_experts(Case(4, 32, 32, 32, "perm"), 2)
    experts[0].row_order[3] = 32
    x = torch.randn(3, 32).half()
    getattr(ops, op)(x, *experts_args(experts, (0, 0, 3)))
    with pytest.raises(EmulationError, match="leads outside"):
        getattr(ops, op)(x, *experts_args(experts, (0, 1, 3)))


@pytest.mark.parametrize("block_m", [1, 2, 4])
def test_there_are_programs_for_the_most_tiles_of_rows(block_m: int) -> None:
    """Rows are cut into the runs of up to 3 experts, and those of none, in every way."""
    for tokens, E in itertools.product(range(1, 8), range(1, 4)):
        cuts = itertools.combinations_with_replacement(range(tokens + 1), E + 1)
        runs = ([stop - start for start, stop in itertools.pairwise((0, *cut, tokens))] for cut in cuts)
        most = max(sum(-(-rows // block_m) for rows in of_cut) for of_cut in runs)
        assert tiles_of_experts.row_tiles(tokens, E, block_m) == most
        assert tiles_of_experts.row_tiles(tokens, 0, block_m) == -(-tokens // block_m)
