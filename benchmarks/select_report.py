"""Writes what the CUDA model picks on five GPUs beside what it picked before it counted launches and asked the device.

    python -m benchmarks.select_report        # benchmarks/results/cuda-model.md

cuda-model.json has the choices of the commit that it names, and the times of that commit's own model.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.gpus import gpu_named
from benchmarks.select import Config, Model, Problem

RESULTS = Path(__file__).with_name("results") / "cuda-model"
HEAD = ("GPU", "M", "", "choice", "launches", "DRAM, MB", "in flight, KB an SM", "us, by this model", "us, by its own")
TEXT = """# What the CUDA model picks

By `python -m benchmarks.select_report`. Nothing here ran on a GPU: the times are predicted by `csrc/cuda/cost.h` from
the figures in `csrc/cuda/rates.h`.

A weight of 4096 x 4096, 4 bits in groups of 128, and x in float16. "Before" is the choice of commit {commit}. Its sums
of a split K were added up by a second kernel. Its own model took every GPU of a compute capability for the same one,
and counted one launch.

With a full DRAM an SM needs so many bytes in flight: A100 13, H100 18, H200 25, RTX 4090 6, B200 38 KB, by a latency of
0.7 us. The last rows have an activation order.
"""


def main() -> None:
    before = json.loads(RESULTS.with_suffix(".json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        model = Model(Path(folder))
        lines = [TEXT.format(commit=before["commit"]), f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
        for row in before["choices"]:
            problem = replace(Problem().on(gpu_named(row["gpu"])), M=row["M"])
            lines.append(line(model, problem, row["gpu"], "before", Config(*row["config"]), f"{row['us']}"))
            lines.append(line(model, problem, "", "now", model.chosen(problem), ""))
        for row in before["choices"]:
            ordered = replace(Problem(has_perm=True).on(gpu_named(row["gpu"])), M=row["M"])
            lines.append(line(model, ordered, row["gpu"], "act-order", model.chosen(ordered), ""))
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def line(model: Model, problem: Problem, gpu: str, when: str, config: Config, own: str) -> str:
    """A row of the table: what a config does, and what the model says of it."""
    estimate = model.estimate(problem, config)
    loads = f"{estimate.loads_in_flight / 1024:.0f}" if estimate.loads_in_flight else ""
    cells = (gpu, f"{problem.M}", when, f"{config}", f"{estimate.launches:.0f}", f"{estimate.dram_bytes / 1e6:.1f}",
             loads, f"{estimate.us:.1f}", own)  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
