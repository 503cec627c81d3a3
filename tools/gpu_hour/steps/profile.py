"""Figures of Nsight Compute for the kernels that matter most, if it is there and may read the counters."""

from __future__ import annotations

import csv
import subprocess
import sys

from tools.gpu_hour.part import Options
from tools.gpu_hour.process import find
from tools.gpu_hour.records import Result, Table

_PROGRAM = "ncu"
_KERNELS = "regex:gemm_|dequantize|gather"
_SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
_FIGURES = (
    "Duration",
    "Compute (SM) Throughput",
    "Memory Throughput",
    "DRAM Throughput",
    "L2 Hit Rate",
    "Achieved Occupancy",
    "Registers Per Thread",
    "Warp Cycles Per Issued Instruction",
)


def run(what: str, options: Options) -> Result:
    """Profile `main` of this module."""
    program = find(_PROGRAM)
    command = [program or _PROGRAM, "--csv", "--page=details", f"--kernel-name={_KERNELS}", "--launch-count=40"]
    command += [f"--section={section}" for section in _SECTIONS]
    command += [sys.executable, "-m", "tools.gpu_hour.steps.profile"]
    if options.dry:
        return Result("passed", " ".join(command), not_walked=["the profiler: it needs a device"])
    if program is None:
        return Result("skipped", f"there is no {_PROGRAM}")
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(ended.stdout)
    if "ERR_NVGPUCTRPERM" in ended.stdout:
        return Result("skipped", "the driver keeps its counters to the administrator (ERR_NVGPUCTRPERM)")
    return result_of(ended.stdout)


def main() -> None:
    """What is profiled: products by two algorithms, and a weight that is dequantized."""
    import torch

    from benchmarks.cases import Case, Weight, activations
    from benchmarks.peers.exllama_cuda import named

    for act_order in (False, True):
        arguments = Weight(Case(4096, 4096, act_order=act_order)).to(torch.device("cuda")).op_weight.arguments
        for algorithm, M in (("scalar", 1), ("mma", 1), ("mma", 16), ("mma", 64), ("mma", 256), ("mma", 2048)):
            with named(algorithm):
                torch.ops.exllama.gptq_gemm(activations(M, 4096).cuda(), *arguments)
        torch.ops.exllama.gptq_dequantize(*arguments)
    torch.cuda.synchronize()


def result_of(printed: str) -> Result:
    """The figures of each launch, from the lines of ``--csv --page details``: one for each figure."""
    start = printed.find('"ID"')
    if start < 0:
        return Result("failed", "ncu has printed no table", printed.strip().splitlines()[-5:])
    launches: dict[str, dict[str, str]] = {}
    lines = [line for line in printed[start:].splitlines() if line.startswith('"')]
    for row in csv.DictReader(lines):
        launch = launches.setdefault(
            row["ID"], {"kernel": row["Kernel Name"].partition("(")[0], "grid": row["Grid Size"]}
        )
        launch[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    rows = [
        [launch["kernel"], launch["grid"], *(launch.get(name, "") for name in _FIGURES)] for launch in launches.values()
    ]
    table = Table("Nsight Compute", ["kernel", "grid", *_FIGURES], rows)
    return Result(
        "passed" if rows else "failed",
        f"{len(rows)} launches",
        tables=[table],
        data={"launches": list(launches.values())},
    )


if __name__ == "__main__":
    main()
