"""Pictures of results.

``python -m benchmarks.plot RESULT.json`` draws throughput against M again, with the limits, beside the file.
``python -m benchmarks.plot --summary PICTURE.svg RESULT.json`` draws how many times as fast as a dense product of torch
our kernels are, and the best peer of each class.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.limits import DRAM, MATMUL
from benchmarks.results import OURS

_PEERS = ("#1b6ca8", "#e07b39", "#3a9d5d", "#8c5fb0", "#a0522d", "#c2539a", "#6b7280", "#9a9a1f", "#1f9a9a", "#444444")
# Precisions of the CPU; on a GPU the library's choice, its algorithms, and Triton.
_OURS = {
    f"{OURS} {name}": style
    for styles in (
        {"highest": "--", "high": "-", "medium": ":"},
        {"auto": "-", "triton": "--", "mma": ":", "scalar": "-.", "tiled": (0, (1, 3)), "dense": (0, (5, 3))},
    )
    for name, style in styles.items()
}
# The DRAM limit is drawn for the weight of one of these.
_ROOFED = (f"{OURS} high", f"{OURS} auto")
_PEAKS = {"float": "float32 peak", "int16": "int16 peak", "int8": "int8 peak", MATMUL: "dense product"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw a panel for each weight into an SVG file.

    Args:
        result: what `benchmarks.report.record` made.
        path: of the file.
    """
    # Ids that depend on the content alone, so that a file drawn again is the same.
    matplotlib.rcParams["svg.hashsalt"] = OURS
    measurements = [m for m in result["measurements"] if m["op"] == "gptq_gemm"]
    shapes = list(dict.fromkeys((m["K"], m["N"]) for m in measurements))
    figure = Figure(figsize=(5.2 * len(shapes), 6.2), layout="constrained")
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axes, (K, N) in zip(panels, shapes, strict=True):
        _panel(axes, [m for m in measurements if (m["K"], m["N"]) == (K, N)])
        axes.set_title(f"K={K}, N={N}")
    panels[0].set_ylabel("GOP/s")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=min(6, 2 * len(shapes)), fontsize=8
    )
    configuration = result["configuration"]
    order = ", act-order" if configuration["act_order"] else ""
    figure.suptitle(
        f"{configuration['bits']} bits, group {configuration['group_size']}{order}; {_device(result['machine'])}"
    )
    figure.savefig(path, metadata={"Date": None})


def _device(machine: dict[str, Any]) -> str:
    if "gpu" in machine:
        return str(machine["gpu"])
    return f"{machine['isa']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"


def _panel(axes: Axes, measurements: list[dict[str, Any]]) -> None:
    tokens = [m["M"] for m in measurements]
    names = dict.fromkeys(kernel["name"] for m in measurements for kernel in m["kernels"])
    peers = [name for name in names if name not in _OURS]
    for name in names:
        points = [(m["M"], k["gop_per_s"]) for m in measurements for k in m["kernels"] if k["name"] == name]
        xs, ys = zip(*points, strict=True)
        if name in _OURS:
            axes.plot(xs, ys, color="#c1121f", linestyle=_OURS[name], linewidth=2.4, marker="o", label=name, zorder=3)
        else:
            place = peers.index(name)
            style = "-" if place < len(_PEERS) else "--"
            color = _PEERS[place % len(_PEERS)]
            axes.plot(xs, ys, color=color, linestyle=style, linewidth=1.1, marker=".", label=name)
    _draw_limits(axes, measurements)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [str(M) for M in tokens])
    axes.set_xlabel("M, tokens")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)


def _draw_limits(axes: Axes, measurements: list[dict[str, Any]]) -> None:
    tokens = [m["M"] for m in measurements]
    measured = measurements[0]["limits_per_s"]
    tops = []
    for limit, label in _PEAKS.items():
        if limit not in measured:
            continue
        peaks = [1e-9 * m["limits_per_s"][limit]["median"] for m in measurements]
        tops.append(max(peaks))
        axes.plot(tokens, peaks, color="black", linestyle=(0, (1, 1)), linewidth=0.9)
        axes.annotate(label, (tokens[0], peaks[0]), fontsize=7, va="bottom")
    ours = [(m, k) for m in measurements for k in m["kernels"] if k["name"] in _ROOFED]
    if not ours:
        return
    # What reading our weight from DRAM once allows.
    roof = [
        min(max(tops), 2e-9 * m["M"] * m["K"] * m["N"] * m["limits_per_s"][DRAM]["median"] / kernel["weight_bytes"])
        for m, kernel in ours
    ]
    axes.plot([m["M"] for m, _ in ours], roof, color="black", linestyle="-.", linewidth=0.9, label="DRAM limit")


_DENSE = "torch dense fp16"
# Label, color, and which kernels, by name or the peers of a class: the fastest of them stands for all.
_SUMMARY: tuple[tuple[str, str, tuple[str, ...], str | None], ...] = (
    ("exllama_ops, medium (int8 activations)", "#7f0d1a", (f"{OURS} medium",), None),
    ("exllama_ops, high (the default)", "#c1121f", (f"{OURS} high",), None),
    ("best peer with int8 activations", "#9fb8cc", (), "int8"),
    ("best peer with float activations", "#4f7ea6", (), "float"),
)


def summary(result: dict[str, Any], path: Path) -> None:
    """Draw bars into an SVG file: how many times as fast as torch's dense float16 product.

    Args:
        result: what `benchmarks.report.record` made, of a CPU and one weight.
        path: of the file.
    """
    matplotlib.rcParams["svg.hashsalt"] = OURS
    measurements = [m for m in result["measurements"] if m["op"] == "gptq_gemm"]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(_SUMMARY)
    for place, (label, color, names, peers_of) in enumerate(_SUMMARY):
        factors = [_times_dense(m, names, peers_of) for m in measurements]
        xs = [group - 0.4 + (place + 0.5) * width for group in range(len(factors))]
        axes.bar(xs, factors, 0.94 * width, label=label, color=color)
        for x, factor in zip(xs, factors, strict=True):
            axes.annotate(f"{factor:.1f}", (x, factor), ha="center", va="bottom", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(measurements)), [str(m["M"]) for m in measurements])
    axes.set_xlabel("tokens")
    axes.set_ylabel("times as fast as dense float16")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    configuration, machine = result["configuration"], result["machine"]
    K, N = measurements[0]["K"], measurements[0]["N"]
    axes.set_title(
        f"{K} x {N}, {configuration['bits']} bits, group {configuration['group_size']}; {_device(machine)}", fontsize=10
    )
    figure.savefig(path, metadata={"Date": None})


def _times_dense(measurement: dict[str, Any], names: tuple[str, ...], peers_of: str | None) -> float:
    kernels = measurement["kernels"]
    (dense,) = (kernel["gop_per_s"] for kernel in kernels if kernel["name"] == _DENSE)
    speeds = [
        kernel["gop_per_s"]
        for kernel in kernels
        if kernel["name"] in names or (kernel["class"] == peers_of and not kernel["name"].startswith(OURS))
    ]
    return float(max(speeds) / dense)


def main(arguments: list[str]) -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(description="Draws results of benchmarks.run.")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--summary", type=Path, metavar="PICTURE.svg", help="draw one result as bars, into this file")
    options = parser.parse_args(arguments)
    for path in options.results:
        result = json.loads(path.read_text())
        if options.summary:
            summary(result, options.summary)
        else:
            plot(result, path.with_suffix(".svg"))


if __name__ == "__main__":
    main(sys.argv[1:])
