"""The kernels on memory of which every byte is known: bounds, races, replays, and offsets beyond 32 bits.

What is slow are other widths, and to compile the kernels again for a sanitizer.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conformance.weights import DTYPES, Case, Weight, build
from cuda import bounds, emulated
from cuda.plain import Array, PlainOps, every_call, fresh, save, sparse
from exllama_ops.testing.bounds import assert_within_bound
from ptx_emulator.emulator import DEVICES, EmulationError, Emulator, Recording, reasons_against, sanitizer_environment

pytestmark = pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow
# Beyond a run and a tile, and no multiple of them.
SHAPES = {2: (336, 80), 3: (288, 96), 4: (296, 72), 8: (292, 68)}
M = 11
ON = [pytest.param(80, 4, id="sm_80-4b"), pytest.param(75, 4, id="sm_75-4b"), pytest.param(90, 4, id="sm_90-4b")]
ON += [pytest.param(arch, bits, id=f"sm_{arch}-{bits}b", marks=SLOW) for arch in (75, 80, 90) for bits in (2, 3, 8)]
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def device(arch: int) -> Emulator:
    return Emulator(emulated.plain_library(arch), DEVICES[arch])


def test_the_device_is_asked_for_its_clock_and_its_memory() -> None:
    for arch, dram_mb_per_s in ((75, 320_064), (80, 2_039_040), (90, 3_352_320)):
        of_arch = DEVICES[arch]
        told = (ctypes.c_int64 * 5)()
        device(arch).library.plain_device(told)
        assert list(told) == [arch, of_arch.sm_count, of_arch.l2_bytes, of_arch.clock_khz, dram_mb_per_s]


def case_of(bits: int, order: str = "perm", seed: int = 0) -> Case:
    return Case(bits, *SHAPES[bits], 128, order, shuffled=order != "raw", seed=seed)


def parts_of(case: Case) -> list[Weight]:
    """A weight and others that a product may have beside it: of N and scales_dtype of their own."""
    columns = ((case.N, torch.float16), (32, torch.bfloat16), (160, torch.float32))
    return [build(replace(case, N=N, scales_dtype=dtype)) for N, dtype in columns]


def as_array(tensor: torch.Tensor) -> Array:
    """The same memory."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def as_tensor(array: Array) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def described(weight: Weight) -> dict[str, Any]:
    case = weight.case
    arrays = {name: as_array(getattr(weight, name)) for name in ("qweight", "qzeros", "scales", "row_order")}
    return {**arrays, "K": case.K, "N": case.N, "G": len(weight.scales), "group_size": case.group_size,
            "bits": case.bits, "shuffled": case.shuffled, "zero_offset": 0 if case.v2 else 1}  # fmt: skip


def inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"x": case.K, "grad": case.N}
    return {
        f"{name} {NAMES[dtype]}": as_array(torch.randn(M, size, generator=generator).to(dtype))
        for name, size in sizes.items()
        for dtype in DTYPES
    }


def products(case: Case, arch: int) -> list[tuple[str, str]]:
    """Algorithms and dtypes."""
    found = [(algorithm, name) for algorithm in ("scalar", "tiled") for name in NAMES.values()]
    if case.shuffled:
        found += [("mma", "float16"), ("mma", "bfloat16")][: 2 if arch >= 80 else 1]
        # The PTX of sm_90 differs in the form of its loads alone.
        found += [("pipelined", "float16")] if arch == 80 else []
    return found


