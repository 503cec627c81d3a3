"""The hour: parts in order, each a process with a limit, as many as the minutes of a call hold."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.gpu_hour import process
from tools.gpu_hour.part import Options
from tools.gpu_hour.part import run as run_here
from tools.gpu_hour.plan import PARTS, Part
from tools.gpu_hour.records import Folder, Record, Result

ROOT = Path(__file__).resolve().parents[2]
# Where parts find the modules that they import: those of the tests too, whose weights and bounds they use.
FOLDERS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]
LIBRARY_VARIABLE = "EXLLAMA_OPS_CUDA_LIBRARY"
# What a call needs after its last part, to write the report.
_END_SECONDS = 5.0


def say(line: str) -> None:
    """Write a line of progress."""
    print(line, flush=True)


@dataclass
class Hour:
    """A call of the command.

    Args:
        folder: the output folder.
        dry: whether parts are walked in this process, with the host in the device's place.
        library: a folder with a CUDA library that was built elsewhere.
        seconds: of this call; None for as many as it takes.
        clock: tells seconds.
    """

    folder: Folder
    dry: bool = False
    library: Path | None = None
    seconds: float | None = None
    clock: Callable[[], float] = time.monotonic
    gpu: str = ""
    sources: str = field(default_factory=lambda: digest_of_sources(ROOT))

    def __post_init__(self) -> None:
        self._start = self.clock()
        self._has_run_one = False

    def run(self, parts: Iterable[Part], *, resume: bool) -> Sequence[str]:
        """Run parts.

        Args:
            parts: in order. The environment comes first, whatever was asked for: it says what there is to run on.
            resume: leave out those that have a record already.

        Returns:
            The names of the parts that there was no time or no device for.
        """
        environment = self._run(PARTS[0])
        self.gpu = ", ".join(environment.data.get("gpus", []))
        left: list[str] = []
        for part in parts:
            if part is PARTS[0] or (resume and self.folder.record(part.name) is not None):
                continue
            if left or not self._can_begin(part) or self._run(part).status == "cut":
                left.append(part.name)
            else:
                self._has_run_one = True
        return left

    @property
    def has_device(self) -> bool:
        """Whether there is a GPU, or what stands in its place."""
        return self.dry or bool(self.gpu)

    def _remaining(self) -> float:
        return math.inf if self.seconds is None else self.seconds - (self.clock() - self._start) - _END_SECONDS

    def _can_begin(self, part: Part) -> bool:
        if part.needs_gpu and not self.has_device:
            return False
        # The first one gets what time there is, or it would never be run.
        return not self._has_run_one or self._remaining() >= 60 * part.minutes

    def _run(self, part: Part) -> Result:
        say(f"{part.name} ({part.minutes:g} min expected)")
        start = self.clock()
        result = run_here(part.name, Options(self.folder, dry=True)) if self.dry else self._process(part)
        self._keep(part, result, self.clock() - start)
        return result

    def _process(self, part: Part) -> Result:
        minutes = part.limit_minutes if self.has_device else part.limit_elsewhere or part.limit_minutes
        limit, remaining = 60 * minutes, self._remaining()
        seconds = max(1.0, min(limit, remaining))
        log, written = self.folder.log(part.name), self.folder.result(part.name)
        written.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tools.gpu_hour.part", part.name, "--out", str(self.folder.path.resolve())]
        status = process.run(command, log, seconds, self._environment(), ROOT)
        if status is None:
            # What had all of a call and did not end would be begun again by every call.
            is_cut = remaining < limit and self._has_run_one
            return Result("cut" if is_cut else "timeout", f"ended after {seconds:.0f} s", process.last_lines(log))
        try:
            return Result.read(written)
        except (OSError, ValueError, KeyError, TypeError):
            ended = f"signal {-status}" if status < 0 else f"exit status {status}"
            return Result("failed", f"its process ended by {ended}", process.last_lines(log))

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        library = self.library or (self.folder.library if self.folder.library.is_dir() else None)
        if library is not None:
            variables[LIBRARY_VARIABLE] = str(library.resolve())
        return variables

    def _keep(self, part: Part, result: Result, seconds: float) -> None:
        say(f"  {result.status}, {seconds:.0f} s: {result.summary}")
        for line in (*result.lines, *(f"not in a dry run: {text}" for text in result.not_walked)):
            say(f"    {line}")
        if result.status != "cut":
            self.folder.keep(Record(part.name, result, round(seconds, 1), self.gpu, self.sources))


def digest_of_sources(root: Path) -> str:
    """A digest of the package and its sources, by which a reader sees that parts have run the same code."""
    digest = hashlib.sha256()
    for folder in ("csrc", "exllama_ops"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cuh", ".cu", ".cpp"):
                digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
