"""select_gemm, compiled by a plain C++ compiler: its rules, its splits and its cost model over real model shapes."""

from __future__ import annotations

import ctypes
import itertools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpus import GPUS
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.testing.bounds import UNIT_ROUNDOFF_F32, gamma
from exllama_ops.testing.errors import TENSOR_CORE_UNIT, Error, cuda_gemm_error

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

ALGORITHMS = ("scalar", "mma", "tiled", "dense")
FLOAT16, BFLOAT16, FLOAT32 = range(3)
MIB = 1 << 20
DEVICES = {gpu.arch: gpu for gpu in GPUS}
# (K, N) of Llama 3 8B and 70B, Qwen2.5 0.5B and 7B, and a head of 152k tokens.
SHAPES = [
    (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192), (896, 896), (896, 128),
    (4864, 896), (3584, 18944), (18944, 3584), (8192, 152064),
]  # fmt: skip
TOKENS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 128, 256, 257, 512, 2048, 16384)


@dataclass(frozen=True)
class Problem:
    M: int = 1
    K: int = 4096
    N: int = 4096
    bits: int = 4
    group_size: int = 128
    x_dtype: int = FLOAT16
    scales_dtype: int = FLOAT16
    shuffled: bool = True
    has_perm: bool = False
    raw_g_idx: bool = False
    aligned: bool = True
    batch_invariant: bool = False
    fp16_accumulation: bool = False
    blas_refused: bool = False
    arch: int = 80
    sm_count: int = DEVICES[80].sms
    l2_bytes: int = DEVICES[80].l2_mib * MIB

    def on(self, arch: int) -> Problem:
        return replace(self, arch=arch, sm_count=DEVICES[arch].sms, l2_bytes=DEVICES[arch].l2_mib * MIB)


