"""The choice of tiles by timing, by a timer that is told the times.

The tests run in Triton's interpreter, in processes apart.
"""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from exllama_ops.backends.triton import tiles, tuned_tiles
from exllama_ops.backends.triton.tiles import Tile
from exllama_ops.backends.triton.tuned_tiles import Problem

SETUP = """
from dataclasses import replace
import torch, exllama_ops
from conformance.weights import Case, build
from exllama_ops.backends.triton import gemm, gemm_dx, tiles, tune, tuned_tiles
from exllama_ops.layout.weight import Weight
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.errors import OutOfResources, PTXASError

weight = build(Case(4, 104, 48, 32))
inputs = {"gptq_gemm": torch.randn(9, 104).half(), "gptq_gemm_dx": torch.randn(9, 48).half()}
launched, timed, partials = [], [], []
unfit = {
    4: OutOfResources(2, 1, "shared memory"),
    5: PTXASError("no registers"),
    6: CompileTimeAssertionFailure(None, None, "no layout"),
}
launch = gemm.launch

def record(kernel, grid, tensors, sizes, constants, **options):
    if kernel is gemm.dot_kernel:
        launched.append(("gptq_gemm", constants["BLOCK_M"], constants["BLOCK_N"], *options.values()))
    elif kernel is gemm_dx.gemm_dx_kernel:
        launched.append(("gptq_gemm_dx", constants["BLOCK_M"], 8 * constants["BLOCK_B"], *options.values()))
    launch(kernel, grid, tensors, sizes, constants, **options)
    partials.append(tensors.get("partials_ptr", tensors["out_ptr"]))

def time_ms(run):
    run()
    op = launched[-1][0]
    timed.append(op)
    if timed.count(op) in unfit:
        raise unfit[timed.count(op)]
    return abs(timed.count(op) - 3)  # the third is the fastest

def product(op):
    result = getattr(torch.ops.exllama, op)(inputs[op], *weight.args)
    print(*launched[-1])
    return result

def warmup():
    exllama_ops.warmup([weight.args], tokens=(9,), gradient=True, autotune=True)
    print(*(timed.count(op) for op in inputs), "timed")

gemm.launch = gemm_dx.launch = record
tune.time_ms = time_ms
"""

TUNES = """
before = [product(op) for op in inputs]
warmup()
assert all(torch.equal(product(op), result) for op, result in zip(inputs, before))
warmup()
"""

# The interpreter multiplies tiles by BLAS, whose order of sums depends on the CPU and on the tile's shape. Sums in
# double and one rounding do not.
BITS = """
import numpy as np

matmul = np.matmul
np.matmul = lambda a, b, dtype=None: matmul(a.astype(np.float64), b.astype(np.float64)).astype(dtype or a.dtype)

host = tiles.HOST
for case, M in ((Case(4, 488, 40, 32), 9), (Case(4, 488, 40, 24, "perm"), 2), (Case(8, 488, 40, 24), 5)):
    packed, x = Weight.of(*build(case).args), torch.randn(M, case.K, dtype=torch.float16)
    plan = tiles.plan_gemm(M, packed, x.dtype, host, False)
    x = gemm.in_order_of_rows(x, plan, packed)
    choices = tuned_tiles.candidates(plan.form, host.arch, plan.tile)
    partials.clear()
    results = [gemm.compute(tile, [plan], x, [packed]) for tile in choices]
    assert len(results) > 3 and plan.splits > 1
    assert all(torch.equal(result, results[0]) for result in results)
    assert all(torch.equal(sums, partials[0]) for sums in partials)  # in float32: rounding hides nothing
    print(plan.form)

grad = torch.randn(40, 40)
for case in (Case(4, 488, 40, 32, "perm"), Case(3, 480, 32, 24, "raw", False)):
    packed = Weight.of(*build(case).args)
    plan = tiles.plan_dx(case.bits, host)
    choices = tuned_tiles.candidates("dx", host.arch, plan.tile)
    results = [gemm_dx.compute_dx(replace(plan, tile=tile), grad[:, : case.N].contiguous(), packed) for tile in choices]
    assert len(results) > 3
    assert all(torch.equal(result, results[0]) for result in results)
    print("dx")
"""