def check(
    results: dict[str, Array], parts: list[Weight], given: dict[str, Array], expected: list[tuple[str, str]]
) -> None:
    """Every result of `every_call`, with the products that are expected, is what it should be."""
    first = parts[0]
    case = first.case
    assert torch.equal(as_tensor(results.pop("dequantize")), first.dense.float().to(case.scales_dtype))
    for name in NAMES.values():
        grad, dx = as_tensor(given[f"grad {name}"]), as_tensor(results.pop(f"grad {name}"))
        assert_within_bound(dx, grad, first.dense.t(), bounds.dx_error(case.N))
    if case.shuffled:
        checkpoint = build(replace(case, shuffled=False)).qweight.numpy()
        assert np.array_equal(results.pop("unshuffle"), checkpoint)
        assert np.array_equal(results.pop("shuffle"), first.qweight.numpy())
    assert set(results) == {
        f"{algorithm} {name} {rows} {count}"
        for algorithm, name in expected
        for rows in (1, M)
        for count in (1, len(parts))
    }
    for key, result in results.items():
        algorithm, name, rows, count = key.split()
        x, dense = as_tensor(given[f"x {name}"][: int(rows)]), torch.cat([p.dense for p in parts[: int(count)]], 1)
        assert_within_bound(as_tensor(result), x, dense, bounds.gemm_error(algorithm, first, x.dtype))


@pytest.mark.parametrize(("arch", "bits"), ON)
@pytest.mark.parametrize("order", ["perm", "raw"])
def test_no_kernel_touches_what_is_not_an_argument(arch: int, bits: int, order: str) -> None:
    parts = parts_of(case_of(bits, order))
    given, all_products = inputs(parts[0].case), products(parts[0].case, arch)
    results = every_call(PlainOps(device(arch), [described(part) for part in parts]), given, all_products)
    check(results, parts, given, all_products)


@pytest.mark.parametrize(
    ("order", "group_size"), [("perm", 128), ("sorted", 48), ("raw", 128)], ids=["perm", "groups-of-48", "raw"]
)
def test_a_thread_block_that_has_many_rows_of_W(order: str, group_size: int) -> None:
    """Stage after stage of x, which replace one another in shared memory; select_gemm would split these rows."""
    weight = build(Case(4, 1096, 72, group_size, order, shuffled=order != "raw"))
    x = inputs(weight.case)["x float16"]
    ops = PlainOps(device(80), [described(weight)])
    for algorithm in ("scalar", "mma", "pipelined", "tiled"):
        if not ops.can(algorithm, x):
            continue
        for rows in (1, M):
            out = as_tensor(ops.gemm(x[:rows], algorithm, splits=1))
            error = bounds.gemm_error(algorithm, weight, torch.float16)
            assert_within_bound(out, as_tensor(x[:rows]), weight.dense, error)


