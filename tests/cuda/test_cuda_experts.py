"""The products of experts by the CUDA kernels: the rows, the weight and the order that a thread block finds.

They are the kernels of one weight, whose own tests are test_emulated.py and test_plain.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conformance.weights import DTYPES, Case, Weight, build_experts, experts_args
from cuda import bounds, emulated
from cuda.plain import PlainOps
from cuda.test_plain import SHAPES, as_array, as_tensor, described, device, kernels_of, no_tickets, run_under
from exllama_ops.testing.bounds import assert_within_bound
from ptx_emulator.emulator import EmulationError, Emulator, reasons_against

pytestmark = pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")

# The kernels, by the rows of x that a thread block multiplies; threads of a block: 128, 256, 128, 256.
KERNELS = {"scalar": (1, 2, 4, 8), "mma": (8, 16, 32), "pipelined": (32, 64), "tiled": (64,)}
QUICK = {
    "perm": {("scalar", 1), ("scalar", 8), ("mma", 8), ("mma", 32), ("pipelined", 64), ("tiled", 64)},
    "sorted": {("mma", 8)},
    "raw": {("scalar", 8), ("tiled", 64)},
}
E, M = 6, 150
# Rows of none, one row, none, more than any tile, rows of none; all of one expert; no rows of any; every row of some.
OFFSETS = ((2, 3, 3, 80, 89, 97, 141), (0, 0, 0, 150, 150, 150, 150), (70,) * 7, (0, 32, 32, 96, 104, 149, 150))


def on(*values: Any, quick: bool) -> Any:
    name = "-".join(str(value) for value in values)
    return pytest.param(*values, id=name, marks=[] if quick else [pytest.mark.slow])


EVERY_KERNEL = [
    on(bits, order, group_size, algorithm, rows, quick=quick)
    for bits in SHAPES
    for order, group_size in (("perm", 128), ("sorted", 32), ("raw", 128))
    for algorithm in KERNELS
    for rows in KERNELS[algorithm]
    if order != "raw" or algorithm in ("scalar", "tiled")
    if (algorithm, bits, group_size) != ("pipelined", 3, 32)
    for quick in [bits == 4 and (algorithm, rows) in QUICK[order]]
]


@pytest.fixture
def sm_80() -> Iterator[Emulator]:
    emulator = device(80)
    yield emulator
    emulator.set_order("ascending")
    emulator.set_mma()


def stacked(experts: Sequence[Weight]) -> dict[str, Any]:
    """The arrays of all, and the sizes of one."""
    of_each = [described(expert) for expert in experts]
    stacks = {name: np.stack([one[name] for one in of_each]) for name in ("qweight", "qzeros", "scales", "row_order")}
    return {**of_each[0], **stacks}


def plain(emulator: Emulator, experts: Sequence[Weight], offsets: Sequence[int]) -> PlainOps:
    return PlainOps(emulator, [stacked(experts)], offsets=np.array(offsets, np.int32))


def rows_of(M: int, K: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drawn(E: int, M: int, seed: int) -> tuple[int, ...]:
    """Offsets of which several are alike, and some lie far apart."""
    generator = torch.Generator().manual_seed(seed)
    cuts = (torch.rand(E + 1, generator=generator) ** 3 * (M + 1)).int().clamp(max=M)
    return tuple(cuts.sort().values.tolist())


def check(out: Tensor, x: Tensor, experts: Sequence[Weight], offsets: Sequence[int], algorithm: str) -> None:
    """Every row of an expert is within the bound, and every other one is 0."""
    assert not out[: offsets[0]].any()
    assert not out[offsets[-1] :].any()
    for expert, (start, stop) in zip(experts, itertools.pairwise(offsets), strict=True):
        error = bounds.gemm_error(algorithm, expert, x.dtype)
        assert_within_bound(out[start:stop], x[start:stop], expert.dense, error)


def check_dx(dx: Tensor, grad: Tensor, experts: Sequence[Weight], offsets: Sequence[int]) -> None:
    assert not dx[: offsets[0]].any()
    assert not dx[offsets[-1] :].any()
    for expert, (start, stop) in zip(experts, itertools.pairwise(offsets), strict=True):
        error = bounds.dx_error(expert.case.N)
        assert_within_bound(dx[start:stop], grad[start:stop], expert.dense.t(), error)


@pytest.mark.parametrize(("bits", "order", "group_size", "algorithm", "rows"), EVERY_KERNEL)
def test_every_tile_finds_its_expert(
    sm_80: Emulator, bits: int, order: str, group_size: int, algorithm: str, rows: int
) -> None:
    """In one launch, after one that gathers x, in any order of thread blocks. No memory of others is touched."""
    experts = build_experts(Case(bits, *SHAPES[bits], group_size, order, shuffled=order != "raw"), E)
    x = rows_of(M, experts[0].case.K)
    for seed, offsets in enumerate((*OFFSETS, *(drawn(E, M, seed) for seed in range(3)))):
        sm_80.set_order("random", seed)
        ops = plain(sm_80, experts, offsets)
        with sm_80.record() as recording:
            out = as_tensor(ops.gemm(as_array(x), algorithm, rows=rows, splits=1))
        check(out, x, experts, offsets, algorithm)
        launches = ["gather_columns"] * (order == "perm") + [algorithm]
        assert [name in kernel for name, kernel in zip(launches, kernels_of(recording), strict=True)] == [True] * len(
            launches
        )


@pytest.mark.parametrize("order", ["perm", "sorted", "raw"])
@pytest.mark.parametrize("bits", [on(bits, quick=bits == 4) for bits in SHAPES])
def test_dx_of_every_tile_is_that_of_its_expert(sm_80: Emulator, bits: int, order: str) -> None:
    experts = build_experts(Case(bits, *SHAPES[bits], 32, order, shuffled=order != "raw"), E)
    grad = rows_of(M, experts[0].case.N)
    for seed, offsets in enumerate((*OFFSETS, drawn(E, M, 0))):
        sm_80.set_order("random", seed)
        with sm_80.record() as recording:
            dx = as_tensor(plain(sm_80, experts, offsets).gemm_dx(as_array(grad)))
        check_dx(dx, grad, experts, offsets)
        # Columns of dx that an order might leave out are filled with NaN before.
        assert [call["call"] for call in recording.calls] == ["memset"] * (order == "perm") + ["launch"]


# Runs of rows, with those of none, that are fewer than a warp or a thread block, as many, or more.
COUNTS = (1, 2, 29, 30, 31, 126, 127, 253, 254, 255, 300, 512)


@pytest.mark.parametrize(("algorithm", "rows"), [("scalar", 1), ("mma", 8), ("tiled", 64)])
def test_any_number_of_experts_and_any_imbalance(sm_80: Emulator, algorithm: str, rows: int) -> None:
    """The orders and the scales of experts without rows are not read. One expert has rows to the very last."""
    experts = build_experts(Case(4, 32, 8, 32, "perm"), max(COUNTS))
    for count, (seed, tokens) in itertools.product(COUNTS, enumerate((3, 40))):
        x = rows_of(tokens, 32)
        for offsets in (drawn(count, tokens, seed), (*[0] * count, tokens), (1, *[2] * count)):
            of_count = experts[:count]
            ops = plain(sm_80, of_count, offsets)
            without_rows = np.diff(ops.offsets) == 0
            ops.parts[0]["row_order"][without_rows] = -5
            ops.parts[0]["scales"][without_rows] = np.nan
            out = as_tensor(ops.gemm(as_array(x), algorithm, rows=rows))
            check(out, x, of_count, offsets, algorithm)


@pytest.mark.parametrize("algorithm", KERNELS)
def test_one_hot_rows_return_those_of_their_expert(sm_80: Emulator, algorithm: str) -> None:
    """A random product hides one misplaced value; this cannot. Rows of none are one-hot too, and give 0."""
    experts = build_experts(Case(4, *SHAPES[4], 128, "perm"), 3)
    K = experts[0].case.K
    x = torch.eye(K, dtype=torch.float16).repeat(4, 1)
    offsets = (5, 5 + K, 5 + K, 5 + 3 * K)
    out = as_tensor(plain(sm_80, experts, offsets).gemm(as_array(x), algorithm))
    dense = [expert.dense.half() for expert in experts]
    none = torch.zeros(K, dense[0].shape[1], dtype=torch.float16)
    expected = torch.cat([none[:5], dense[0][5:], dense[0][:5], dense[2][5:], dense[2], dense[2][:5], none[5:]])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("algorithm", ["scalar", "mma"])
def test_an_order_is_that_of_its_expert_looked_up_or_gathered(sm_80: Emulator, algorithm: str) -> None:
    """Bit for bit the product of gathered rows by the experts without orders. From five rows on a kernel gathers x."""
    experts = build_experts(Case(4, *SHAPES[4], 128, "perm"), 3)
    in_order = [replace(expert, row_order=expert.row_order[:0]) for expert in experts]
    for tokens, offsets in ((4, (0, 1, 1, 3)), (5, (1, 2, 4, 5))):
        x = rows_of(tokens, experts[0].case.K)
        gathered = x.clone()
        for expert, (start, stop) in zip(experts, itertools.pairwise(offsets), strict=True):
            gathered[start:stop] = x[start:stop, expert.row_order.long()]
        with sm_80.record() as recording:
            out = plain(sm_80, experts, offsets).gemm(as_array(x), algorithm, splits=1)
        assert ["gather_columns" in kernel for kernel in kernels_of(recording)] == [True] * (tokens == 5) + [False]
        assert np.array_equal(out, plain(sm_80, in_order, offsets).gemm(as_array(gathered), algorithm, splits=1))


@pytest.mark.parametrize("algorithm", ["scalar", "mma"])
def test_splits_of_an_expert_are_added_in_one_launch_or_by_another(sm_80: Emulator, algorithm: str) -> None:
    """To the same bits, in any order of thread blocks. Rows of none have sums too, which are 0."""
    experts = build_experts(Case(4, 1096, 72, 128), 3)
    x = rows_of(11, 1096)
    for offsets in ((1, 3, 3, 10), (0, 11, 11, 11), (4, 4, 4, 4)):
        ops = plain(sm_80, experts, offsets)
        with no_tickets(sm_80), sm_80.record() as recording:
            expected = ops.gemm(as_array(x), algorithm, splits=4)
        assert ["add_splits" in kernel for kernel in kernels_of(recording)] == [False, True]
        check(as_tensor(expected), x, experts, offsets, algorithm)
        for seed in range(3):
            sm_80.set_order("random", seed)
            with sm_80.record() as recording:
                out = ops.gemm(as_array(x), algorithm, splits=4)
            assert len(kernels_of(recording)) == 1
            assert np.array_equal(out, expected)


WRONG = [(-1, 2, 2), (0, 2, 1), (3, 2, 3), (0, 2, 7), (0, 7, 6), (-(2**31), 0, 2**31 - 1), (2**31 - 1,) * 3]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_offsets_that_are_none_stop_every_kernel(sm_80: Emulator, wrong: tuple[int, ...]) -> None:
    """By its own check: the emulator's, of the memory that the kernel may touch, says something else."""
    experts = build_experts(Case(4, 32, 8, 32, "perm"), 2)
    x, grad = as_array(rows_of(6, 32)), as_array(rows_of(6, 8))
    for rows, algorithm in ((6, "scalar"), (3, "scalar"), (3, "mma"), (3, "pipelined"), (3, "tiled"), (6, None)):
        ops = plain(sm_80, experts, wrong)
        with pytest.raises(EmulationError, match=r"^trap at line"):
            ops.gemm_dx(grad) if algorithm is None else ops.gemm(x[:rows], algorithm)
        ops.offsets[:] = (0, 1, 3)
        ops.gemm(x[:rows], algorithm or "scalar")


