"""The report of the hour, in Markdown for people and in JSON for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tools.gpu_hour.records import Record, Table


def write_report(folder: Path, records: Sequence[Record], left: Sequence[str], sources: str) -> str:
    """Write report.md and report.json.

    Args:
        folder: in which they lie.
        records: of the parts that were run, in order.
        left: the names of parts that there was no time for.
        sources: the digest of the sources of this call.

    Returns:
        The text of report.md.
    """
    values = {"sources": sources, "left": list(left), "parts": [asdict(record) for record in records]}
    (folder / "report.json").write_text(json.dumps(values, indent=1) + "\n")
    text = "\n".join(_lines(records, left, sources)) + "\n"
    (folder / "report.md").write_text(text)
    return text


def _lines(records: Sequence[Record], left: Sequence[str], sources: str) -> Iterator[str]:
    counts = Counter(record.result.status for record in records)
    minutes = sum(record.seconds for record in records) / 60
    gpus = ", ".join(dict.fromkeys(record.gpu for record in records if record.gpu)) or "none"
    outcomes = ", ".join(f"{count} {status}" for status, count in counts.items())
    yield "# The first hour on a GPU\n"
    yield f"GPU: {gpus}. Sources: {sources}. Parts: {outcomes}; {minutes:.1f} minutes.\n"
    rows = [_row(record, sources) for record in records]
    yield from markdown(Table("", ("part", "status", "seconds", "what"), rows))
    if left:
        yield f"\nNot run yet: {', '.join(left)}."
    for record in records:
        result = record.result
        if result.lines or result.tables or result.not_walked:
            yield f"\n## {record.part}\n"
            yield from (f"- {line}" for line in result.lines)
            yield from (f"- not in a dry run: {line}" for line in result.not_walked)
            for table in result.tables:
                yield f"\n{table.title}\n"
                yield from markdown(table)


def _row(record: Record, sources: str) -> Sequence[str]:
    result = record.result
    other = "" if record.sources == sources else f" (of other sources, {record.sources})"
    status = result.status if result.status == "passed" else f"**{result.status}**"
    return record.part, status, f"{record.seconds:.0f}", result.summary + other


def markdown(table: Table) -> Iterator[str]:
    """The lines of a table."""
    for cells in (table.columns, ["---"] * len(table.columns), *table.rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