def fresh_at(offset: int, *shape: int, dtype: Any) -> Array:
    """Fresh memory so many bytes after an address that is aligned for every load."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = fresh(count + 16 + offset, dtype=np.uint8)
    first = -memory.ctypes.data % 16 + offset
    return memory[first : first + count].view(dtype).reshape(shape)


def moved(array: Array, offset: int) -> Array:
    copied = fresh_at(offset, *array.shape, dtype=array.dtype)
    copied[:] = array
    return copied


@pytest.mark.parametrize(
    ("name", "order", "offset"),
    [
        ("qweight", "perm", 4),
        ("qzeros", "perm", 4),
        ("scales", "perm", 2),
        ("float32 scales", "perm", 8),  # where four numbers of 16 bits might begin
        ("row_order", "perm", 4),
        ("row_order", "raw", 4),
        ("x", "sorted", 2),  # without a permutation x is read 16 bytes at a time, if it can be
        ("x", "perm", 2),
        ("results", "perm", 2),
    ],
)
def test_arrays_that_begin_anywhere(name: str, order: str, offset: int) -> None:
    """Where a tensor is a view, loads of several numbers may not be aligned; the emulator refuses them."""
    case = case_of(4, order)
    weight = build(replace(case, scales_dtype=torch.float32) if name == "float32 scales" else case)
    arrays, given = described(weight), inputs(case)
    if name == "x":
        given = {key: moved(array, max(offset, array.itemsize)) for key, array in given.items()}
    elif name != "results":
        array = name.split()[-1]
        arrays[array] = moved(arrays[array], offset)

    def allocate(*shape: int, dtype: Any) -> Array:
        return fresh_at(max(offset, np.dtype(dtype).itemsize) if name == "results" else 0, *shape, dtype=dtype)

    ops = PlainOps(device(80), [arrays], allocate)
    aligned = name not in ("qweight", "scales", "float32 scales")
    all_products = [p for p in products(case, 80) if p[0] not in ("mma", "pipelined") or aligned]
    for algorithm in ("mma", "pipelined"):
        assert ops.can(algorithm, given["x float16"]) == (aligned and case.shuffled)
    check(every_call(ops, given, all_products), [weight], given, all_products)


INDEXED = [
    ("perm", "scalar-1", lambda ops, x, grad: ops.gemm(x[:1], "scalar")),
    ("perm", "scalar", lambda ops, x, grad: ops.gemm(x, "scalar")),
    ("perm", "mma-1", lambda ops, x, grad: ops.gemm(x[:1], "mma")),
    ("perm", "mma", lambda ops, x, grad: ops.gemm(x, "mma")),
    ("perm", "tiled-1", lambda ops, x, grad: ops.gemm(x[:1], "tiled")),
    ("perm", "gemm_dx", lambda ops, x, grad: ops.gemm_dx(grad)),
    ("perm", "dequantize", lambda ops, x, grad: ops.dequantize()),
    ("perm", "shuffle", lambda ops, x, grad: ops.shuffle(ops.parts[0]["qweight"].copy(), ops.parts[0]["row_order"])),
    ("perm", "unshuffle", lambda ops, x, grad: ops.unshuffle(ops.parts[0]["qweight"], ops.parts[0]["row_order"])),
    ("raw", "scalar", lambda ops, x, grad: ops.gemm(x, "scalar")),
    ("raw", "tiled", lambda ops, x, grad: ops.gemm(x, "tiled")),
    ("raw", "gemm_dx", lambda ops, x, grad: ops.gemm_dx(grad)),
    ("raw", "dequantize", lambda ops, x, grad: ops.dequantize()),
]


@pytest.mark.parametrize(("order", "call"), [(o, c) for o, _, c in INDEXED], ids=[f"{o}-{n}" for o, n, _ in INDEXED])
def test_an_index_that_leads_outside_stops_the_kernel(
    order: str, call: Callable[[PlainOps, Array, Array], Any]
) -> None:
    """By its own check: the emulator's, of the memory that the kernel may touch, says something else."""
    weight = build(case_of(4, order))
    ops = PlainOps(device(80), [described(weight)])
    given = inputs(weight.case)
    limit = weight.case.K if order == "perm" else len(weight.scales)
    for row, index in itertools.product((0, 13, weight.case.K - 1), (-1, limit)):
        right = int(weight.row_order[row])
        weight.row_order[row] = index
        with pytest.raises(EmulationError, match=r"^trap at line"):
            call(ops, given["x float16"], given["grad float16"])
        weight.row_order[row] = right
    call(ops, given["x float16"], given["grad float16"])


@pytest.mark.parametrize(("arch", "bits"), ON)
@pytest.mark.parametrize("order", ["perm", "raw"])
def test_every_op_replays_with_new_data(arch: int, bits: int, order: str) -> None:
    """As a CUDA graph does: the same calls, workspaces and permuted copies too, on what then lies in the buffers."""
    parts, others = parts_of(case_of(bits, order)), parts_of(case_of(bits, order, seed=1))
    given, all_products = inputs(parts[0].case), products(parts[0].case, arch)
    emulator = device(arch)
    ops = PlainOps(emulator, [described(part) for part in parts])
    with emulator.record() as recording:
        results = every_call(ops, given, all_products)
    assert {call["call"] for call in recording.calls} <= {"launch", "memcpy", "memset"}
    assert any(call["grid"][1] > 1 for call in recording.calls if call["call"] == "launch")
    for part, other in zip(parts, others, strict=True):
        for name in ("qweight", "qzeros", "scales", "row_order"):
            getattr(part, name).copy_(getattr(other, name))
    for name, array in inputs(parts[0].case, seed=1).items():
        given[name][:] = array
    for array in ops.kept:
        if any(array is result for name, result in results.items() if name != "shuffle"):
            array.view(np.uint8).fill(0xFF)
    if parts[0].case.shuffled:
        results["shuffle"][:] = build(replace(others[0].case, shuffled=False)).qweight.numpy()
    emulator.replay(recording)
    check(results, others, given, all_products)


