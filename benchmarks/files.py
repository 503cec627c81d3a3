"""Where results are written: ``results/`` has a folder for each CPU; what ran on none is beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
# What every command says about its option --out.
OUT_HELP = "for table and JSON (default: a folder of benchmarks/results for each CPU)"

# (vendor, family, models) as /proc/cpuinfo has them, and the microarchitecture. Virtual machines hide more of a name.
_KNOWN = (
    ("AMD", 25, (*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0)), "Zen 4"),
    ("AMD", 25, range(0x60), "Zen 3"),
    ("AMD", 26, range(0x80), "Zen 5"),
    ("Intel", 6, (143,), "Sapphire Rapids"),
    ("Intel", 6, (207,), "Emerald Rapids"),
    ("Intel", 6, (173, 174), "Granite Rapids"),
)
# The same for Arm, whose CPUs name nothing: implementer and part.
_KNOWN_PARTS = {
    "0x41/0xd0c": "Neoverse N1",
    "0x41/0xd40": "Neoverse V1",
    "0x41/0xd49": "Neoverse N2",
    "0x41/0xd4f": "Neoverse V2",
}
# The best that a CPU has, best first.
_ISAS = (
    ("amx_int8", "AMX"),
    ("avx512f", "AVX-512"),
    ("avx2", "AVX2"),
    ("i8mm", "i8mm"),
    ("asimddp", "dotprod"),
    ("asimd", "NEON"),
)


def title(machine: Mapping[str, Any]) -> str:
    """The CPU of a result as tables name it: vendor, microarchitecture or numbers, and its best instruction set.

    Args:
        machine: what `benchmarks.machine.description` made.
    """
    name, _, numbers = str(machine["cpu"]).rpartition(" (")
    words = re.sub(r"\((R|TM)\)|\b(Processor|CPU)\b|@.*", " ", name).split() or ["unknown"]
    found = re.match(r"cpu family (\d+), model (\d+)", numbers)
    if found is not None:
        family, model = map(int, found.groups())
        known = [what for vendor, of, models, what in _KNOWN if (vendor, of) == (words[0], family) and model in models]
        words = [words[0], known[0]] if known else [*words, f"{family}/{model}"]
    if part := re.match(r"CPU implementer (\w+), CPU part (\w+)", numbers):
        number = "/".join(part.groups())
        words = ["Arm", _KNOWN_PARTS.get(number, number)]
    isa = next((label for flag, label in _ISAS if flag in machine["cpu_flags"]), "")
    return " ".join(filter(None, [*words, isa]))


def folder_of(machine: Mapping[str, Any]) -> Path:
    """The folder of a result: that of its CPU; that of all for a GPU, whose name its files have."""
    if "gpu" in machine:
        return RESULTS
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", title(machine).lower()).strip("-")


def write_result(out: Path | None, name: str, result: Mapping[str, Any], table: str) -> Path:
    """Write a result to NAME.json, and its table to NAME.md, in a folder that is made if it is not there.

    Args:
        out: the folder; None for that of the result's machine.
        name: of both files.
        result: has the ``machine``.
        table: made of it.

    Returns:
        The folder.
    """
    folder = out or folder_of(result["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table)
    return folder
