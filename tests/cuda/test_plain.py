"""The kernels on memory of which every byte is known: bounds, races, replays, and offsets beyond 32 bits.

What is slow are other widths, and to compile the kernels again for a sanitizer.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conformance.bounds import assert_within_bound
from conformance.weights import Case, Weight, build
from cuda import bounds, emulated
from cuda.plain import Array, PlainOps, every_call, fresh, sparse
from emulation.emulator import DEVICES, Emulator, reasons_against, sanitizer_environment

pytestmark = pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")

SLOW = pytest.mark.slow
# Beyond a run and a tile, and no multiple of them.
SHAPES = {2: (336, 80), 3: (288, 96), 4: (296, 72), 8: (292, 68)}
M = 11
ON = [pytest.param(80, 4, id="sm_80-4b"), pytest.param(75, 4, id="sm_75-4b"), pytest.param(90, 4, id="sm_90-4b")]
ON += [pytest.param(arch, bits, id=f"sm_{arch}-{bits}b", marks=SLOW) for arch in (75, 80, 90) for bits in (2, 3, 8)]


def device(arch: int) -> Emulator:
    return Emulator(emulated.plain_library(arch), DEVICES[arch])


def case_of(bits: int, order: str = "perm", seed: int = 0) -> Case:
    return Case(bits, *SHAPES[bits], 128, order, shuffled=order != "raw", seed=seed)


def described(weight: Weight) -> dict[str, Any]:
    case = weight.case
    arrays = {name: getattr(weight, name).numpy() for name in ("qweight", "qzeros", "scales", "rows")}
    return {**arrays, "K": case.K, "N": case.N, "G": len(weight.scales), "group_size": case.group_size,
            "bits": case.bits, "shuffled": case.shuffled, "zeros_v2": case.v2}  # fmt: skip


def inputs(case: Case, seed: int = 0) -> tuple[Array, Array]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(M, case.K, generator=generator).half().numpy(),
            torch.randn(M, case.N, generator=generator).half().numpy())  # fmt: skip


def algorithms_for(case: Case) -> list[str]:
    return ["scalar", "mma", "tiled"] if case.shuffled else ["scalar", "tiled"]


def check(
    results: dict[str, Array], weight: Weight, x: Array, grad: Array, algorithms: list[str] | None = None
) -> None:
    """Every result of `every_call` is what it should be."""
    case, dense = weight.case, weight.dense
    assert torch.equal(torch.from_numpy(results.pop("dequantize")), dense.float().half())
    dx = torch.from_numpy(results.pop("gemm_dx"))
    assert_within_bound(dx, torch.from_numpy(grad), dense.t(), bounds.dx_error(case.N))
    if case.shuffled:
        checkpoint = build(Case(**{**vars(case), "shuffled": False})).qweight.numpy()
        assert np.array_equal(results.pop("unshuffle"), checkpoint)
        assert np.array_equal(results.pop("shuffle"), weight.qweight.numpy())
    assert len(results) == 2 * len(algorithms or algorithms_for(case))
    for name, result in results.items():
        error = bounds.gemm_error(name.split()[0], weight, torch.float16)
        out = torch.from_numpy(result)
        assert_within_bound(out, torch.from_numpy(x[: len(out)]), dense, error)


@pytest.mark.parametrize(("arch", "bits"), ON)
@pytest.mark.parametrize("order", ["perm", "raw"])
def test_no_kernel_touches_what_is_not_an_argument(arch: int, bits: int, order: str) -> None:
    weight = build(case_of(bits, order))
    x, grad = inputs(weight.case)
    check(every_call(PlainOps(device(arch), described(weight)), x, grad, algorithms_for(weight.case)), weight, x, grad)


@pytest.mark.parametrize(
    ("order", "group_size"), [("perm", 128), ("sorted", 48), ("raw", 128)], ids=["perm", "groups-of-48", "raw"]
)
def test_a_thread_block_that_has_many_rows_of_W(order: str, group_size: int) -> None:
    """Stage after stage of x, which replace one another in shared memory; select_gemm would split these rows."""
    weight = build(Case(4, 1096, 72, group_size, order, shuffled=order != "raw"))
    x, _ = inputs(weight.case)
    ops = PlainOps(device(80), described(weight))
    for algorithm in algorithms_for(weight.case):
        if not ops.can(algorithm, M):
            continue
        for rows in (1, M):
            out = torch.from_numpy(ops.gemm(x[:rows], algorithm, split=False))
            error = bounds.gemm_error(algorithm, weight, torch.float16)
            assert_within_bound(out, torch.from_numpy(x[:rows]), weight.dense, error)


@pytest.mark.parametrize("name", ["qweight", "scales"])
def test_arrays_that_begin_anywhere(name: str) -> None:
    """Where a tensor is a view, loads of several numbers may not be aligned; the emulator refuses them."""
    weight = build(case_of(4))
    arrays = described(weight)
    array = arrays[name]
    memory = fresh(array.nbytes + 16 + array.itemsize, dtype=np.uint8)
    first = -memory.ctypes.data % 16 + array.itemsize
    arrays[name] = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    arrays[name][:] = array
    ops = PlainOps(device(80), arrays)
    assert not ops.can("mma", M)
    x, grad = inputs(weight.case)
    results = every_call(ops, x, grad, ["scalar", "tiled"])
    check(results, weight, x, grad, ["scalar", "tiled"])


@pytest.mark.parametrize(("arch", "bits"), ON)
@pytest.mark.parametrize("order", ["perm", "raw"])
def test_every_op_replays_with_new_data(arch: int, bits: int, order: str) -> None:
    """As a CUDA graph does: the same calls, workspaces and permuted copies too, on what then lies in the buffers."""
    weight, other = build(case_of(bits, order)), build(case_of(bits, order, seed=1))
    x, grad = inputs(weight.case)
    emulator = device(arch)
    ops = PlainOps(emulator, described(weight))
    algorithms = algorithms_for(weight.case)
    with emulator.record() as recording:
        results = every_call(ops, x, grad, algorithms)
    assert {call["call"] for call in recording.calls} <= {"launch", "memcpy", "memset"}
    assert any("add_splits" in call.get("kernel", "") for call in recording.calls)
    for name in ("qweight", "qzeros", "scales", "rows"):
        getattr(weight, name).copy_(getattr(other, name))
    x[:], grad[:] = inputs(weight.case, seed=1)
    for array in ops.kept:
        if any(array is result for name, result in results.items() if name != "shuffle"):
            array.view(np.uint8).fill(0xFF)
    if weight.case.shuffled:
        results["shuffle"][:] = build(Case(**{**vars(other.case), "shuffled": False})).qweight.numpy()
    emulator.replay(recording)
    check(results, other, x, grad)


def run_under(sanitize: str, arch: int, weight: Weight, folder: Path) -> None:
    """Every call in a process of its own, which must be silent, and right."""
    x, grad = inputs(weight.case)
    arrays, results = folder / "arrays.npz", folder / "results.npz"
    np.savez(arrays, x=x, grad=grad, algorithms=np.array(algorithms_for(weight.case)), **described(weight))
    library = emulated.plain_library(arch, sanitize)
    environment = {
        **sanitizer_environment(sanitize),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PYTHONMALLOC": "malloc",
        "OPENBLAS_NUM_THREADS": "1",  # numpy's threads are none of ours
    }
    command = [sys.executable, "-m", "cuda.plain", str(library), str(arrays), str(results)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr[:6000]) == (0, "")
    check(dict(np.load(results)), weight, x, grad)


@pytest.mark.parametrize(
    ("bits", "order"),
    [
        pytest.param(bits, order, id=f"{bits}b-{order}", marks=() if (bits, order) == (4, "perm") else SLOW)
        for bits in SHAPES
        for order in ("perm", "raw")
    ],
)
def test_thread_sanitizer_is_silent(bits: int, order: str, tmp_path: Path) -> None:
    """No missing barrier, and no blocks that meet in memory. (For AddressSanitizer g++ takes minutes a kernel.)"""
    run_under("thread", 80, build(case_of(bits, order)), tmp_path)


# --- offsets


@pytest.fixture
def last_block() -> Any:
    emulator = device(80)
    emulator.set_only_last_block(True)
    yield emulator
    emulator.set_only_last_block(False)


WIDE = 2**26  # columns: 2**33 words
TALL = 2**26  # rows of x and out: 2**33 numbers of each


@pytest.mark.parametrize("algorithm", ["scalar", "mma", "tiled"])
def test_a_weight_of_more_than_2_to_the_32_words(last_block: Emulator, algorithm: str) -> None:
    """The last 64 columns, of which the others are zeros. There are more than 2**32 scales and bytes of zero points."""
    weight = build(Case(4, 8192, 64, 32))
    wide = wide_weight(weight)
    x = inputs(weight.case)[0][:1]
    ops = PlainOps(last_block, wide)
    out = ops.gemm(x, algorithm, out=sparse(1, WIDE, dtype=np.float16))[:, -64:].copy()
    assert_within_bound(
        torch.from_numpy(out), torch.from_numpy(x), weight.dense, bounds.gemm_error(algorithm, weight, torch.float16)
    )


def wide_weight(weight: Weight) -> dict[str, Any]:
    """A weight in the last columns of one with WIDE columns."""
    described_weight = {**described(weight), "N": WIDE}
    for name, columns in (("qweight", WIDE), ("qzeros", WIDE // 8), ("scales", WIDE)):
        small = described_weight[name]
        described_weight[name] = sparse(len(small), columns, dtype=small.dtype)
        described_weight[name][:, -small.shape[1] :] = small
    return described_weight


def test_dequantizing_columns_beyond_2_to_the_32_words(last_block: Emulator) -> None:
    weight = build(Case(4, 1024, 64, 128))
    last_block.set_only_last_block(False)
    out = PlainOps(last_block, wide_weight(weight)).dequantize(WIDE - 64, 64)
    assert torch.equal(torch.from_numpy(out), weight.dense.float().half())


@pytest.mark.parametrize("algorithm", ["scalar", "mma", "tiled", "gemm_dx"])
def test_activations_of_more_than_2_to_the_32_numbers(last_block: Emulator, algorithm: str) -> None:
    """The last row, and its last 64 columns: beyond 2**32 numbers of both, signed or not."""
    weight = build(Case(4, 128, 128, 128))
    ops = PlainOps(last_block, described(weight))
    K, N, dense = 128, 128, weight.dense
    if algorithm == "gemm_dx":
        K, N, dense = N, K, dense.t()
    x, out = sparse(TALL, K, dtype=np.float16), sparse(TALL, N, dtype=np.float16)
    x[-1] = np.linspace(-1, 1, K)
    if algorithm == "gemm_dx":
        error = bounds.dx_error(N)
        ops.gemm_dx(x, out)
    else:
        error = bounds.gemm_error(algorithm, weight, torch.float16)
        ops.gemm(x, algorithm, out)
    last_x, last = torch.from_numpy(x[-1:].copy()), torch.from_numpy(out[-1:, -64:].copy())
    assert_within_bound(last, last_x, dense[:, -64:], error)