@contextmanager
def no_tickets(emulator: Emulator) -> Iterator[None]:
    """A capture whose graph cannot give tickets back has none."""
    emulator.set_graphs_keep_objects(False)
    emulator.set_stream(0, is_capturing=True, capture=77)
    yield
    emulator.set_graphs_keep_objects(True)
    emulator.set_stream(0)


def kernels_of(recording: Recording) -> list[str]:
    return [call["kernel"] for call in recording.calls]


@pytest.mark.parametrize("algorithm", ["scalar", "mma"])
@pytest.mark.parametrize("arch", [80, 90])
def test_splits_are_added_in_one_order_whichever_thread_block_is_last(arch: int, algorithm: str) -> None:
    """The bits are those of the second kernel, which adds from the first split to the last. Counters are left at 0.

    The last 256 rows take away what the first have brought, so that any other order rounds to other numbers.
    """
    K, N = 1280, 72
    q = torch.randint(0, 16, (K, N), generator=torch.Generator().manual_seed(0))
    q[-256:] = q[:256]
    weight = build(Case(4, K, N, 128), q=q)
    for per_group in (weight.scales, weight.qzeros):
        per_group[-2:] = per_group[:2]
    x = inputs(weight.case)["x float16"]
    x[:, :256] *= 1000
    x[:, -256:] = -x[:, :256]
    emulator = device(arch)
    ops = PlainOps(emulator, [described(weight)])
    for rows, truncates in ((1, False), (M, True)):
        emulator.set_mma(truncates=truncates)
        with no_tickets(emulator), emulator.record() as recording:
            expected = ops.gemm(x[:rows], algorithm, splits=5)
        assert [("add_splits" in kernel) for kernel in kernels_of(recording)] == [False, True]
        for order, seed in (("ascending", 0), ("descending", 0), ("random", 1), ("random", 2), ("random", 3)):
            emulator.set_order(order, seed)
            with emulator.record() as recording:
                out = ops.gemm(x[:rows], algorithm, splits=5)
            assert [algorithm in kernel for kernel in kernels_of(recording)] == [True]
            assert np.array_equal(out, expected), (order, seed)


def tickets(emulator: Emulator, stream: int, capture: int | None = None) -> int | None:
    """The address of the tickets that a launch gets."""
    emulator.set_stream(stream, is_capturing=capture is not None, capture=capture or 0)
    function = emulator.library.plain_tickets
    function.restype = ctypes.c_void_p
    address: int | None = function(ctypes.c_int64(stream))
    emulator.set_stream(0)
    emulator.check()
    return address


def test_launches_that_may_run_at_a_time_have_tickets_of_their_own() -> None:
    """Streams, graphs, and the streams of a graph; what follows on one has the same."""
    emulator = device(80)
    users = [(1, None), (2, None), (1, 1001), (2, 1001), (1, 1002)]
    given = [tickets(emulator, *user) for user in users]
    assert None not in given
    assert len(set(given)) == len(users)
    assert [tickets(emulator, *user) for user in users] == given
    emulator.destroy_graph(1001)
    again = [tickets(emulator, *user) for user in ((2, 1003), (3, 1003), (4, 1003))]
    assert set(given[2:4]) <= set(again)
    assert not {given[0], given[1], given[4]} & set(again)
    for graph in (1002, 1003):
        emulator.destroy_graph(graph)


