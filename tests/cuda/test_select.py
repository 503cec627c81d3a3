"""select_gemm, compiled by a plain C++ compiler: its rules, its splits and its cost model over real model shapes."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

ALGORITHMS = ("scalar", "mma", "tiled", "dense")
FLOAT16, BFLOAT16, FLOAT32 = range(3)
MIB = 1 << 20
# compute capability -> SMs, L2: P100, V100, T4, A100, RTX 3090, RTX 4090, H100, B200, RTX 5090.
DEVICES = {
    60: (56, 4 * MIB),
    70: (80, 6 * MIB),
    75: (40, 4 * MIB),
    80: (108, 40 * MIB),
    86: (82, 6 * MIB),
    89: (128, 72 * MIB),
    90: (132, 50 * MIB),
    100: (148, 126 * MIB),
    120: (170, 96 * MIB),
}
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
    arch: int = 80
    sm_count: int = DEVICES[80][0]
    l2_bytes: int = DEVICES[80][1]

    def on(self, arch: int) -> Problem:
        sm_count, l2_bytes = DEVICES[arch]
        return replace(self, arch=arch, sm_count=sm_count, l2_bytes=l2_bytes)


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
        ("bf16 on Turing", Problem(x_dtype=BFLOAT16).on(75), {"scalar", "tiled", "dense"}),
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
        ("batch-invariant", Problem(batch_invariant=True), {"scalar", "mma"}),
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
        (Problem(M=4096, batch_invariant=True, x_dtype=FLOAT32), "scalar"),
    ],
)
def test_every_branch_is_reached(select: Callable[[Problem], Config], problem: Problem, algorithm: str) -> None:
    assert select(problem).algorithm == algorithm


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32])
def test_real_shapes(select: Callable[[Problem], Config], arch: int, dtype: int) -> None:
    for K, N in SHAPES:
        for bits in (2, 3, 4, 8):
            for M in TOKENS:
                problem = Problem(M, K, N, bits, x_dtype=dtype, scales_dtype=FLOAT16).on(arch)
                config = select(problem)
                # Never one that the model itself says is slower.
                assert config.cycles[config.algorithm] == min(config.cycles.values()), (problem, config)
                check_division(problem, config)


def check_division(problem: Problem, config: Config) -> None:
    if config.algorithm == "dense":
        assert 1 <= config.chunk <= problem.N
        limit = min(64 * MIB, problem.l2_bytes // 2)
        assert config.chunk == 64 or 2 * problem.K * config.chunk <= limit
        return
    assert 1 <= config.split_k <= 65535
    assert (config.split_k - 1) * config.k_per_split < problem.K <= config.split_k * config.k_per_split
    if config.algorithm == "mma":
        assert config.rows in (8, 16, 32)
        assert config.k_per_split % 128 == 0
        assert config.rows == 32 or config.rows >= problem.M
    if config.algorithm == "scalar":
        assert config.rows == (1 if problem.M == 1 else 8)
        assert config.k_per_split % 256 == 0


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
