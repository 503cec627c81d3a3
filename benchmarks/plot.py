"""Throughput against M, with the limits: ``python -m benchmarks.plot RESULT.json`` draws a file again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results import OURS

_PEERS = ("#1b6ca8", "#e07b39", "#3a9d5d", "#8c5fb0", "#a0522d", "#c2539a", "#6b7280", "#9a9a1f", "#1f9a9a", "#444444")
_OURS = {f"{OURS} highest": "--", f"{OURS} high": "-", f"{OURS} medium": ":"}


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
    configuration, machine = result["configuration"], result["machine"]
    order = ", act-order" if configuration["act_order"] else ""
    figure.suptitle(
        f"{configuration['bits']} bits, group {configuration['group_size']}{order}; {machine['isa']}, "
        f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    )
    figure.savefig(path, metadata={"Date": None})


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
    for limit, label in (("float", "float32 peak"), ("int16", "int16 peak"), ("int8", "int8 peak")):
        peaks = [1e-9 * m["limits_per_s"][limit]["median"] for m in measurements]
        axes.plot(tokens, peaks, color="black", linestyle=(0, (1, 1)), linewidth=0.9)
        axes.annotate(label, (tokens[0], peaks[0]), fontsize=7, va="bottom")
    ours = [(m, k) for m in measurements for k in m["kernels"] if k["name"] == f"{OURS} high"]
    if not ours:
        return
    peak = max(1e-9 * m["limits_per_s"]["int8"]["median"] for m in measurements)
    # What reading our weight from DRAM once allows.
    roof = [
        min(peak, 2e-9 * m["M"] * m["K"] * m["N"] * m["limits_per_s"]["dram"]["median"] / kernel["weight_bytes"])
        for m, kernel in ours
    ]
    axes.plot([m["M"] for m, _ in ours], roof, color="black", linestyle="-.", linewidth=0.9, label="DRAM limit")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        plot(json.loads(Path(name).read_text()), Path(name).with_suffix(".svg"))
