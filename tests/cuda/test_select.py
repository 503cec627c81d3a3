"""select_gemm, compiled by a plain C++ compiler: its rules, its splits and its cost model over real model shapes."""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpus import GPUS, gpu_named
from benchmarks.select import ALGORITHMS, Config, Model, Problem, fields_of
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.testing.bounds import UNIT_ROUNDOFF_F32, gamma
from exllama_ops.testing.errors import TENSOR_CORE_UNIT, Error, cuda_dx_error, cuda_gemm_error

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

FLOAT16, BFLOAT16, FLOAT32 = range(3)
MIB = 1 << 20
DEVICES = {gpu.arch: gpu for gpu in GPUS if gpu.is_first}
# (K, N) of Llama 3 8B and 70B, Qwen2.5 0.5B and 7B, and a head of 152k tokens.
SHAPES = [
    (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192), (896, 896), (896, 128),
    (4864, 896), (3584, 18944), (18944, 3584), (8192, 152064),
]  # fmt: skip
TOKENS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 128, 256, 257, 512, 2048, 16384)


def on(arch: int, **fields: object) -> Problem:
    """A problem on the first GPU of a compute capability."""
    return replace(Problem(), **fields).on(DEVICES[arch])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("select"))


@pytest.mark.parametrize(
    ("why", "problem", "can"),
    [
        ("fp16 on Ampere", on(80), {"scalar", "mma", "pipelined", "tiled", "dense"}),
        ("bf16 on Ampere", on(80, x_dtype=BFLOAT16), {"scalar", "mma", "pipelined", "tiled", "dense"}),
        ("scales of another dtype", on(80, scales_dtype=FLOAT32), {"scalar", "mma", "pipelined", "tiled", "dense"}),
        ("fp16 on Turing", on(75), {"scalar", "mma", "tiled", "dense"}),
        ("bf16 on Turing, which BLAS refuses", on(75, x_dtype=BFLOAT16), {"scalar", "tiled"}),
        ("Volta has no such mma", on(70), {"scalar", "tiled", "dense"}),
        ("Pascal", on(60), {"scalar", "tiled", "dense"}),
        ("float32, which BLAS may run in TF32", on(80, x_dtype=FLOAT32), {"scalar", "tiled"}),
        ("checkpoint order", on(80, shuffled=False), {"scalar", "tiled", "dense"}),
        ("raw g_idx", on(80, shuffled=False, raw_g_idx=True), {"scalar", "tiled", "dense"}),
        ("no 16-byte loads", on(80, aligned=False), {"scalar", "tiled", "dense"}),
        ("a permutation", on(80, has_perm=True), {"scalar", "mma", "pipelined", "tiled", "dense"}),
        ("a group cuts a unit", on(80, group_size=48), {"scalar", "tiled", "dense"}),
        ("groups of 32", on(80, group_size=32), {"scalar", "mma", "pipelined", "tiled", "dense"}),
        ("for 2 bits too", on(80, bits=2, group_size=32), {"scalar", "mma", "pipelined", "tiled", "dense"}),
        ("and for 3", on(80, bits=3, group_size=32), {"scalar", "mma", "tiled", "dense"}),
        ("runs cross groups of 96", on(80, K=4128, group_size=96), {"scalar", "mma", "pipelined", "tiled", "dense"}),
        ("one group of any size", on(80, K=4104, group_size=4104), {"scalar", "mma", "pipelined", "tiled", "dense"}),
        ("a partial last group", on(80, K=576), {"scalar", "mma", "pipelined", "tiled", "dense"}),
        ("too many units to number", on(80, K=2**24, group_size=2**23), {"scalar", "tiled", "dense"}),
        ("rows too long for 32 bits", on(80, N=2**29), {"scalar", "tiled", "dense"}),
        ("tokens too many for 32 bits", on(80, M=2**30), {"scalar", "tiled", "dense"}),
        ("batch-invariant", on(80, batch_invariant=True), {"scalar", "mma"}),
        ("experts, whose rows no host knows", on(80, experts=8), {"scalar", "mma", "pipelined", "tiled"}),
        ("batch-invariant experts", on(80, experts=8, batch_invariant=True), {"scalar", "mma"}),
        ("sums in fp16 allowed", on(80, fp16_accumulation=True), {"scalar", "mma", "pipelined", "tiled"}),
        (
            "and bf16 has none",
            on(80, x_dtype=BFLOAT16, fp16_accumulation=True),
            {"scalar", "mma", "pipelined", "tiled", "dense"},
        ),
        ("BLAS refused", on(80, blas_refused=True), {"scalar", "mma", "pipelined", "tiled"}),
        ("BLAS refused for bf16", on(80, x_dtype=BFLOAT16, blas_refused=True), {"scalar", "mma", "pipelined", "tiled"}),
    ],
)
def test_rules(model: Model, why: str, problem: Problem, can: set[str]) -> None:
    assert set(model.best(problem)) == can, why


