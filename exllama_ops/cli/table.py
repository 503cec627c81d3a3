"""Tables of the command line, and names of modules that differ in numbers alone told as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


def pattern_of(name: str) -> str:
    """A name with its numbers left out, which is one for the layers of a model."""
    return _NUMBER.sub("*", name)


def told(names: Sequence[str]) -> str:
    """The names of one pattern as one, with the numbers that they have: ``layers.0-3,5.up_proj``."""
    numbers = zip(*(_NUMBER.findall(name) for name in names), strict=True)
    runs = iter([_runs({int(number) for number in column}) for column in numbers])
    return _NUMBER.sub(lambda match: next(runs), names[0])


def _runs(numbers: set[int]) -> str:
    """Numbers as runs: ``0-3,5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def lines_of(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """A table with a head; numbers stand to the right."""
    cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
    if not cells:
        return []
    names = list(cells[0])
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in names}
    numeric = {name: all(re.fullmatch(r"-?[\d.]+|", row[name]) for row in cells) for name in names}

    def line(row: Mapping[str, str]) -> str:
        aligned = (row[name].rjust(widths[name]) if numeric[name] else row[name].ljust(widths[name]) for name in names)
        return "  ".join(aligned).rstrip()

    return [line({name: name for name in names}), *map(line, cells)]


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, (list, tuple)):
        return " x ".join(map(str, value))
    return str(value)