REFUSALS = """
from unittest import mock
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

def refusal(run):
    try:
        run()
    except RuntimeError as error:
        print(error)

with mock.patch.object(tune, "is_capturing", lambda device: True):
    refusal(warmup)
with FakeTensorMode() as mode:
    fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in weight.args]
    refusal(lambda: exllama_ops.warmup([fake], tokens=(9,), autotune=True))
refusal(lambda: make_fx(lambda x: (warmup(), x)[1])(inputs["gptq_gemm"]))
with mock.patch("torch.compiler.is_compiling", lambda: True):
    refusal(warmup)
assert not timed
unfit = dict.fromkeys(range(9), OutOfResources(2, 1, "shared memory"))
refusal(warmup)
"""

# A process that reads its choices anew has them as a new one would.
KEPT = """
warmup()
tuned_tiles._choices.clear()
[product(op) for op in inputs]
warmup()
"""

UNUSABLE = """
for text in texts:
    open(file, "w").write(text)
    tuned_tiles._choices.clear()
    product("gptq_gemm")
    product("gptq_gemm_dx")
"""

# Before the timing, and after it
TABLE = ["gptq_gemm 64 128 4 1", "gptq_gemm_dx 64 256 4 1"]
FASTEST = ["gptq_gemm 128 128 4 1", "gptq_gemm_dx 128 256 4 1"]
PRODUCTS = "for op in inputs: product(op)\n"