def test_a_launch_without_tickets_is_told_so() -> None:
    """Streams may come and go: they leave sets to graphs. A graph that cannot give its set back gets none."""
    emulator = device(75)
    streams = [tickets(emulator, 100 + i) for i in range(300)]
    count = streams.index(None)
    assert 250 < count <= 256  # other tests of this process may have used streams before
    assert len(set(streams[:count])) == count
    assert set(streams[count:]) == {None}
    graphs = [tickets(emulator, 1, 2000 + i) for i in range(800)]
    assert len(set(graphs) - {None}) == 768 == graphs.index(None)
    for i in range(800):
        emulator.destroy_graph(2000 + i)
    with no_tickets(emulator):
        assert emulator.library.plain_tickets(ctypes.c_int64(1)) is None
    assert tickets(emulator, 1, 3000) in graphs
    emulator.destroy_graph(3000)


def run_under(sanitize: str, arch: int, folder: Path, *saved: Any) -> dict[str, Array]:
    """The results of every call, in a process of its own, which must be silent; `saved` are the arguments of `save`."""
    arrays, results = folder / "arrays.npz", folder / "results.npz"
    save(arrays, *saved)
    library = emulated.plain_library(arch, sanitize)
    environment = {
        **sanitizer_environment(sanitize),
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("tests", "tools")),
        "PYTHONMALLOC": "malloc",
        "OPENBLAS_NUM_THREADS": "1",  # numpy's threads are none of ours
    }
    command = [sys.executable, "-m", "cuda.plain", str(library), str(arrays), str(results)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr[:6000]) == (0, "")
    return dict(np.load(results))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["perm", "raw"])
@pytest.mark.parametrize("bits", SHAPES)
def test_thread_sanitizer_is_silent(bits: int, order: str, tmp_path: Path) -> None:
    """No missing barrier, and no blocks that meet in memory."""
    case = case_of(bits, order)
    # bfloat16 takes mma kernels of its own, whose barriers are the same.
    some = [product for product in products(case, 80) if product != ("mma", "bfloat16")]
    parts, given = parts_of(case), inputs(case)
    check(run_under("thread", 80, tmp_path, [described(part) for part in parts], given, some), parts, given, some)


# --- offsets


@pytest.fixture
def last_block() -> Any:
    emulator = device(80)
    emulator.set_only_last_block(True)
    yield emulator
    emulator.set_only_last_block(False)


WIDE = 2**28  # columns: 2**36 words, 2**30 bits of zero points in a row
LONG = 2**30  # rows of W: 2**33 words of 64 columns, and 2**36 numbers
TALL = 2**26  # rows of x and out: 2**33 numbers of each