@pytest.mark.parametrize(("order", "limit"), [("perm", 32), ("raw", 4)])
def test_an_order_that_leads_outside_stops_the_kernel_of_its_expert(sm_80: Emulator, order: str, limit: int) -> None:
    experts = build_experts(Case(4, 32, 8, 32, order, shuffled=order == "perm"), 2)
    assert order == "perm" or len(experts[0].scales) == limit
    calls = [
        lambda ops: ops.gemm(as_array(rows_of(3, 32)), "scalar"),
        lambda ops: ops.gemm(as_array(rows_of(6, 32)), "tiled"),
        lambda ops: ops.gemm_dx(as_array(rows_of(3, 8))),
    ]
    for call, wrong in itertools.product(calls, (-1, limit)):
        ops = plain(sm_80, experts, (1, 1, 3))
        ops.parts[0]["row_order"][0, 7] = wrong
        call(ops)
        ops.offsets[:] = (0, 1, 3)
        with pytest.raises(EmulationError, match=r"^trap at line"):
            call(ops)


@pytest.mark.parametrize(("algorithm", "order"), [("scalar", "perm"), ("mma", "perm"), ("tiled", "raw")])
def test_a_replay_has_the_rows_of_the_new_offsets(sm_80: Emulator, algorithm: str, order: str) -> None:
    """As a CUDA graph does: the same calls, on what then lies in the buffers."""
    case = Case(4, *SHAPES[4], 128, order, shuffled=order != "raw")
    experts, offsets = build_experts(case, E), np.array(OFFSETS[0], np.int32)
    x, grad = (as_array(rows_of(M, size)) for size in (case.K, case.N))
    ops = PlainOps(sm_80, [stacked(experts)], offsets=offsets)
    with sm_80.record() as recording:
        out, dx = ops.gemm(x, algorithm), ops.gemm_dx(grad)
    others = build_experts(replace(case, seed=100), E)
    for name, stack in stacked(others).items():
        if isinstance(stack, np.ndarray):
            ops.parts[0][name][:] = stack
    for now in (OFFSETS[1], OFFSETS[2], drawn(E, M, 9)):
        offsets[:] = now
        for array in (out, dx):
            array.view(np.uint8).fill(0xFF)
        sm_80.replay(recording)
        check(as_tensor(out), as_tensor(x), others, now, algorithm)
        check_dx(as_tensor(dx), as_tensor(grad), others, now)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["perm", "raw"])