def run(code: str, cache: Path) -> tuple[list[str], list[str]]:
    """The lines that it prints, and its warnings."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "EXLLAMA_OPS_BACKEND": "triton"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "EXLLAMA_OPS_CACHE": str(cache)}
    command = [sys.executable, "-W", "always::UserWarning", "-c", SETUP + code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines(), [line for line in result.stderr.splitlines() if "tuned tiles" in line]


def counts_of_candidates() -> str:
    table = {"dot": tiles.tile_of("dot", "host", 4, 9, "tile"), "dx": tiles.plan_dx(4, tiles.HOST).tile}
    return " ".join(str(len(tuned_tiles.candidates(form, "host", tile))) for form, tile in table.items())


def test_the_fastest_tile_is_kept_on_disk(tmp_path: Path) -> None:
    timed = f"{counts_of_candidates()} timed"
    assert run(KEPT, tmp_path) == ([timed, *FASTEST, timed], [])


@pytest.mark.slow
def test_the_fastest_tile_serves_from_then_on_and_in_a_new_process(tmp_path: Path) -> None:
    counts = counts_of_candidates()
    lines, warned = run(TUNES, tmp_path)
    assert lines == [*TABLE, f"{counts} timed", *FASTEST, f"{counts} timed"]
    assert not warned
    (file,) = (tmp_path / "triton").iterdir()
    assert run(f"{PRODUCTS}warmup()", tmp_path) == ([*FASTEST, "0 0 timed"], [])

    record = json.loads(file.read_text())
    foreign = {**record, "for": {**record["for"], "device": "another"}}
    wrong = {**record, "choices": [[*record["choices"][0][:-1], [16, 256, 1, 1]]]}
    texts = ['{"for', "[1]", json.dumps(foreign), json.dumps(wrong)]
    lines, warned = run(f"file, texts = {str(file)!r}, {texts!r}\n{UNUSABLE}", tmp_path)
    assert lines == TABLE * len(texts)
    assert len(warned) == len(texts)
    assert all(str(file) in line for line in warned)
    assert run(f"warmup()\n{PRODUCTS}", tmp_path)[0] == [f"{counts} timed", *FASTEST]
    assert run(PRODUCTS, tmp_path) == (FASTEST, [])


def test_no_candidate_changes_a_bit(tmp_path: Path) -> None:
    assert run(BITS, tmp_path)[0] == ["dot", "gemv", "float_dot", "dx", "dx"]


def test_nothing_is_timed_in_a_capture_or_a_traced_call(tmp_path: Path) -> None:
    traced = "exllama_ops: kernels cannot be tuned in a traced call"
    captured = "exllama_ops: kernels cannot be tuned while a CUDA graph is being captured"
    *refusals, no_tile = run(REFUSALS, tmp_path)[0]
    assert refusals == [captured, traced, traced, traced]
    assert no_tile.startswith("exllama_ops: no tile of Problem(form='dot', ")
    assert "out of resource: shared memory" in no_tile


def test_choices_that_cannot_be_kept_serve_their_process(tmp_path: Path) -> None:
    (tmp_path / "triton").write_text("a file where the folder should be")
    lines, warned = run(f"warmup()\n{PRODUCTS}", tmp_path)
    assert lines[1:] == FASTEST
    assert any("serve this process alone" in line for line in warned)


CPU = torch.device("cpu")
TILE = Tile(64, 128, 4, 1)


def problem(K: int) -> Problem:
    return Problem("dot", 4, K, 96, 16, 8, "tile", False, TILE)


@pytest.fixture
def no_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(tmp_path))
    before = dict(tuned_tiles._choices)
    tuned_tiles._choices.clear()
    yield
    tuned_tiles._choices.clear()
    tuned_tiles._choices.update(before)


def test_choices_of_many_threads_are_all_kept(no_choices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    read = tuned_tiles._read

    def read_slowly(device: torch.device) -> dict[Problem, Tile]:
        time.sleep(1e-2)
        return read(device)

    monkeypatch.setattr(tuned_tiles, "_read", read_slowly)
    sizes = [32 * size for size in range(1, 9)]
    threads = [threading.Thread(target=tuned_tiles.keep, args=(CPU, problem(K), TILE)) for K in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {problem(K): TILE for K in sizes}
    assert tuned_tiles.choices_of(CPU) == expected
    assert read(CPU) == expected


def test_without_a_home_choices_serve_their_process(no_choices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("EXLLAMA_OPS_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned_tiles.choices_of(CPU) == {}
    with pytest.warns(UserWarning, match="serve this process alone: there is no home directory .*EXLLAMA_OPS_CACHE"):
        tuned_tiles.keep(CPU, problem(32), TILE)
    assert tuned_tiles.choices_of(CPU) == {problem(32): TILE}


def test_choices_that_cannot_be_written_leave_nothing(
    no_choices: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.warns(UserWarning, match="serve this process alone: .*No space left on device"):
        tuned_tiles.keep(CPU, problem(32), TILE)
    assert list((tmp_path / "triton").iterdir()) == []


def test_candidates_have_the_matrix_instruction_of_the_table() -> None:
    def tiles_of(form: str, arch: str, tile: Tile) -> set[tuple[int, int]]:
        return {(other.block_m, other.block_n) for other in tuned_tiles.candidates(form, arch, tile)}

    assert tiles_of("dot", "sm80", Tile(32, 64, 4, 3)) == {(32, 64), (16, 64), (64, 64), (32, 32), (32, 128)}
    assert (32, 128) in tiles_of("dot", "sm80", Tile(64, 128, 8, 3))
    assert tiles_of("dot", "sm90", Tile(64, 128, 8, 3)) == {(64, 128), (128, 128), (64, 64), (64, 256)}
    assert (64, 64) not in tiles_of("dot", "sm100", Tile(32, 64, 4, 3))
    assert (32, 64) not in tiles_of("dot", "cdna", Tile(16, 64, 4, 3))
    assert tuned_tiles.candidates("float_dot", "other", Tile(32, 64, 4, 2)) == [Tile(32, 64, 4, 2)]
