"""What a part found, and the folder in which the hour keeps it between calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

# "cut" is what the budget of a call ended: it is run again by the next one.
Status = Literal["passed", "failed", "skipped", "timeout", "cut"]


@dataclass(frozen=True)
class Table:
    """A table of the report."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Result:
    """What a part found.

    Args:
        status: of the part.
        summary: a line for people.
        lines: more of them, as failures and what was skipped with its reason.
        tables: of the report.
        data: for programs.
        not_walked: of a dry run, what of the part it cannot do, and why.
    """

    status: Status
    summary: str
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    data: dict[str, Any] = field(default_factory=dict)
    not_walked: Sequence[str] = ()

    def write(self, path: Path) -> None:
        """Keep it in a file."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Result:
        """What `write` has kept.

        Raises:
            OSError, ValueError, KeyError, TypeError: there is no such thing in the file.
        """
        values = json.loads(path.read_text())
        return cls(**{**values, "tables": [Table(**table) for table in values["tables"]]})


@dataclass(frozen=True)
class Record:
    """A part that was run: its result, when, and on what.

    Args:
        part: its name.
        result: what it found.
        seconds: that it took.
        gpu: on which it ran; empty without one.
        sources: the digest of what it ran.
    """

    part: str
    result: Result
    seconds: float
    gpu: str
    sources: str


class Folder:
    """The output folder: ``parts`` has a record for each part, ``logs`` what it printed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = path / "library"
        self._parts, self._logs = path / "parts", path / "logs"

    def open(self, *, resume: bool) -> None:
        """Make it, and forget what an earlier hour found unless that is to be resumed."""
        for folder in (self._parts, self._logs):
            folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            for file in (*self._parts.glob("*.json"), *self._logs.glob("*.txt")):
                file.unlink()

    def log(self, part: str) -> Path:
        """The file for what a part prints."""
        return self._logs / f"{part}.txt"

    def result(self, part: str) -> Path:
        """The file into which a part's process writes its result."""
        return self._logs / f"{part}.result.json"

    def keep(self, record: Record) -> None:
        """Write a record."""
        (self._parts / f"{record.part}.json").write_text(json.dumps(asdict(record), indent=1) + "\n")

    def record(self, part: str) -> Record | None:
        """The record of a part, or None if it was not run to an end."""
        try:
            values = json.loads((self._parts / f"{part}.json").read_text())
            tables = [Table(**table) for table in values["result"]["tables"]]
            return Record(**{**values, "result": Result(**{**values["result"], "tables": tables})})
        except (OSError, ValueError, KeyError, TypeError):
            return None