@pytest.mark.parametrize(
    ("problem", "algorithm"),
    [
        (on(80), "mma"),
        (on(80, M=64), "pipelined"),
        (on(90, M=4096), "dense"),
        (on(90, M=4096, N=14336), "dense"),
        (on(80, x_dtype=FLOAT32), "scalar"),
        (on(80, M=4096, x_dtype=FLOAT32), "tiled"),
        (on(70), "scalar"),
        (on(80, M=4096, batch_invariant=True), "mma"),
        (on(80, M=4096, fp16_accumulation=True), "pipelined"),
        (on(80, M=4096, blas_refused=True), "pipelined"),
        (on(80, M=4096, blas_refused=True, shuffled=False), "tiled"),
        (on(75, M=4096, x_dtype=BFLOAT16), "tiled"),
        (on(80, M=4096, batch_invariant=True, x_dtype=FLOAT32), "scalar"),
        (on(90, M=4096, experts=128), "pipelined"),
        (on(90, M=8, experts=128), "mma"),
        (on(80, M=64, experts=128, x_dtype=FLOAT32), "scalar"),
        (on(80, M=4096, experts=8, x_dtype=FLOAT32), "tiled"),
    ],
)
def test_every_branch_is_reached(model: Model, problem: Problem, algorithm: str) -> None:
    assert model.chosen(problem).algorithm == algorithm


@pytest.mark.parametrize("arch", DEVICES)
def test_the_model_has_the_rates_of_the_data_sheets(model: Model, arch: int) -> None:
    rates = (ctypes.c_double * 6)()
    model.library.rates(ctypes.c_int64(arch), rates)
    gpu = DEVICES[arch]
    assert tuple(rates) == (round(gpu.dram_bytes_per_cycle, 1), gpu.ghz, gpu.lanes, gpu.floats, gpu.mma, gpu.blas)


@pytest.mark.parametrize("arch", DEVICES)
def test_what_the_driver_does_not_tell_is_of_the_data_sheet(model: Model, arch: int) -> None:
    told = on(arch)
    us = model.estimate(told, model.chosen(told)).us
    for untold in (replace(told, clock_khz=0), replace(told, dram_mb_per_s=0)):
        assert model.chosen(untold) == model.chosen(told)
        assert model.estimate(untold, model.chosen(untold)).us == pytest.approx(us, rel=0.01)


def test_the_rate_of_the_dram_is_that_of_the_device(model: Model) -> None:
    """An H200 has the SMs of an H100 and a faster memory. Half of what is on an A100 80 GB is not as fast."""
    for M in (1, 8):
        h100, h200 = (Problem(M=M, K=14336).on(gpu_named(name)) for name in ("H100", "H200"))
        assert model.estimate(h200, model.chosen(h200)).us < 0.85 * model.estimate(h100, model.chosen(h100)).us
        a100 = on(80, M=M, K=14336)
        older = replace(a100, dram_mb_per_s=1_555_000)
        assert model.estimate(older, model.chosen(older)).us > 1.1 * model.estimate(a100, model.chosen(a100)).us