def test_thread_sanitizer_is_silent_about_experts(order: str, tmp_path: Path) -> None:
    """No missing barrier in the search for an expert, and no thread blocks that meet in memory."""
    case = Case(4, *SHAPES[4], 128, order, shuffled=order != "raw")
    experts = build_experts(case, E)
    x, grad = (rows_of(M, size) for size in (case.K, case.N))
    given = {"x float16": as_array(x), "grad float16": as_array(grad)}
    products = [(algorithm, "float16") for algorithm in KERNELS if case.shuffled or algorithm in ("scalar", "tiled")]
    offsets = np.array(OFFSETS[0], np.int32)
    results = run_under("thread", 80, tmp_path, [stacked(experts)], given, products, offsets)
    check_dx(as_tensor(results.pop("grad float16")), grad, experts, OFFSETS[0])
    assert len(results) == len(products)
    for name, out in results.items():
        check(as_tensor(out), x, experts, OFFSETS[0], name.split()[0])


# --- the ops


@pytest.fixture
def ops() -> Iterator[emulated.EmulatedOps]:
    emulated_ops = emulated.ops(80)
    torch.use_deterministic_algorithms(True)  # fresh memory is poisoned
    yield emulated_ops
    torch.use_deterministic_algorithms(False)
    emulated_ops.device.set_order("ascending")
    emulated_ops.set_batch_invariant(False)


