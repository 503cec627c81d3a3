"""The compiled kernels on an emulated sm_80, by the launch code that a GPU gets: what ships is what is tested."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs Triton's compiler, and TRITON_INTERPRET=1 replaces it", allow_module_level=True)

from conformance.weights import Case, build, build_parts, multi_args
from exllama_ops.backends.triton import gemm, gemm_dx, ops, tiles, tuned_tiles
from exllama_ops.layout.weight import Weight as Packed
from exllama_ops.testing.bounds import assert_within_bound
from ptx_emulator.emulator import EmulationError, reasons_against
from triton_backend import bounds
from triton_backend.emulated import A100, EmulatedDriver

pytestmark = pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")

SHAPES = {2: (592, 80), 3: (544, 96), 4: (552, 72), 8: (548, 68)}


def on(bits: int, size: int, order: str, M: int, dtype: torch.dtype, form: str, *, quick: bool, **options: Any) -> Any:
    shape = options.pop("shape", SHAPES[bits])
    case = Case(bits, *shape, size, order, order != "raw", **options)
    name = f"{case}-M{M}-{str(dtype).removeprefix('torch.')}-{form}"
    return pytest.param(case, M, dtype, form, id=name, marks=[] if quick else [pytest.mark.slow])


GEMMS = [
    on(bits, size, order, M, dtype, form, quick=bits == 4 and (order, M) in quick)
    for bits in SHAPES
    for size, order, M, dtype, form, quick in [
        (128, "perm", 1, torch.float16, "gemv", [("perm", 1)]),
        (128, "perm", 5, torch.float16, "dot", []),
        (128, "sorted", 70, torch.bfloat16, "dot", []),
        (32, "sorted", 20, torch.bfloat16, "dot", []),
        (24, "raw", 3, torch.float16, "gemv", []),
        (24, "raw", 6, torch.float32, "float_dot", []),
    ]
]
# K and N that 16 divides, as models have them, which is another kernel; and zero points of v1.
GEMMS += [
    on(4, 128, "perm", 5, torch.bfloat16, "dot", quick=True, shape=(576, 96), v2=False),
    on(3, 128, "sorted", 1, torch.float16, "gemv", quick=False, shape=(576, 96), v2=False),
    on(2, 64, "raw", 4, torch.bfloat16, "gemv", quick=False, shape=(576, 96), v2=False),
]


@pytest.mark.parametrize(("case", "M", "dtype", "form"), GEMMS)
def test_gemm_is_within_the_bound(device: EmulatedDriver, case: Case, M: int, dtype: torch.dtype, form: str) -> None:
    weight = build(case)
    x = torch.randn(M, case.K, generator=torch.Generator().manual_seed(1)).to(dtype)
    for device.truncates in (False, True):
        out = ops.gptq_gemm(x, *weight.args)
        assert_within_bound(out, x, weight.dense, bounds.gemm_error(x, weight, truncates=True))
    assert device.launches[0] == ("gemv_kernel" if form == "gemv" else "dot_kernel")


@pytest.mark.parametrize(("M", "order"), [(1, "sorted"), pytest.param(5, "perm", marks=pytest.mark.slow)])
def test_parts_share_a_launch_and_have_the_bits_of_gemm(device: EmulatedDriver, M: int, order: str) -> None:
    K, columns = 2048, [96, 32, 160]
    parts = build_parts(Case(4, K, columns[0], 128, order), columns)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).half()
    out = ops.gptq_gemm_multi(x, *multi_args(parts))
    assert len(device.launches) == 1
    assert len({tiles.plan_gemm(M, Packed.of(*part.args), x.dtype, A100, False).splits for part in parts}) > 1
    for part, result in zip(parts, out.split(columns, 1), strict=True):
        assert torch.equal(result, ops.gptq_gemm(x, *part.args))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "M"), [("gemv", 1), ("dot", 5), ("dx", 5)])
def test_no_candidate_changes_a_bit_of_compiled_code(device: EmulatedDriver, form: str, M: int) -> None:
    """The interpreter knows no warps and no layouts, in which a compiled kernel could add otherwise."""
    packed = Packed.of(*build(Case(4, 1024, 96, 128)).args)
    x = torch.randn(M, packed.N if form == "dx" else packed.K, generator=torch.Generator().manual_seed(1)).half()
    device.truncates = True
    if form == "dx":
        dx_plan = tiles.plan_dx(4, A100)
        choices = tuned_tiles.candidates(form, "sm80", dx_plan.tile)
        results = [gemm_dx.compute_dx(replace(dx_plan, tile=tile), x, packed) for tile in choices]
    else:
        plan = tiles.plan_gemm(M, packed, x.dtype, A100, False)
        assert plan.form == form
        choices = tuned_tiles.candidates(form, "sm80", plan.tile)
        results = [gemm.compute(tile, [plan], x, [packed]) for tile in choices]
    assert len(choices) > 3
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("bits", [pytest.param(b, marks=[] if b == 4 else [pytest.mark.slow]) for b in SHAPES])
def test_the_other_ops(device: EmulatedDriver, bits: int) -> None:
    case = Case(bits, *SHAPES[bits], 128, "perm")
    weight = build(case)
    assert torch.equal(ops.gptq_dequantize(*weight.args), weight.dense.half())
    checkpoint = build(Case(**{**vars(case), "shuffled": False})).qweight
    words = checkpoint.clone()
    ops.gptq_shuffle(words, weight.row_order, bits)
    assert torch.equal(words, weight.qweight)
    assert torch.equal(ops.gptq_unshuffle(words, weight.row_order, bits), checkpoint)
    grad = torch.randn(3, case.N).half()
    assert_within_bound(ops.gptq_gemm_dx(grad, *weight.args), grad, weight.dense.t(), bounds.dx_error(case.N))


@pytest.mark.parametrize("wrong", [-1, 552])
@pytest.mark.parametrize("op", ["gptq_gemm", "gptq_gemm_dx", "gptq_dequantize", "gptq_shuffle"])
def test_a_permutation_that_leads_outside_stops_the_kernel(device: EmulatedDriver, op: str, wrong: int) -> None:
    weight = build(Case(4, *SHAPES[4], 128, "perm"))
    weight.row_order[7] = wrong
    arguments = {"gptq_shuffle": (weight.qweight, weight.row_order, 4), "gptq_dequantize": weight.args}
    x = torch.randn(3 if op == "gptq_gemm_dx" else 1, weight.case.N if op == "gptq_gemm_dx" else weight.case.K).half()
    with pytest.raises(EmulationError, match="leads outside"):
        getattr(ops, op)(*arguments.get(op, (x, *weight.args)))


@pytest.mark.parametrize("wrong", [-1, 8])
def test_a_group_that_leads_outside_stops_the_kernel(device: EmulatedDriver, wrong: int) -> None:
    weight = build(Case(4, *SHAPES[4], 128, "raw", shuffled=False))
    assert len(weight.scales) == 8
    weight.row_order[7] = wrong
    with pytest.raises(EmulationError, match="leads outside"):
        ops.gptq_dequantize(*weight.args)
