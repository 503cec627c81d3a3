"""The choice of kernels and tiles, and that tiles change no bit. In Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exllama_ops.layout.formats import SUPPORTED_BITS

pytest.importorskip("triton", reason="needs Triton")

from exllama_ops.backends.triton import tiles
from exllama_ops.layout.weight import Weight

A100 = tiles.Device("sm80", 108)
T4 = tiles.Device("sm75", 40)


def weight(bits: int = 4, group_size: int = 128, order: str = "sorted", K: int = 4096, N: int = 4096) -> Weight:
    empty = torch.empty
    rows = empty(K if order != "sorted" else 0, dtype=torch.int32, device="meta")
    G = -(-K // group_size)
    return Weight.of(
        empty(K * bits // 32, N, dtype=torch.int32, device="meta"), empty(G, N * bits // 32, device="meta"),
        empty(G, N, device="meta"), rows, order != "raw", bits, True, group_size,
    )  # fmt: skip


def form(M: int, packed: Weight, dtype: torch.dtype = torch.float16, device: tiles.Device = A100) -> str:
    return tiles.plan_gemm(M, packed, dtype, device, batch_invariant=False).form


def test_forms() -> None:
    assert [form(M, weight()) for M in (1, 2, 300)] == ["gemv", "dot", "dot"]
    for slow in (
        lambda M: form(M, weight(), torch.float32),
        lambda M: form(M, weight(), device=T4),
        lambda M: form(M, weight(group_size=24)),
        lambda M: form(M, weight(order="raw")),
    ):
        assert [slow(M) for M in (1, 4, 5)] == ["gemv", "gemv", "float_dot"]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 128, 160, 4096])
def test_a_step_of_dot_lies_in_one_group(bits: int, group_size: int) -> None:
    rows = tiles.dot_rows(weight(bits, group_size))
    if rows is None:
        assert bits == 3
        assert group_size % 32
    else:
        assert rows >= 16
        assert group_size % rows == 0


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("K", [8, 128, 4096, 11008])
@pytest.mark.parametrize("M", [1, 3, 16, 100, 5000])
def test_the_splits_cover_K_once(M: int, K: int, batch_invariant: bool) -> None:
    for dtype in (torch.float16, torch.float32):
        plan = tiles.plan_gemm(M, weight(K=K), dtype, A100, batch_invariant)
        steps = -(-K // (8 * plan.block_b))
        assert (plan.splits - 1) * plan.steps_per_split < steps <= plan.splits * plan.steps_per_split


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_batch_invariant_plans_do_not_depend_on_M(dtype: torch.dtype) -> None:
    plans = [tiles.plan_gemm(M, weight(), dtype, A100, batch_invariant=True) for M in (1, 2, 17, 400)]
    # Of gemv the rows of x may differ, each of which has sums of its own.
    assert len({replace(plan, tile=plan.tile._replace(block_m=0)) for plan in plans}) == 1
    if dtype == torch.float16:
        assert len(set(plans)) == 1


def test_classes_of_devices() -> None:
    assert [tiles.arch_of_capability(major) for major in (7, 8, 9, 10, 11, 12)] == [
        "sm75", "sm80", "sm90", "sm100", "sm100", "sm80"
    ]  # fmt: skip
    names = ("gfx942:sramecc+:xnack-", "gfx1100", "gfx1201", "gfx906", "gfx1030")
    assert [tiles.arch_of_gfx(name) for name in names] == ["cdna", "rdna", "rdna", "other", "other"]


BITS = """
import itertools, torch
import exllama_ops
from conformance.weights import Case, build, build_experts, experts_args
from exllama_ops.backends.triton import gemm, tiles
from exllama_ops.layout.weight import Weight

x = torch.randn(9, 488, dtype=torch.float16)
for case, form in ((Case(4, 488, 24, 32), "dot"), (Case(4, 488, 24, 24), "gemv")):
    weight = build(case)
    # Rows of a batch
    exllama_ops.set_batch_invariant(True)
    whole = torch.ops.exllama.gptq_gemm(x, *weight.args)
    for rows in (x[:1], x[2:5]):
        start = rows.storage_offset() // 488
        assert torch.equal(torch.ops.exllama.gptq_gemm(rows, *weight.args), whole[start : start + len(rows)])
    exllama_ops.set_batch_invariant(False)
    # Tiles
    packed = Weight.of(*weight.args)
    plan = tiles.plan_gemm(9, packed, x.dtype, tiles.HOST, True)
    assert plan.form == form
    sizes = itertools.product((16, 64) if form == "dot" else (1, 4), (16, 128))
    results = [
        gemm.compute(tiles.Tile(m, n, 4, 1), [plan], x, [packed]) for m, n in sizes
    ]
    assert all(torch.equal(result, results[0]) for result in results)
# Experts
exllama_ops.set_batch_invariant(True)
experts = build_experts(Case(4, 40, 24, 16, "perm"), 3)
x = torch.randn(9, 40, dtype=torch.float16)
out = torch.ops.exllama.gptq_moe_gemm(x, *experts_args(experts, (0, 2, 2, 9)))
for rows, expert in ((slice(0, 2), experts[0]), (slice(2, 9), experts[2])):
    assert torch.equal(out[rows], torch.ops.exllama.gptq_gemm(x[rows], *expert.args))
print("the same bits")
"""


def test_neither_tiles_nor_a_batch_change_a_bit() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "EXLLAMA_OPS_BACKEND": "triton"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    result = subprocess.run([sys.executable, "-c", BITS], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "the same bits\n", result.stderr