def within(described_weight: dict[str, Any], **sizes: int) -> dict[str, Any]:
    """A weight in the last rows and columns of a larger one, of the same number of groups."""
    larger = {**described_weight, **sizes}
    K, N, G, bits = (larger[name] for name in ("K", "N", "G", "bits"))
    for name, rows, columns in (
        ("qweight", K * bits // 32, N), ("qzeros", G, N * bits // 32), ("scales", G, N),
    ):  # fmt: skip
        small = larger[name]
        larger[name] = sparse(rows, columns, dtype=small.dtype)
        larger[name][-small.shape[0] :, -small.shape[1] :] = small
    return larger


@pytest.mark.parametrize("algorithm", ["scalar", "mma", "pipelined", "tiled"])
def test_a_weight_of_more_than_2_to_the_32_words(last_block: Emulator, algorithm: str) -> None:
    """The last 64 columns, of which the others are zeros. There are more than 2**32 scales and words of zero points."""
    weight = build(Case(4, 4224, 64, 32))
    x = inputs(weight.case)["x float16"][:1]
    ops = PlainOps(last_block, [within(described(weight), N=WIDE)])
    out = ops.gemm(x, algorithm, sparse(1, WIDE, dtype=np.float16))[:, -64:].copy()
    error = bounds.gemm_error(algorithm, weight, torch.float16)
    assert_within_bound(as_tensor(out), as_tensor(x), weight.dense, error)


def test_dequantizing_columns_beyond_2_to_the_32_words(last_block: Emulator) -> None:
    weight = build(Case(4, 1024, 64, 128))
    last_block.set_only_last_block(False)
    out = PlainOps(last_block, [within(described(weight), N=WIDE)]).dequantize(WIDE - 64, 64)
    assert torch.equal(as_tensor(out), weight.dense.float().half())


@pytest.mark.parametrize("op", ["dequantize", "gemm_dx", "shuffle", "unshuffle"])
def test_rows_of_W_beyond_2_to_the_32_words(last_block: Emulator, op: str) -> None:
    """The last of them, by every op that divides them among thread blocks."""
    weight = build(Case(4, 64, 64, 64, shuffled=op != "shuffle"))
    other_order = build(replace(weight.case, shuffled=op == "shuffle")).qweight.numpy()
    ops = PlainOps(last_block, [within(described(weight), K=LONG, group_size=LONG)])
    words, no_perm = ops.parts[0]["qweight"], np.empty(0, np.int32)
    if op == "dequantize":
        dense = ops.dequantize(out=sparse(LONG, 64, dtype=np.float16))
        assert torch.equal(as_tensor(dense[-32:].copy()), weight.dense[-32:].float().half())
    elif op == "gemm_dx":
        grad = inputs(weight.case)["grad float16"][:1]
        dx = ops.gemm_dx(grad, sparse(1, LONG, dtype=np.float16))[:, -64:].copy()
        assert_within_bound(as_tensor(dx), as_tensor(grad), weight.dense.t(), bounds.dx_error(64))
    elif op == "unshuffle":
        plain = ops.unshuffle(words, no_perm, out=sparse(*words.shape, dtype=np.int32))
        assert np.array_equal(plain[-2:], other_order[-2:])
    else:
        ops.shuffle(words, no_perm)
        assert np.array_equal(words[-2:], other_order[-2:])


@pytest.mark.parametrize(
    ("algorithm", "order"),
    [("scalar", "sorted"), ("mma", "perm"), ("mma", "sorted"), ("pipelined", "sorted"), ("tiled", "sorted"),
     ("gemm_dx", "sorted")],
)  # fmt: skip
def test_activations_of_more_than_2_to_the_32_numbers(last_block: Emulator, algorithm: str, order: str) -> None:
    """The last row, and its last 64 columns: beyond 2**32 numbers of both, signed or not, gathered or not."""
    weight = build(Case(4, 128, 128, 128, order))
    ops = PlainOps(last_block, [described(weight)])
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
        ops.gemm(x, algorithm, out, workspace=sparse(TALL, K, dtype=np.float16))
    last_x, last = as_tensor(x[-1:].copy()), as_tensor(out[-1:, -64:].copy())
    assert_within_bound(last, last_x, dense[:, -64:], error)


@pytest.mark.parametrize("algorithm", ["scalar", "mma", "pipelined"])
def test_more_than_2_to_the_32_sums_of_a_split_K(last_block: Emulator, algorithm: str) -> None:
    """The last thread block has the second of two splits, and x is 0 for all other rows of W.

    Its sums lie 2**32 numbers behind those of another row, not of the same row in the first split.
    """
    weight, rows = build(Case(4, 512, 64, 128)), TALL + 8
    x, out = sparse(rows, 512, dtype=np.float16), sparse(rows, 64, dtype=np.float16)
    x[-1, 256:] = np.linspace(-1, 1, 256)
    ops = PlainOps(last_block, [described(weight)])
    with last_block.record() as recording:
        ops.gemm(x, algorithm, out, splits=2, workspace=sparse(2, rows, 64, dtype=np.float32))
    assert "add_splits" in kernels_of(recording)[1], "there are fewer tickets than tiles"
    error = bounds.gemm_error(algorithm, weight, torch.float16)
    assert_within_bound(as_tensor(out[-1:].copy()), as_tensor(x[-1:].copy()), weight.dense, error)
