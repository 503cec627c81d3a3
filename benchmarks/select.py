"""What csrc/cuda/select.h picks, and what its model says of the candidates. It needs g++, and no GPU.

    python -m benchmarks.select --gpu H100                        # M = 1 to 4096
    python -m benchmarks.select --gpu H200 --K 14336 --act-order
    python -m benchmarks.select --gpu H100 --K 2048 --N 768 --experts 128 --top-k 8

Times are predicted, not measured. csrc/cuda/rates.h has what the model takes a GPU to be.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from benchmarks.gpus import Gpu, gpu_named

ROOT = Path(__file__).parents[1]
ALGORITHMS = ("scalar", "mma", "tiled", "dense", "pipelined")  # by their numbers
DTYPES = ("float16", "bfloat16", "float32")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Problem:
    """cuda::Problem, field for field; the driver of the device tells its clock and the rate of its DRAM, or 0."""

    M: int = 1
    K: int = 4096
    N: int = 4096
    bits: int = 4
    group_size: int = 128
    x_dtype: int = 0  # of DTYPES
    scales_dtype: int = 0
    shuffled: bool = True
    has_perm: bool = False
    raw_g_idx: bool = False
    aligned: bool = True
    batch_invariant: bool = False
    fp16_accumulation: bool = False
    blas_refused: bool = False
    experts: int = 0  # weights of which each row of x has one; 0: all rows have the same
    arch: int = 0
    sm_count: int = 0
    l2_bytes: int = 0
    clock_khz: int = 0
    dram_mb_per_s: int = 0

    def on(self, gpu: Gpu) -> Problem:
        """The same problem on a GPU."""
        return replace(
            self,
            arch=gpu.arch,
            sm_count=gpu.sms,
            l2_bytes=gpu.l2_mib << 20,
            clock_khz=round(gpu.ghz * 1e6),
            dram_mb_per_s=round(gpu.dram_gb_per_s * 1e3),
        )


@dataclass(frozen=True)
class Config:
    """cuda::Config, field for field."""

    algorithm: str
    rows: int
    split_k: int
    k_per_split: int
    chunk: int

    def __str__(self) -> str:
        if self.algorithm == "dense":
            return f"dense, {self.chunk} columns at a time"
        return f"{self.algorithm}, {self.rows} row{'s' if self.rows > 1 else ''}" + (
            f", split {self.split_k}" if self.split_k > 1 else ""
        )


@dataclass(frozen=True)
class Estimate:
    """What the model says of a config.

    Attributes:
        us: the predicted time.
        launches: kernels, fills and copies in a row.
        dram_bytes: read and written.
        loads_in_flight: bytes of W that an SM waits for at a time.
    """

    us: float
    launches: float
    dram_bytes: float
    loads_in_flight: float


class Model:
    """select.h and its cost model, compiled by g++.

    Args:
        folder: of the library.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "select.so"
        flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-I", str(ROOT / "csrc")]
        subprocess.run(["g++", *flags, str(Path(__file__).with_name("select.cpp")), "-o", str(path)], check=True)
        self.library = ctypes.CDLL(str(path))
        self.library.best.restype = ctypes.c_bool

    def chosen(self, problem: Problem) -> Config:
        """What select_gemm says."""
        out = (ctypes.c_int64 * 5)()
        self.library.chosen(fields_of(problem), out)
        return Config(ALGORITHMS[out[0]], *out[1:])

    def best(self, problem: Problem) -> dict[str, Config]:
        """The best config of each algorithm that can."""
        found = {}
        for index, name in enumerate(ALGORITHMS):
            out = (ctypes.c_int64 * 5)()
            if self.library.best(fields_of(problem), ctypes.c_int64(index), out):
                found[name] = Config(name, *out[1:])
        return found

    def estimate(self, problem: Problem, config: Config) -> Estimate:
        """What the model says of any config."""
        fields = (ALGORITHMS.index(config.algorithm), *astuple(config)[1:])
        out = (ctypes.c_double * 4)()
        self.library.estimate(fields_of(problem), (ctypes.c_int64 * 5)(*fields), out)
        return Estimate(*out)


def fields_of(problem: Problem) -> ctypes.Array[ctypes.c_int64]:
    """As the C functions take them."""
    fields = [int(field) for field in astuple(problem)]
    return (ctypes.c_int64 * len(fields))(*fields)


def table(model: Model, problem: Problem, top_k: int = 1) -> list[str]:
    """A row of Markdown for each number of tokens, of top_k rows of x each.

    It has the choice, what it moves, and the predicted time of each algorithm's best.
    """
    times_of = " | ".join(f"{algorithm}, us" for algorithm in ALGORITHMS)
    lines = [
        f"| tokens | choice | launches | DRAM, MB | in flight, KB an SM | {times_of} |",
        "|" + "---|" * (5 + len(ALGORITHMS)),
    ]
    for M in TOKENS:
        of_M = replace(problem, M=M * top_k)
        chosen = model.chosen(of_M)
        estimate = model.estimate(of_M, chosen)
        best = model.best(of_M)
        times = [f"{model.estimate(of_M, best[name]).us:.1f}" if name in best else "" for name in ALGORITHMS]
        loads = f"{estimate.loads_in_flight / 1024:.0f}" if estimate.loads_in_flight else ""
        cells = [f"{M}", f"{chosen}", f"{estimate.launches:.0f}", f"{estimate.dram_bytes / 1e6:.1f}", loads, *times]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.select", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="H100", help="the beginning of a name in benchmarks/gpus.py")
    parser.add_argument("--K", type=int, default=4096)
    parser.add_argument("--N", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", default="float16", choices=DTYPES)
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--experts", type=int, default=0, help="of a mixture (default: one weight)")
    parser.add_argument("--top-k", type=int, default=1, help="experts that a token has (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Model(Path(folder))
        problem = Problem(
            K=args.K,
            N=args.N,
            bits=args.bits,
            group_size=args.group_size,
            x_dtype=DTYPES.index(args.dtype),
            has_perm=args.act_order,
            batch_invariant=args.batch_invariant,
            experts=args.experts,
        )
        sys.stdout.write("\n".join(table(model, problem.on(gpu_named(args.gpu)), args.top_k)) + "\n")


if __name__ == "__main__":
    main()
