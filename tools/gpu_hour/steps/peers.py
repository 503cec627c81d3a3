"""The benchmarks beside the peers that can be imported here: ``benchmarks.run`` with few shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers import CUDA_PEERS
from benchmarks.run import command_line
from tools.gpu_hour.part import Options
from tools.gpu_hour.records import Result, Table

ROOT = Path(__file__).resolve().parents[3]
_SHAPE, _TOKENS = "4096x4096", ("1", "16", "64", "256", "2048")


def run(what: str, options: Options) -> Result:
    """Measure a weight whose rows are in order, or in an activation order."""
    folder = options.folder.path / "benchmarks" / what
    arguments = ["--device", "cuda", "--shapes", _SHAPE, "--M", *_TOKENS, "--seconds", "2", "--out", str(folder)]
    arguments += ["--act-order"] if what == "act_order" else []
    if options.dry:
        command_line().parse_args(arguments)
        names = ", ".join(peer.name for peer in CUDA_PEERS)
        return Result(
            "passed", f"peers: {names}", not_walked=["timing: tests/benchmarks run it with a device's stand-in"]
        )
    status = subprocess.run([sys.executable, "-m", "benchmarks.run", *arguments], cwd=ROOT, check=False).returncode
    files = sorted(folder.glob("*.json"))
    if status or not files:
        return Result("failed", f"benchmarks.run ended by exit status {status}; the log has its words")
    return result_of(json.loads(files[-1].read_text()))


def result_of(measured: dict[str, Any]) -> Result:
    """The medians of a result of `benchmarks.run`, and what was missing."""
    measurements = measured["measurements"]
    names = list(dict.fromkeys(kernel["name"] for m in measurements for kernel in m["kernels"]))
    times = [{kernel["name"]: kernel["ms"]["median"] for kernel in m["kernels"]} for m in measurements]
    columns = ["kernel", *(f"{m['op']}, M={m['M']}" for m in measurements)]
    rows = [[name, *(f"{1e3 * row[name]:.1f}" if name in row else "" for row in times)] for name in names]
    missing = [f"{kernel['name']} is missing: {kernel['error'][:200]}" for kernel in measured["missing"]]
    summary = f"{len(names)} kernels, {len(missing)} missing"
    return Result("passed", summary, missing, [Table("Microseconds of a call", columns, rows)])