@dataclass(frozen=True)
class Config:
    algorithm: str
    rows: int
    split_k: int
    k_per_split: int
    chunk: int
    cycles: dict[str, float]  # of the algorithms that can


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("select") / "select.so"
    source = Path(__file__).parent / "select_gemm.cpp"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-I", str(ROOT / "csrc")]
    subprocess.run([str(COMPILER), *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def as_fields(problem: Problem) -> ctypes.Array[ctypes.c_int64]:
    fields = [int(field) for field in astuple(problem)]
    return (ctypes.c_int64 * len(fields))(*fields)


@pytest.fixture(scope="module")
def select(compiled: ctypes.CDLL) -> Callable[[Problem], Config]:
    def call(problem: Problem) -> Config:
        config, cycles = (ctypes.c_int64 * 5)(), (ctypes.c_double * 4)()
        compiled.select(as_fields(problem), config, cycles)
        modelled = {name: value for name, value in zip(ALGORITHMS, cycles, strict=True) if value >= 0}
        return Config(ALGORITHMS[config[0]], *config[1:], modelled)

    return call


@pytest.mark.parametrize(
    ("why", "problem", "can"),
    [
        ("fp16 on Ampere", Problem(), {"scalar", "mma", "tiled", "dense"}),
        ("bf16 on Ampere", Problem(x_dtype=BFLOAT16), {"scalar", "mma", "tiled", "dense"}),
        ("scales of another dtype", Problem(scales_dtype=FLOAT32), {"scalar", "mma", "tiled", "dense"}),
        ("fp16 on Turing", Problem().on(75), {"scalar", "mma", "tiled", "dense"}),
        ("bf16 on Turing, which BLAS refuses", Problem(x_dtype=BFLOAT16).on(75), {"scalar", "tiled"}),
        ("Volta has no such mma", Problem().on(70), {"scalar", "tiled", "dense"}),
        ("Pascal", Problem().on(60), {"scalar", "tiled", "dense"}),
        ("float32, which BLAS may run in TF32", Problem(x_dtype=FLOAT32), {"scalar", "tiled"}),
        ("checkpoint order", Problem(shuffled=False), {"scalar", "tiled", "dense"}),
        ("raw g_idx", Problem(shuffled=False, raw_g_idx=True), {"scalar", "tiled", "dense"}),
        ("no 16-byte loads", Problem(aligned=False), {"scalar", "tiled", "dense"}),
        ("a permutation", Problem(has_perm=True), {"scalar", "mma", "tiled", "dense"}),
        ("a group cuts a unit", Problem(group_size=48), {"scalar", "tiled", "dense"}),
        ("groups of 32", Problem(group_size=32), {"scalar", "mma", "tiled", "dense"}),
        ("for 2 bits too", Problem(bits=2, group_size=32), {"scalar", "mma", "tiled", "dense"}),
        ("and for 3", Problem(bits=3, group_size=32), {"scalar", "mma", "tiled", "dense"}),
        ("runs cross groups of 96", Problem(K=4128, group_size=96), {"scalar", "mma", "tiled", "dense"}),
        ("one group of any size", Problem(K=4104, group_size=4104), {"scalar", "mma", "tiled", "dense"}),
        ("a partial last group", Problem(K=576), {"scalar", "mma", "tiled", "dense"}),
        ("too many units to number", Problem(K=2**24, group_size=2**23), {"scalar", "tiled", "dense"}),
        ("rows too long for 32 bits", Problem(N=2**29), {"scalar", "tiled", "dense"}),
        ("tokens too many for 32 bits", Problem(M=2**30), {"scalar", "tiled", "dense"}),
        ("batch-invariant", Problem(batch_invariant=True), {"scalar", "mma"}),
        ("sums in fp16 allowed", Problem(fp16_accumulation=True), {"scalar", "mma", "tiled"}),
        ("and bf16 has none", Problem(x_dtype=BFLOAT16, fp16_accumulation=True), {"scalar", "mma", "tiled", "dense"}),
        ("BLAS refused", Problem(blas_refused=True), {"scalar", "mma", "tiled"}),
        ("BLAS refused for bf16", Problem(x_dtype=BFLOAT16, blas_refused=True), {"scalar", "mma", "tiled"}),
    ],
)
def test_rules(select: Callable[[Problem], Config], why: str, problem: Problem, can: set[str]) -> None:
    assert set(select(problem).cycles) == can, why


@pytest.mark.parametrize(
    ("problem", "algorithm"),
    [
        (Problem(), "mma"),
        (Problem(M=64), "mma"),
        (Problem(M=4096), "dense"),
        (Problem(M=4096, N=14336).on(90), "dense"),
        (Problem(x_dtype=FLOAT32), "scalar"),
        (Problem(M=4096, x_dtype=FLOAT32), "tiled"),
        (Problem().on(70), "scalar"),
        (Problem(M=4096, batch_invariant=True), "mma"),
        (Problem(M=4096, fp16_accumulation=True), "mma"),
        (Problem(M=4096, blas_refused=True), "mma"),
        (Problem(M=4096, blas_refused=True, shuffled=False), "tiled"),
        (Problem(M=4096, x_dtype=BFLOAT16).on(75), "tiled"),
        (Problem(M=4096, batch_invariant=True, x_dtype=FLOAT32), "scalar"),
    ],
)
def test_every_branch_is_reached(select: Callable[[Problem], Config], problem: Problem, algorithm: str) -> None:
    assert select(problem).algorithm == algorithm


@pytest.mark.parametrize("arch", DEVICES)
def test_the_model_has_the_rates_of_the_data_sheets(compiled: ctypes.CDLL, arch: int) -> None:
    rates = (ctypes.c_double * 5)()
    compiled.rates(ctypes.c_int64(arch), rates)
    gpu = DEVICES[arch]
    assert tuple(rates) == (round(gpu.dram_bytes_per_cycle, 1), gpu.lanes, gpu.floats, gpu.mma, gpu.blas)


def split(units: int, unit_k: int, blocks: int, min_units: int, sms: int) -> tuple[int, int]:
    """Splits of K and the rows of each: four thread blocks for every SM, while a split keeps min_units."""
    wanted = min(-(-4 * sms // blocks), max(units // min_units, 1), 65535)
    units_per_split = -(-units // wanted)
    return -(-units // units_per_split), units_per_split * unit_k


@dataclass(frozen=True)
class Candidate:
    algorithm: str
    rows: int
    split_k: int
    k_per_split: int
    chunk: int


def candidates(p: Problem) -> Iterator[Candidate]:
    """Every config that can compute a shuffled weight in groups of 128."""
    for rows in (1, 2, 4, 8):
        blocks = -(-p.N // 128) * -(-p.M // rows)
        yield Candidate("scalar", rows, *split(-(-p.K // 256), 256, blocks, 1, p.sm_count), 0)
    if p.arch >= {FLOAT16: 75, BFLOAT16: 80}.get(p.x_dtype, 1000):
        for rows in (8, 16, 32):
            blocks = -(-p.N // 64) * -(-p.M // rows)
            yield Candidate("mma", rows, *split(-(-p.K // 128), 128, blocks, 8, p.sm_count), 0)
    yield Candidate("tiled", 64, 1, p.K, 0)
    if p.arch >= {FLOAT16: 60, BFLOAT16: 80}.get(p.x_dtype, 1000):
        rows = min(p.M, p.K // 2)
        chunk = min(64 * MIB, p.l2_bytes // 2) // (2 * p.K + 4 * rows) // 64 * 64
        yield Candidate("dense", rows, 1, p.K, min(max(chunk, 64), p.N))


def modelled_cycles(p: Problem, c: Candidate) -> float:
    """The model of cost.h and gemm_*.h, again: resources overlap but for a tenth, and a launch takes 4000 cycles."""
    gpu, weights = DEVICES[p.arch], p.K * p.N
    words = weights * p.bits / 8 + p.K / p.group_size * p.N * (2 + p.bits / 8)

    def overlapped(blocks: int, dram: float, l2: float, sm_cycles: float) -> float:
        busy = min(blocks, p.sm_count)
        times = (dram / round(gpu.dram_bytes_per_cycle, 1) / p.sm_count, l2 / 32 / busy, sm_cycles / busy)
        return 0.9 * max(times) + 0.1 * sum(times)

    if c.algorithm == "dense":
        unpacking = (15 + 120 / {2: 16, 3: 32, 4: 8, 8: 4}[p.bits]) / gpu.lanes
        return (
            overlapped(p.sm_count, words, 2 * weights, weights * unpacking)
            + weights * p.M / gpu.blas / p.sm_count
            + 10 * p.M * p.N / 32 / p.sm_count
            + 4000 * -(-p.N // c.chunk) * (1 + 2 * -(-p.M // c.rows))
        )
    wide = p.x_dtype == BFLOAT16 and p.bits == 8
    columns, a_weight = {
        "scalar": (128, max(((2.6 if p.bits == 3 else 2.4) + 1.1 * c.rows) / gpu.lanes, (1 + c.rows) / gpu.floats)),
        "mma": (64, ((2.9 if wide else 1.5) + c.rows / 32) / gpu.lanes + c.rows / (gpu.mma or 1)),
        "tiled": (64, max(88.8 / gpu.lanes, 64 / gpu.floats)),
    }[c.algorithm]
    passes, tiles = -(-p.M // c.rows), -(-p.N // columns)
    row = p.K * (4 if p.x_dtype == FLOAT32 else 2)
    blocks = passes * tiles * c.split_k
    return (
        overlapped(blocks, words + p.M * row, passes * (words + c.rows * tiles * row), weights * passes * a_weight)
        + 4000
    )


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32])
def test_no_config_is_faster_by_the_model(select: Callable[[Problem], Config], arch: int, dtype: int) -> None:
    """This holds for all algorithms, rows and divisions, every M and real shapes. The model is written twice."""
    for K, N in SHAPES:
        for bits in SUPPORTED_BITS:
            for M in TOKENS:
                problem = Problem(M, K, N, bits, x_dtype=dtype).on(arch)
                config = select(problem)
                chosen = Candidate(config.algorithm, config.rows, config.split_k, config.k_per_split, config.chunk)
                times = {candidate: modelled_cycles(problem, candidate) for candidate in candidates(problem)}
                assert times[chosen] == pytest.approx(min(times.values()), rel=1e-9), (problem, config)


# 2**20 weights and more: of fewer, only thousands of tokens pay for the launches of dense.
LARGE_WEIGHTS = [(K, N, bits) for K, N in SHAPES if K * N >= 1 << 20 for bits in SUPPORTED_BITS]


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_dense_begins_between_128_and_1024_tokens(select: Callable[[Problem], Config], arch: int) -> None:
    """About 256 where a BLAS has faster instructions than mma.sync (H100, B200), about 500 elsewhere.

    Elsewhere both multiply at one rate. Dense then saves the unpacking alone, which is an eighth (GeForce) to a third
    (A100) of a pass of 32 rows. The passes of so many rows pay for dequantizing W and for the launches.
    """
    for K, N, bits in LARGE_WEIGHTS:
        at = [select(Problem(M, K, N, bits).on(arch)).algorithm for M in (127, 1025)]
        assert at == ["mma", "dense"], (K, N, bits)


@pytest.mark.parametrize("arch", [75, 86])
def test_dense_gains_little_where_the_l2_is_small(select: Callable[[Problem], Config], arch: int) -> None:
    """Half of the 4 MiB of a T4 or the 6 of an RTX 3090 holds few columns, so that launches take what dense saves."""
    for K, N, bits in LARGE_WEIGHTS:
        assert select(Problem(127, K, N, bits).on(arch)).algorithm == "mma"
        cycles = select(Problem(4096, K, N, bits).on(arch)).cycles
        assert 0.7 < cycles["dense"] / cycles["mma"] < 1.2, (K, N, bits)


def test_dense_scratch_is_half_of_the_l2_or_64_columns(select: Callable[[Problem], Config]) -> None:
    """Of W's chunk and its float32 result together; many rows of x are multiplied in parts."""
    for arch, M, (K, N) in itertools.product(DEVICES, (512, 2048, 16384, 10**6), SHAPES):
        problem = Problem(M, K, N).on(arch)
        config = select(problem)
        if config.algorithm != "dense":
            continue
        weight, result = 2 * K * config.chunk, 4 * min(config.rows, M) * config.chunk
        assert 1 <= config.chunk <= N
        assert config.rows >= min(M, 64)
        assert weight + result <= min(64 * MIB, problem.l2_bytes // 2) or config.chunk == 64
        assert result <= max(weight, 4 * 64 * 64)


@pytest.mark.parametrize("arch", DEVICES)
def test_more_rows_never_take_less_time(select: Callable[[Problem], Config], arch: int) -> None:
    for K, N in SHAPES:
        times = [min(select(Problem(M, K, N).on(arch)).cycles.values()) for M in range(1, 600, 7)]
        assert times == sorted(times)


@pytest.mark.parametrize("arch", DEVICES)
def test_batch_invariant_sums_are_divided_without_a_look_at_M(select: Callable[[Problem], Config], arch: int) -> None:
    for K, N in SHAPES:
        for dtype in (FLOAT16, FLOAT32):
            problem = Problem(K=K, N=N, x_dtype=dtype, batch_invariant=True).on(arch)
            configs = [select(replace(problem, M=M)) for M in TOKENS]
            assert len({(c.algorithm, c.split_k, c.k_per_split) for c in configs}) == 1


def test_decoding_fills_the_device(select: Callable[[Problem], Config]) -> None:
    """At one row, K is split until there are two thread blocks on each SM, where it is long enough."""
    for K, N in SHAPES:
        config = select(Problem(K=K, N=N))
        blocks = -(-N // 64) * config.split_k
        assert blocks >= 2 * 108 or config.k_per_split <= 1024 * 2


def test_the_model_has_the_instructions_that_were_counted(compiled: ctypes.CDLL) -> None:
    """Within a fifth, since it is made of few constants."""
    compiled.instructions.restype = ctypes.c_double
    counted = [
        kernel
        for kernel in json.loads((ROOT / "benchmarks" / "results" / "cuda-device-code.json").read_text())["kernels"]
        if "per_weight" in kernel
    ]
    assert {kernel["kernel"] for kernel in counted} == {"mma", "scalar"}
    for kernel in counted:
        problem = Problem(
            bits=kernel["bits"],
            group_size=kernel.get("unit", 128),
            x_dtype=BFLOAT16 if kernel.get("dtype") == "bfloat16" else FLOAT16,
        )
        modelled = compiled.instructions(
            as_fields(problem), ctypes.c_int64(ALGORITHMS.index(kernel["kernel"])), ctypes.c_int64(kernel["tokens"])
        )
        assert abs(modelled / kernel["per_weight"] - 1) < 0.2, (kernel, modelled)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_declared_errors_have_the_additions_of_the_kernels(compiled: ctypes.CDLL, algorithm: str) -> None:
    """`exllama_ops.testing.errors` counts by the sizes of the kernels, whose headers count by themselves."""
    compiled.additions.restype = ctypes.c_int64
    unit = TENSOR_CORE_UNIT if algorithm == "mma" else UNIT_ROUNDOFF_F32
    rounding = 2.0**-11 if algorithm == "dense" else 0.0
    for K, G in ((32, 1), (576, 5), (4096, 32), (4104, 4104), (14336, 112)):
        counted = compiled.additions(*map(ctypes.c_int64, (ALGORITHMS.index(algorithm), K, G)))
        declared = cuda_gemm_error(algorithm, torch.float16, K=K, G=G)
        assert declared == Error(rounding + gamma(counted, unit)), (K, G)