def test_numbers_of_any_dtype_are_taken_exactly(ops: emulated.EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = (1, 2, 2, 12)
    for (dtype, scales_dtype), algorithm in itertools.product(
        zip(DTYPES, (*DTYPES[1:], DTYPES[0]), strict=True), ("scalar", "mma", "tiled")
    ):
        if algorithm == "mma" and dtype == torch.float32:
            continue
        monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
        experts = build_experts(Case(4, *SHAPES[4], 128, "perm", scales_dtype=scales_dtype), 3)
        x, grad = (rows_of(13, size, dtype) for size in SHAPES[4])
        args = experts_args(experts, offsets)
        check(ops.gptq_moe_gemm(x, *args), x, experts, offsets, algorithm)
        check_dx(ops.gptq_moe_gemm_dx(grad, *args), grad, experts, offsets)


@pytest.mark.parametrize("bits", [on(bits, quick=bits == 4) for bits in SHAPES])
def test_a_filled_weight_of_each_expert(ops: emulated.EmulatedOps, bits: int) -> None:
    """inf meets no row that only fills its group."""
    experts = build_experts(Case(bits, *SHAPES[bits], 32, "filled"), 3)
    case, offsets = experts[0].case, (1, 4, 4, 9)
    x, grad = (rows_of(10, size) for size in (case.K, case.N))
    args = experts_args(experts, offsets)
    ops.device.set_order("random", bits)
    out, dx = ops.gptq_moe_gemm(x, *args), ops.gptq_moe_gemm_dx(grad, *args)
    check(out, x, experts, offsets, "scalar")
    check_dx(dx, grad, experts, offsets)
    x[3] = 0
    x[3, 7] = torch.inf
    assert torch.equal(ops.gptq_moe_gemm(x, *args)[3].isnan(), experts[0].dense[7] == 0)


def test_what_is_not_finite_stays_in_its_rows(ops: emulated.EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do rows of none get it."""
    experts, offsets, bad = build_experts(Case(4, *SHAPES[4], 128), 3), (2, 3, 20, 70), (0, 2, 5, 40, 71)
    args = experts_args(experts, offsets)
    for algorithm in KERNELS:
        monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
        x = rows_of(72, SHAPES[4][0])
        clean = ops.gptq_moe_gemm(x, *args)
        for row, value in zip(bad, (torch.nan, torch.inf, torch.nan, -torch.inf, torch.nan), strict=True):
            x[row, 3] = value
        out = ops.gptq_moe_gemm(x, *args)
        of_experts = list(bad[1:-1])
        assert not out[of_experts].isfinite().all(1).any()
        clean[of_experts] = out[of_experts]
        assert torch.equal(out.nan_to_num(), clean.nan_to_num())


@pytest.mark.parametrize("order", ["sorted", "perm"])
def test_batch_invariant_rows_do_not_depend_on_the_others(ops: emulated.EmulatedOps, order: str) -> None:
    """They have the bits of gptq_gemm, whose K is divided for one row too."""
    ops.set_batch_invariant(True)
    experts, offsets = build_experts(Case(4, 1096, 72, 128, order), 3), (1, 3, 3, 40)
    for dtype in DTYPES:
        x = rows_of(41, 1096, dtype)
        out = ops.gptq_moe_gemm(x, *experts_args(experts, offsets))
        for expert, (start, stop) in zip(experts, itertools.pairwise(offsets), strict=True):
            for rows in (slice(start, stop), slice(start, min(start + 1, stop))):
                if rows.start < rows.stop:
                    assert torch.equal(out[rows], ops.gptq_gemm(x[rows].contiguous(), *expert.args))


def test_one_expert_is_one_weight(ops: emulated.EmulatedOps) -> None:
    (expert,) = build_experts(Case(4, 1096, 72, 128, "perm"), 1)
    for tokens in (1, 7, 40):
        x, grad = rows_of(tokens, 1096), rows_of(tokens, 72)
        args = experts_args([expert], (0, tokens))
        assert torch.equal(ops.gptq_moe_gemm(x, *args), ops.gptq_gemm(x, *expert.args))
        assert torch.equal(ops.gptq_moe_gemm_dx(grad, *args), ops.gptq_gemm_dx(grad, *expert.args))


def test_experts_can_be_captured_in_a_graph(ops: emulated.EmulatedOps) -> None:
    """Launches on the current stream, whose grids the host knows by M and E: the offsets change nothing."""
    experts = build_experts(Case(4, *SHAPES[4], 128, "perm"), 3)
    calls = []
    ops.device.set_stream(0x5EED, is_capturing=True)
    try:
        for offsets in ((0, 1, 2, 6), (3, 3, 3, 3)):
            for op, size in ((ops.gptq_moe_gemm, SHAPES[4][0]), (ops.gptq_moe_gemm_dx, SHAPES[4][1])):
                op(rows_of(6, size), *experts_args(experts, offsets))
                assert {call["call"] for call in ops.calls} <= {"launch", "memset"}
                assert {call["stream"] for call in ops.calls} == {0x5EED}
                calls.append([(call["call"], call.get("kernel"), call.get("grid")) for call in ops.calls])
    finally:
        ops.device.set_stream(0)
    assert calls[:2] == calls[2:]
    ops.gptq_moe_gemm(rows_of(0, SHAPES[4][0]), *experts_args(experts, (0, 0, 0, 0)))
    assert ops.calls == []


def test_the_choice_says_its_op_and_its_experts(
    ops: emulated.EmulatedOps, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    K, N = SHAPES[4]
    args = rows_of(3, K), *experts_args(build_experts(Case(4, K, N, 128, "perm"), 3), (0, 1, 2, 3))
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_LOG", "1")
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", "tiled")
    ops.gptq_moe_gemm(*args)
    said = "bits=4 group_size=128 x=float16 scales=float16 perm sm_80: tiled rows=64 split_k=1 chunk=0"
    assert capfd.readouterr().err == f"exllama_ops: gptq_moe_gemm M=3 K={K} N={N} experts=3 {said}\n"
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", "dense")
    with pytest.raises(ValueError, match=r"^gptq_moe_gemm: EXLLAMA_OPS_CUDA_ALGORITHM=dense cannot"):
        ops.gptq_moe_gemm(*args)
