"""The tables of README.md and docs/performance.md from all results: ``python -m benchmarks.speeds`` fills them.

A page has a table between two comments, the first of which names it. No number is typed by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.files import RESULTS, title

PAGES = tuple(RESULTS.parents[1] / name for name in ("README.md", "docs/performance.md"))
TOKENS = (1, 4, 16, 64, 256, 1024)
FEW_TOKENS = (1, 16, 256)  # of other widths
# The weight of which pages tell, and the results that have it.
SHAPE = (4096, 4096)
_TWO_THREADS = "4bit-g128-2threads"
_NAMES = ("4bit-g128-1thread", "4bit-g128-avx512-1thread", _TWO_THREADS)
_WIDTHS = tuple(
    f"{weight}-{threads}"
    for weight in ("2bit-g128", "3bit-g128", "8bit-g128", "4bit-g32")
    for threads in ("1thread", "2threads")
)
_DEMOS = ("demo-1thread", "demo-other-1thread", "demo-2threads", "demo-other-2threads")
# Ours, and what it is compared with.
_MAIN = (("high", "float"), ("medium", "int8"))
_PAIRS = (("highest", "exact"), ("high", "float"), ("high", "int8"), ("medium", "int8"))
_OURS, _HEAD = "exllama_ops", "exllama_ops, 8-bit head"
_OTHERS = {"exllama_ops whole": "compiled whole", "dense": "dense", "OpenVINO GenAI": "OpenVINO GenAI"}

Record = dict[str, Any]


def main() -> int:
    """Write the tables into the pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    return 0


def filled(text: str) -> str:
    """A page with its tables made again."""

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}\n{_TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", made, text, flags=re.DOTALL)


def _short() -> str:
    header = ["CPU", "times faster", *map(str, TOKENS)]
    return _markdown(header, (row for result in _results([_TWO_THREADS]) for row in _compared(result, _MAIN)))


def _products() -> str:
    header = ["CPU", "times faster", *map(str, TOKENS)]
    return _markdown(header, (row for result in _results(_NAMES) for row in _compared(result, _PAIRS)))


def _widths() -> str:
    header = ["CPU", "weight", "times faster", *map(str, FEW_TOKENS)]
    rows = (
        [machine, f"{result['configuration']['bits']} bits, group {result['configuration']['group_size']}", *cells]
        for result in _results(_WIDTHS)
        if "--peers" not in result["command"]  # which names some of them
        for machine, *cells in _compared(result, _MAIN, FEW_TOKENS)
    )
    return _markdown(header, rows)


def _limits() -> str:
    header = ["CPU", "percent of the limit", *map(str, TOKENS)]
    rows = (
        [_machine(result), f'"{ours}"', *_cells(result, TOKENS, partial(_percent, ours))]
        for result in _results(_NAMES)
        for ours in ("highest", "high", "medium")
    )
    return _markdown(header, rows)


def _demo() -> str:
    header = [
        "CPU",
        "ms of a token",
        "than compiled whole",
        "than dense",
        "than OpenVINO GenAI",
        "ms, `lm_head_bits=8`",
    ]
    rows = []
    for result in _results(_DEMOS):
        (model,) = result["models"]
        faster, ms = model["times_faster"].get(_OURS, {}), model["ms_per_token"]
        if "OpenVINO GenAI" not in faster:
            continue  # measured before it was a peer
        cells = (_ratio(faster[other]) if other in faster else "" for other in _OTHERS)
        rows.append([_machine(result), f"{ms[_OURS]['median']:.1f}", *cells, f"{ms[_HEAD]['median']:.1f}"])
    return _markdown(header, rows)


_TABLES: dict[str, Callable[[], str]] = {
    "short": _short,
    "products": _products,
    "widths": _widths,
    "limits": _limits,
    "demo": _demo,
}


def _results(names: Sequence[str]) -> Iterator[Record]:
    """The results with these names, CPU by CPU."""
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        for name in names:
            file = folder / f"{name}.json"
            if file.exists():
                yield json.loads(file.read_text())


def _machine(result: Record) -> str:
    machine = result["machine"]
    held = "" if machine["held_to"] == "native" else f" held to {machine['held_to']}"
    return f"{title(machine)}{held}, {machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"


def _compared(result: Record, pairs: Iterable[tuple[str, str]], tokens: Sequence[int] = TOKENS) -> Iterator[list[str]]:
    """A row for each pair that the result has."""
    for ours, rivals in pairs:
        cells = _cells(result, tokens, partial(_speedup, ours, rivals))
        if any(cells):
            yield [_machine(result), f'"{ours}", best {rivals} peer', *cells]


def _cells(result: Record, tokens: Sequence[int], cell: Callable[[Record], str]) -> list[str]:
    """A cell for each number of tokens."""
    found = {m["M"]: m for m in result["measurements"] if (m["op"], m["K"], m["N"]) == ("gptq_gemm", *SHAPE)}
    return [cell(found[M]) if M in found else "" for M in tokens]


def _speedup(ours: str, rivals: str, measurement: Record) -> str:
    speedups = (s for s in measurement["speedups"] if (s["ours"], s["class"]) == (ours, rivals))
    return next((f"{s['times_faster']['median']:.2f}" for s in speedups), "")


def _percent(ours: str, measurement: Record) -> str:
    kernels = (kernel for kernel in measurement["kernels"] if kernel["name"] == f"{_OURS} {ours}")
    return next((f"{kernel['percent_of_limit']['median']:.0f}" for kernel in kernels), "")


def _ratio(ratio: Record) -> str:
    return f"{ratio['median']:.2f} ({ratio['low_quartile']:.2f} to {ratio['high_quartile']:.2f})"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


if __name__ == "__main__":
    sys.exit(main())
