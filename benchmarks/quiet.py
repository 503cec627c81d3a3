"""Whether the machine was quiet: what other processes and the host took of its cores while something was timed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import Sample, Spread

# A quiet machine stays below each: cores that were not ours, and how far the limits of the machine spread, as their
# interquartile range by their median. Where nothing else ran on a Zen 4, others had 0.05 cores at most. But its host
# shares the DRAM, whose limit spread by more than 0.15 in many measurements.
CORES = 0.1
SPREAD = 0.15
# How long a process looks around before it times anything.
LOOK_SECONDS = 0.5

_STAT = Path("/proc/stat")
# Columns of its first line: user, nice, system, idle, iowait, irq, softirq, steal.
_BUSY, _STEAL = (0, 1, 2, 5, 6), 7


@dataclass(frozen=True)
class Load:
    """What was taken while something was timed.

    Args:
        others: cores that other processes had.
        stolen: cores that the host took.
        spread: of the limits, the interquartile range of the worst by its median.
    """

    others: float
    stolen: float
    spread: float = 0.0

    @property
    def quiet(self) -> bool:
        """Whether times of then mean something."""
        return self.others + self.stolen < CORES and self.spread < SPREAD

    def __str__(self) -> str:
        return f"{self.others:.2f} cores to other processes, {self.stolen:.2f} to the host, limits ±{self.spread:.0%}"

    def record(self) -> dict[str, Any]:
        """What the JSON file has of it."""
        return {"quiet": self.quiet, **asdict(self)}


class Watch:
    """Says what was taken between one look and the next.

    Args:
        stat: the file in which Linux counts the time of all cores.
        clock: tells seconds.
        own: tells the CPU seconds of this process.
        tick: seconds of a unit in the file.
    """

    def __init__(
        self,
        stat: Path = _STAT,
        clock: Callable[[], float] = time.perf_counter,
        own: Callable[[], float] = time.process_time,
        tick: float = 1 / os.sysconf("SC_CLK_TCK"),
    ) -> None:
        self._stat, self._clock, self._own, self._tick = stat, clock, own, tick
        self._last = self._now()

    def look(self, samples: Sequence[Sample] = ()) -> Load:
        """What was taken since the last look.

        Args:
            samples: that were timed since then.
        """
        before, self._last = self._last, self._now()
        seconds, busy, stolen = (now - then for now, then in zip(self._last, before, strict=True))
        seconds = max(seconds, self._tick)
        return Load(max(0.0, busy) / seconds, stolen / seconds, spread_of([sample.limits for sample in samples]))

    def _now(self) -> tuple[float, float, float]:
        """Seconds, CPU seconds of other processes, CPU seconds that the host took."""
        counts = [self._tick * int(count) for count in self._stat.read_text().split("\n", 1)[0].split()[1:]]
        return self._clock(), sum(counts[column] for column in _BUSY) - self._own(), counts[_STEAL]


def said(loads: Sequence[Load]) -> str:
    """A sentence on several loads: the worst of each number, and how many were not quiet."""
    worst = Load(*(max(values) for values in zip(*(astuple(load) for load in loads), strict=True)))
    loud = sum(not load.quiet for load in loads)
    how = f"The machine was not quiet in {loud} of {len(loads)} measurements" if loud else "The machine was quiet"
    return f"{how}: at most {worst}."


def spread_of(limits: Sequence[Mapping[str, float]]) -> float:
    """The largest interquartile range of a limit by its median; a limit is always measured by the same loop."""
    if not limits:
        return 0.0
    spreads = [Spread.of([values[name] for values in limits]) for name in limits[0]]
    return max(spread.iqr / spread.median for spread in spreads)
