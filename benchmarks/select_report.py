"""Writes what the CUDA model picks on five GPUs beside what it picked before it counted launches and asked the device.

    python -m benchmarks.select_report        # benchmarks/results/cuda-model.md

cuda-model.json has the choices of the commit that it names. Their times are those of that commit's own model, and of
the present one, by which sums of a split K took a second launch.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.experts import BITS, GROUP_SIZE, PROJECTIONS, Projection
from benchmarks.experts import TOKENS as TOKENS_OF_EXPERTS
from benchmarks.gpus import gpu_named
from benchmarks.select import Config, Model, Problem

RESULTS = Path(__file__).with_name("results") / "cuda-model"
HEAD = ("GPU", "M", "", "choice", "launches", "DRAM, MB", "in flight, KB an SM", "us", "us, by its own model")
TEXT = """# What the CUDA model picks

By `python -m benchmarks.select_report`. Nothing here ran on a GPU: the times are predicted by `csrc/cuda/cost.h` from
the figures in `csrc/cuda/rates.h`.

A weight of 4096 x 4096, 4 bits in groups of 128, and x in float16. "Before" is the choice of commit {commit}. Its sums
of a split K were added up by a second kernel. Its own model took every GPU of a compute capability for the same one,
and counted one launch. The last rows have an activation order.

By a latency of 0.7 us, an SM needs so many bytes in flight for all of the DRAM's rate: A100 13, H100 18, H200 25,
RTX 4090 6, B200 38 KB.
"""

EXPERTS_TEXT = """
## Experts

`gptq_moe_gemm` of 4 bits in groups of 128, and x in float16. A token has two experts of Mixtral's eight, or eight of
Qwen3's 128, and the routing is taken to be random. Each cell has the choice and its predicted time in us.
"""


def main() -> None:
    before = json.loads(RESULTS.with_suffix(".json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        model = Model(Path(folder))
        lines = [TEXT.format(commit=before["commit"]), f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
        for row in before["choices"]:
            problem = replace(Problem().on(gpu_named(row["gpu"])), M=row["M"])
            config = Config(*row["config"])
            in_flight = model.estimate(problem, config).loads_in_flight
            known = (row["launches"], row["dram_mb"], in_flight, row["counted_us"])
            lines.append(line(row["gpu"], row["M"], "before", config, known, f"{row['us']}"))
            lines.append(line("", row["M"], "now", *now(model, problem), ""))
        for row in before["choices"]:
            ordered = replace(Problem(has_perm=True).on(gpu_named(row["gpu"])), M=row["M"])
            lines.append(line(row["gpu"], row["M"], "act-order", *now(model, ordered), ""))
        lines += [EXPERTS_TEXT, f"| GPU | model | {' | '.join(map(tokens, TOKENS_OF_EXPERTS))} |"]
        lines.append("|" + "---|" * (2 + len(TOKENS_OF_EXPERTS)))
        for gpu in dict.fromkeys(row["gpu"] for row in before["choices"]):
            lines += [of_experts(model, gpu, projection) for projection in PROJECTIONS]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def tokens(count: int) -> str:
    return f"{count} token{'s' if count > 1 else ''}"


def of_experts(model: Model, gpu: str, projection: Projection) -> str:
    """A row of the table of experts."""
    cells = [gpu, f"{projection.model}, {projection.name}"]
    for count in TOKENS_OF_EXPERTS:
        sizes = Problem(M=count * projection.top_k, K=projection.K, N=projection.N, experts=projection.E)
        config, (*_, us) = now(model, replace(sizes, bits=BITS, group_size=GROUP_SIZE).on(gpu_named(gpu)))
        cells.append(f"{config}: {us:.1f}")
    return f"| {' | '.join(cells)} |"


Known = tuple[float, float, float, float]  # launches, MB of the DRAM, bytes in flight, microseconds


def now(model: Model, problem: Problem) -> tuple[Config, Known]:
    """What is picked, and what the model says of it."""
    config = model.chosen(problem)
    said = model.estimate(problem, config)
    return config, (said.launches, said.dram_bytes / 1e6, said.loads_in_flight, said.us)


def line(gpu: str, M: int, when: str, config: Config, known: Known, own: str) -> str:
    """A row of the table."""
    launches, megabytes, in_flight, us = known
    loads = f"{in_flight / 1024:.0f}" if in_flight else ""
    cells = (gpu, f"{M}", when, f"{config}", f"{launches:.0f}", f"{megabytes:.1f}", loads, f"{us:.1f}", own)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
