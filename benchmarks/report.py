"""Results as a JSON record and as Markdown tables, the second made of the first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.limits import DRAM, DRAM_PEAK, MATMUL
from benchmarks.plan import Missing
from benchmarks.quiet import Load, said
from benchmarks.results import Measurement

Record = dict[str, Any]


def record(
    command: str,
    machine: Record,
    configuration: Record,
    measurements: Sequence[Measurement],
    missing: Sequence[Missing],
    before: Load,
) -> Record:
    """Everything that a results file says; ``before`` is what others took before anything was timed."""
    loads = [before, *(measurement.load for measurement in measurements)]
    return {
        "command": command,
        "machine": machine,
        "configuration": configuration,
        "quiet": all(load.quiet for load in loads),
        "load": said(loads),
        "before": before.record(),
        "measurements": [measurement.record() for measurement in measurements],
        "missing": [
            {"name": kernel.name, "case": str(kernel.case), "M": kernel.tokens, "error": kernel.error}
            for kernel in missing
        ],
    }


def table(result: Record) -> str:
    """Markdown: machine, a table of times for each op and weight, our speedups, what is missing, the command."""
    configuration = result["configuration"]
    order = ", act-order" if configuration["act_order"] else ""
    title = f"# {configuration['bits']} bits, group {configuration['group_size']}{order}"
    machine = result["machine"]
    described, explanation = (_gpu(machine), _GPU_CELLS) if "gpu" in machine else (_cpu(machine), _CPU_CELLS)
    parts = [title, described, result["load"], f"```\n{result['command']}\n```", explanation]
    for op, K, N in dict.fromkeys((m["op"], m["K"], m["N"]) for m in result["measurements"]):
        columns = [m for m in result["measurements"] if (m["op"], m["K"], m["N"]) == (op, K, N)]
        parts += [f"## {op}, K={K}, N={N}", _times(columns), _speedups(columns)]
    if result["missing"]:
        lines = dict.fromkeys(_missing(kernel) for kernel in result["missing"])
        parts += ["## Not measured", "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


_CPU_CELLS = (
    "Cells: median ms of a call, its interquartile range, percent of the limit. The limit of M=1 is reading the weight "
    "from DRAM, that of more tokens the peak of the class: float32 multiply-add, int16 or int8 dot products, each the "
    "median of ratios to what was measured around each call. More than 100% is another unit of the CPU (AMX) or a "
    "weight that stayed in a cache. Our weights ask for huge pages, as loading them does, and so does the memory that "
    "the limit reads; peers have the pages that they ask for. Errors are relative to float64, in the Frobenius norm, "
    "the largest of all M."
)


_GPU_CELLS = (
    "Cells: median ms of a call, its interquartile range, percent of the limit; for the DRAM, in parentheses, percent "
    "of its nominal speed. The limit is what takes longer: reading the weight from DRAM, or as many operations by a "
    "dense product of torch; each percentage is the median of ratios to what was measured around each call. A call is "
    "timed by events of the device, with cold caches and the host ahead of it. Errors are relative to float64, in the "
    "Frobenius norm, the largest of all M."
)


def _gpu(machine: Record) -> str:
    return (
        f"{machine['gpu']}, compute capability {machine['compute_capability']}, "
        f"{machine['multiprocessors']} multiprocessors, {machine['l2_bytes'] >> 20} MiB of L2, "
        f"{machine['memory_bytes'] >> 30} GiB; driver {machine['driver'] or 'unknown'}, CUDA {machine['cuda']}; "
        f"host: {machine['cpu']}; {_software(machine)}"
    )


def _cpu(machine: Record) -> str:
    held = "" if machine["held_to"] == "native" else f", all held to {machine['held_to']}"
    return (
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores; our kernels: {machine['isa']}{held}; "
        f"flags: {' '.join(machine['cpu_flags'])}; huge pages: {machine['huge_pages']}; {_software(machine)}"
    )


def _software(machine: Record) -> str:
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in machine["packages"].items())
    return f"{machine['system']}, Python {machine['python']}, commit {machine['commit']}; {packages}."


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *body))


# Names and units.
_LIMITS = {
    DRAM: ("DRAM, GB/s", 1e9),
    DRAM_PEAK: ("DRAM nominally, GB/s", 1e9),
    MATMUL: ("dense product, TFLOP/s", 1e12),
    "float": ("float32, GFLOP/s", 1e9),
    "int16": ("int16, GOP/s", 1e9),
    "int8": ("int8, GOP/s", 1e9),
}


def _times(columns: Sequence[Record]) -> str:
    kernels = dict.fromkeys((kernel["name"], kernel["class"]) for column in columns for kernel in column["kernels"])
    rows = [["kernel", "class", "error", *(f"M={column['M']}" for column in columns)]]
    for name, kind in kernels:
        found = [_find(column["kernels"], name, kind) for column in columns]
        error = max(kernel["relative_error"] for kernel in found if kernel)
        rows.append([name, kind, f"{error:.1e}", *map(_cell, found)])
    for limit, (label, unit) in _LIMITS.items():
        if limit not in columns[0]["limits_per_s"]:
            continue
        values = [column["limits_per_s"][limit]["median"] / unit for column in columns]
        rows.append([f"*limit: {label}*", "", "", *(f"{value:.3g}" for value in values)])
    return _markdown(rows)


def _find(kernels: Iterable[Record], name: str, kind: str) -> Record | None:
    return next((kernel for kernel in kernels if (kernel["name"], kernel["class"]) == (name, kind)), None)


def _cell(kernel: Record | None) -> str:
    if kernel is None:
        return ""
    ms, percent = kernel["ms"], f"{kernel['percent_of_limit']['median']:.0f}%"
    if kernel["limit"] == DRAM and "percent_of_dram_peak" in kernel:
        percent += f" ({kernel['percent_of_dram_peak']:.0f}%)"
    return f"{ms['median']:.3g} ±{ms['iqr']:.1g}, {percent}"


def _speedups(columns: Sequence[Record]) -> str:
    pairs = dict.fromkeys((s["ours"], s["class"]) for column in columns for s in column["speedups"])
    if not pairs:
        return ""
    rows = [["times faster", *(f"M={column['M']}" for column in columns)]]
    for ours, kind in pairs:
        cells = []
        for column in columns:
            found = [s for s in column["speedups"] if (s["ours"], s["class"]) == (ours, kind)]
            cells += [f"{s['times_faster']['median']:.2f} ({s['peer']})" for s in found] or [""]
        rows.append([f"{ours} than the best {kind} peer", *cells])
    return _markdown(rows)


def _missing(kernel: Record) -> str:
    where = "" if kernel["M"] is None else f", M={kernel['M']}"
    return f"- {kernel['name']}{where}: {kernel['error']}"