def splits(units: int, unit_k: int, blocks: int, min_units: int, sms: int) -> Iterator[tuple[int, int]]:
    """Splits of K and the rows of each: up to four thread blocks for every SM, while a split keeps min_units."""
    for wanted in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512):
        units_per_split = -(-units // min(wanted, -(-4 * sms // blocks), max(units // min_units, 1)))
        yield -(-units // units_per_split), units_per_split * unit_k


def with_rows(p: Problem) -> int:
    """Weights that are read: of experts, as many as are to be expected where each row draws one."""
    return int(p.experts * (1 - (1 - 1 / p.experts) ** p.M) + 0.5) if p.experts else 1


def row_tiles(p: Problem, rows: int) -> int:
    """An expert fills its last tile by half."""
    if p.experts <= 1:
        return -(-p.M // rows)
    return max(-(-(2 * p.M + with_rows(p) * (rows - 1)) // (2 * rows)), with_rows(p))


def most_row_tiles(p: Problem, rows: int) -> int:
    """Rows of no expert stand before and after those of experts."""
    runs = min(p.experts + 2, p.M) if p.experts else 1
    return runs + (p.M - runs) // rows


def candidates(p: Problem) -> Iterator[Config]:
    """Every config that can compute a shuffled weight in groups of 128."""
    for rows in (1, 2, 4, 8):
        blocks = -(-p.N // 128) * row_tiles(p, rows)
        for split_k, k_per_split in splits(-(-p.K // 256), 256, blocks, 1, p.sm_count):
            yield Config("scalar", rows, split_k, k_per_split, 0)
    if p.arch >= {FLOAT16: 75, BFLOAT16: 80}.get(p.x_dtype, 1000):
        for rows in (8, 16, 32):
            blocks = -(-p.N // 64) * row_tiles(p, rows)
            for split_k, k_per_split in splits(-(-p.K // 128), 128, blocks, 8, p.sm_count):
                yield Config("mma", rows, split_k, k_per_split, 0)
    if p.arch >= 80 and p.x_dtype != FLOAT32:
        for rows in (32, 64):
            blocks = -(-p.N // 128) * row_tiles(p, rows)
            for split_k, k_per_split in splits(-(-p.K // 128), 128, blocks, 2, p.sm_count):
                yield Config("pipelined", rows, split_k, k_per_split, 0)
    yield Config("tiled", 64, 1, p.K, 0)
    if p.arch >= {FLOAT16: 60, BFLOAT16: 80}.get(p.x_dtype, 1000) and not p.experts:
        room = 64 * MIB // (2 * p.K) // 128 * 128
        chunk = min(math.ceil(p.N / math.ceil(p.N / room) / 128) * 128, p.N)
        yield Config("dense", min(p.M, max(64 * MIB // (4 * chunk), 64)), 1, p.K, chunk)


def cycles_of(p: Problem, blocks: int, dram: float, l2: float, sm_cycles: float, loads: float = 0) -> float:
    """A kernel's, of cost.h again: resources overlap but for a tenth; DRAM gives 92%, or what 0.7 us of loads bring."""
    mhz = p.clock_khz / 1000
    busy = blocks / -(-blocks // p.sm_count)
    rate = 0.92 * p.dram_mb_per_s / mhz
    if loads:
        rate = min(rate, loads * min(blocks, p.sm_count) / (0.7 * mhz))
    times = (dram / rate, l2 / 32 / busy, sm_cycles / busy)
    return 0.9 * max(times) + 0.1 * sum(times)


def modelled_us(p: Problem, c: Config) -> float:
    """The model of cost.h and gemm_*.h, again. A launch takes 2 us, a ticket 1, and to find an expert half of one."""
    gpu, weights = DEVICES[p.arch], p.K * p.N
    words = weights * p.bits / 8 + p.K / p.group_size * p.N * (2 + p.bits / 8)
    number = 4 if p.x_dtype == FLOAT32 else 2
    x, out = p.M * p.K * number, p.M * p.N * number
    if c.algorithm == "dense":
        unpacking = (6 + 14 / {2: 16, 3: 32, 4: 8, 8: 4}[p.bits]) / gpu.lanes

        def blas(rows: int, columns: int) -> float:
            return min(
                -(-(-(-rows // height) * -(-columns // width)) // p.sm_count) * height * width * p.K / part / gpu.blas
                for height, width, part in ((128, 256, 0.85), (128, 128, 0.8), (64, 128, 0.65), (64, 64, 0.5))
            )

        chunks = [min(c.chunk, p.N - first) for first in range(0, p.N, c.chunk)]
        parts = [min(c.rows, p.M - first) for first in range(0, p.M, c.rows)]
        launches = len(chunks) * (1 + p.has_perm + 2 * len(parts))
        dram = 2 * weights if 2 * p.K * c.chunk > p.l2_bytes // 2 else 0
        cycles = cycles_of(p, p.sm_count, words + dram, 2 * weights, weights * unpacking)
        cycles += cycles_of(p, p.sm_count, 0, 10 * p.M * p.N, 0)
        cycles += max(
            sum(blas(rows, columns) for rows, columns in itertools.product(parts, chunks)),
            cycles_of(p, p.sm_count, dram * len(parts), 2 * weights * len(parts), 0),
        )
        return 2 * launches + cycles / p.clock_khz * 1000
    wide = p.x_dtype == BFLOAT16 and p.bits == 8
    issue, tensor = (
        ((3.9 if wide else 2.5) + 0.8 * (p.bits == 8) + 0.27 * c.rows / 8) / gpu.lanes,
        c.rows / (gpu.mma or 1),
    )
    alone = 1.3 if row_tiles(p, c.rows) * -(-p.N // 128) * c.split_k <= p.sm_count else 1
    stage = {2: (64, 2), 3: (128, 6), 4: (64, 4), 8: (32, 4)}[p.bits]  # rows of W, and KiB of words
    stages = min(48 * 1024 // (1024 * stage[1] + 2 * c.rows * stage[0] + 16 * (32 + p.bits)), 5)
    of_octets = {8: 1, 16: 2, 32: 4}.get(c.rows, 0)
    runs_ahead = 2 if p.bits <= 3 and of_octets <= 2 else 1
    columns, a_weight, loads, resident = {
        "scalar": (
            128,
            max(((2.6 if p.bits == 3 else 2.4) + 1.1 * c.rows) / gpu.lanes, (1 + c.rows) / gpu.floats),
            128 * 16 * (3 if p.bits == 3 else 4),
            4 if c.rows <= 2 else 3,
        ),
        "mma": (
            64,
            ((2.9 if wide else 1.5) + c.rows / 32) / gpu.lanes + c.rows / (gpu.mma or 1),
            runs_ahead * 8 * 128 * 32 * p.bits / 8,
            1 if of_octets == 4 else 3 if (of_octets, p.bits) == (1, 4) else 2,
        ),
        "pipelined": (
            128,
            alone * (max(issue, tensor) + min(issue, tensor) / 2),
            (stages - 1) * 1024 * stage[1],
            2 if c.rows == 64 else 3,
        ),
        "tiled": (64, max(88.8 / gpu.lanes, 64 / gpu.floats), 256 * p.bits, 3),
    }[c.algorithm]
    passes, tiles = row_tiles(p, c.rows), -(-p.N // columns)
    blocks = passes * tiles * c.split_k
    l2, sm_cycles = words * passes + x * tiles + out, weights * passes * a_weight
    us = 2.5 if p.experts else 2.0
    if p.has_perm and (p.M >= 5 or c.rows > 8):
        us += 2 + cycles_of(p, p.sm_count, 0, 2 * x, p.M * p.K / 8) / p.clock_khz * 1000
    elif p.has_perm:
        l2 += 4 * p.K * passes * tiles
        sm_cycles += p.M * p.K * tiles / 8
    if c.split_k > 1:
        partials = 4 * c.split_k * p.M * p.N
        in_one_launch = most_row_tiles(p, c.rows) * tiles <= 512
        l2 += partials * (1 + in_one_launch)
        us += 1 if in_one_launch else 2 + cycles_of(p, p.sm_count, 0, partials + out, 0) / p.clock_khz * 1000
    in_flight = loads * min(resident, -(-blocks // p.sm_count))
    return us + cycles_of(p, blocks, words * with_rows(p) + x + out, l2, sm_cycles, in_flight) / p.clock_khz * 1000


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32])
@pytest.mark.parametrize("has_perm", [False, True], ids=["in-order", "perm"])
def test_no_config_is_faster_by_the_model(model: Model, arch: int, dtype: int, has_perm: bool) -> None:
    """This holds for all algorithms, rows and divisions, every M and real shapes. The model is written twice."""
    for (K, N), bits, M in itertools.product(SHAPES[has_perm::2], SUPPORTED_BITS, TOKENS[has_perm::2]):
        problem = on(arch, M=M, K=K, N=N, bits=bits, x_dtype=dtype, has_perm=has_perm)
        config = model.chosen(problem)
        least = min(modelled_us(problem, candidate) for candidate in candidates(problem))
        assert modelled_us(problem, config) == pytest.approx(least, rel=1e-9), (problem, config)
        assert model.estimate(problem, config).us == pytest.approx(least, rel=1e-9), (problem, config)


# (experts, rows of a token, K, N) of Mixtral 8x7B and Qwen3 30B-A3B: gate or up, and down.
EXPERTS = [(8, 2, 4096, 14336), (8, 2, 14336, 4096), (128, 8, 2048, 768), (128, 8, 768, 2048)]


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("has_perm", [False, True], ids=["in-order", "perm"])
def test_no_config_of_experts_is_faster_by_the_model(model: Model, arch: int, has_perm: bool) -> None:
    for (E, top, K, N), dtype, tokens in itertools.product(EXPERTS, (FLOAT16, FLOAT32), (1, 3, 8, 64, 512, 4096)):
        problem = on(arch, M=tokens * top, K=K, N=N, x_dtype=dtype, has_perm=has_perm, experts=E)
        config = model.chosen(problem)
        least = min(modelled_us(problem, candidate) for candidate in candidates(problem))
        assert modelled_us(problem, config) == pytest.approx(least, rel=1e-9), (problem, config)
        assert model.estimate(problem, config).us == pytest.approx(least, rel=1e-9), (problem, config)


def tiles_of(model: Model, problem: Problem, rows: int) -> tuple[int, int]:
    """The tiles that the model expects, and the most that there may be."""
    out = (ctypes.c_int64 * 2)()
    model.library.row_tiles(fields_of(problem), ctypes.c_int64(rows), out)
    return out[0], out[1]


def test_the_model_expects_the_tiles_of_rows_that_draw_an_expert_each(model: Model) -> None:
    rng = random.Random(0)
    for E, M, rows in itertools.product((2, 8, 128), (1, 2, 8, 64, 512, 4096), (1, 8, 32, 64)):
        drawn = [Counter(rng.randrange(E) for _ in range(M)) for _ in range(100)]
        tiles = [sum(-(-count // rows) for count in counts.values()) for counts in drawn]
        expected, most = tiles_of(model, Problem(M=M, experts=E), rows)
        assert expected == pytest.approx(sum(tiles) / len(tiles), rel=0.25, abs=1), (E, M, rows)
        assert max(tiles) <= most


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_grid_has_the_most_tiles_of_rows(model: Model, rows: int) -> None:
    """Rows are cut into the runs of up to 3 experts, and those of none, in every way."""
    for M, E in itertools.product(range(1, 8), range(1, 4)):
        cuts = itertools.combinations_with_replacement(range(M + 1), E + 1)
        runs = ([stop - start for start, stop in itertools.pairwise((0, *cut, M))] for cut in cuts)
        most = max(sum(-(-count // rows) for count in of_cut) for of_cut in runs)
        assert tiles_of(model, Problem(M=M, experts=E), rows)[1] == most
        assert tiles_of(model, Problem(M=M), rows) == (-(-M // rows),) * 2


# 2**20 weights and more: of fewer, only thousands of tokens pay for the launches of dense.
LARGE_WEIGHTS = [(K, N, bits) for K, N in SHAPES if K * N >= 1 << 20 for bits in SUPPORTED_BITS]


def us_of(model: Model, problem: Problem) -> dict[str, float]:
    """The time of each algorithm's best."""
    return {name: model.estimate(problem, config).us for name, config in model.best(problem).items()}


@pytest.mark.parametrize("arch", [90, 100])
def test_dense_begins_between_32_and_2048_tokens(model: Model, arch: int) -> None:
    """About 100 to 1024, where a BLAS has faster instructions than mma.sync."""
    for K, N, bits in LARGE_WEIGHTS:
        at = [model.chosen(on(arch, M=M, K=K, N=N, bits=bits)).algorithm for M in (31, 2048)]
        assert at[0] in ("mma", "pipelined"), (K, N, bits)
        assert at[1] == "dense", (K, N, bits)


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 120])
def test_dense_gains_little_where_mma_has_the_rate_of_a_blas(model: Model, arch: int) -> None:
    """Dense saves the unpacking, which is an eighth (GeForce) to a third (A100) of a pass of 32 rows.

    A BLAS also loads x once for more columns. Where W leaves the L2 (T4, RTX 3090), that takes some of what it saves.
    """
    for K, N, bits in LARGE_WEIGHTS:
        assert model.chosen(on(arch, M=127, K=K, N=N, bits=bits)).algorithm in ("mma", "pipelined")
        us = us_of(model, on(arch, M=4096, K=K, N=N, bits=bits))
        assert us["dense"] > 0.5 * us.get("pipelined", us["mma"]), (K, N, bits)


def test_dense_scratch_is_64_mib_for_numbers_of_w_and_as_much_for_results(model: Model) -> None:
    """Many columns of W are made in equal chunks, and many rows of x multiplied in parts."""
    for arch, M, (K, N) in itertools.product(DEVICES, (512, 2048, 16384, 10**6), SHAPES):
        config = model.best(on(arch, M=M, K=K, N=N))["dense"]
        assert 1 <= config.chunk <= N
        assert config.rows >= min(M, 64)
        assert 2 * K * config.chunk <= 64 * MIB
        assert 4 * config.rows * config.chunk <= 64 * MIB
        assert config.chunk % 128 == 0 or config.chunk == N
        chunks = -(-N // config.chunk)
        assert chunks == 1 or 2 * K * N > 64 * MIB
        assert config.chunk - N / chunks < 128


@pytest.mark.parametrize("arch", DEVICES)
def test_batch_invariant_sums_are_divided_without_a_look_at_M(model: Model, arch: int) -> None:
    for K, N in SHAPES:
        for dtype, experts in itertools.product((FLOAT16, FLOAT32), (0, 8)):
            problem = on(arch, K=K, N=N, x_dtype=dtype, batch_invariant=True, experts=experts)
            configs = [model.chosen(replace(problem, M=M)) for M in TOKENS]
            assert len({(c.algorithm, c.split_k, c.k_per_split) for c in configs}) == 1
            assert len({c.rows for c in configs}) > 1


def test_decoding_keeps_the_memory_busy(model: Model) -> None:
    """At one row, where a weight is large enough for its bytes to take longer than launches."""
    for gpu, (K, N) in itertools.product(GPUS, SHAPES):
        problem = Problem(K=K, N=N).on(gpu)
        estimate = model.estimate(problem, model.chosen(problem))
        bytes_us = estimate.dram_bytes / gpu.dram_gb_per_s / 1e3
        if gpu.arch in (80, 89, 90) and bytes_us > 2:
            assert bytes_us > 0.6 * (estimate.us - 2 * estimate.launches), (gpu, K, N)


def test_the_model_has_the_instructions_that_were_counted(model: Model) -> None:
    """Within a fifth, since it is made of few constants."""
    instructions = model.library.instructions
    instructions.restype = ctypes.c_double
    counted = [
        kernel
        for kernel in json.loads((ROOT / "benchmarks" / "results" / "cuda-device-code.json").read_text())["kernels"]
        if "per_weight" in kernel
    ]
    assert {kernel["kernel"] for kernel in counted} == {"mma", "pipelined", "scalar"}
    for kernel in counted:
        problem = on(
            80,
            bits=kernel["bits"],
            group_size=kernel.get("unit", 128),
            x_dtype=BFLOAT16 if kernel.get("dtype") == "bfloat16" else FLOAT16,
        )
        modelled = instructions(
            fields_of(problem), ctypes.c_int64(ALGORITHMS.index(kernel["kernel"])), ctypes.c_int64(kernel["tokens"])
        )
        assert abs(modelled / kernel["per_weight"] - 1) < 0.2, (kernel, modelled)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_declared_errors_have_the_additions_of_the_kernels(model: Model, algorithm: str) -> None:
    """`exllama_ops.testing.errors` counts by the sizes of the kernels, whose headers count by themselves."""
    additions = model.library.additions
    additions.restype = ctypes.c_int64
    unit = TENSOR_CORE_UNIT if algorithm in ("mma", "pipelined") else UNIT_ROUNDOFF_F32
    rounding = 2.0**-11 if algorithm == "dense" else 0.0
    for K, G in ((32, 1), (576, 5), (4096, 32), (4104, 4104), (14336, 112)):
        counted = additions(*map(ctypes.c_int64, (ALGORITHMS.index(algorithm), K, G)))
        declared = cuda_gemm_error(algorithm, torch.float16, K=K, G=G)
        assert declared == Error(rounding + gamma(counted, unit)), (K, G)


@pytest.mark.parametrize(
    ("why", "problem", "algorithm"),
    [
        ("many tokens", on(90, M=2048), "dense"),
        ("on Ampere", on(80, M=2048, x_dtype=BFLOAT16), "dense"),
        ("with an order", on(90, M=2048, has_perm=True), "dense"),
        ("a small weight", on(90, K=128, N=128), "tiled"),
        ("float32, which BLAS may run in TF32", on(90, M=2048, x_dtype=FLOAT32), "tiled"),
        ("scales that 16 bits do not hold", on(90, M=2048, scales_dtype=FLOAT32), "tiled"),
        ("scales beyond the range of float16", on(90, M=2048, scales_dtype=BFLOAT16), "tiled"),
        ("in the range of bfloat16", on(90, M=2048, x_dtype=BFLOAT16, scales_dtype=BFLOAT16), "dense"),
        ("no rows that depend on M", on(90, M=2048, batch_invariant=True), "tiled"),
        ("torch refuses its BLAS", on(90, M=2048, blas_refused=True), "tiled"),
        ("or float32 results", on(90, M=2048, fp16_accumulation=True), "tiled"),
    ],
)
def test_the_gradient_goes_by_a_dense_w_where_it_is_faster_and_exact(
    model: Model, why: str, problem: Problem, algorithm: str
) -> None:
    config = (ctypes.c_int64 * 5)()
    model.library.chosen_dx(fields_of(problem), config)
    assert ALGORITHMS[config[0]] == algorithm, why
    if algorithm == "dense":
        assert 2 * 2 * problem.N * config[4] <= 64 * MIB
        assert 2 * 4 * config[1] * config[4] <= 64 * MIB


def test_the_declared_error_of_the_gradient_has_the_additions_of_dense(model: Model) -> None:
    additions = model.library.dx_additions
    additions.restype = ctypes.c_int64
    for N in (8, 4096, 28672):
        counted = gamma(additions(ctypes.c_int64(N)), TENSOR_CORE_UNIT)
        assert cuda_dx_error("dense", N) == Error((1 + 2.0**-6) * counted)
