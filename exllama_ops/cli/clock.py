"""Where the time goes until the first token: seconds and CPU seconds since the process started, by phase."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

_IMPORTED = time.monotonic()


class _Moment(NamedTuple):
    wall: float
    cpu: float


class Clock:
    """Divides the life of the process into phases. The first is "start": all that was before this object.

    CPU seconds are those of all threads of the process, and of the children that have ended.
    """

    def __init__(self) -> None:
        self._phases: dict[str, _Moment] = {"start": _Moment(_process_age(), _cpu_seconds())}
        self._last = _now()

    def lap(self, phase: str) -> None:
        """Give a phase the time since the last lap, beside what it has."""
        now, before = _now(), self._phases.get(phase, _Moment(0, 0))
        self._phases[phase] = _Moment(before.wall + now.wall - self._last.wall, before.cpu + now.cpu - self._last.cpu)
        self._last = now

    def begin(self, phase: str) -> None:
        """Begin a phase anew, and leave the time since the last lap out."""
        self._phases.pop(phase, None)
        self._last = _now()

    def seconds(self) -> dict[str, float]:
        """Seconds by phase, and their sum as "first_token"."""
        return _with_sum({name: moment.wall for name, moment in self._phases.items()})

    def cpu_seconds(self) -> dict[str, float]:
        """The same in CPU seconds."""
        return _with_sum({name: moment.cpu for name, moment in self._phases.items()})


def _with_sum(phases: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in {**phases, "first_token": sum(phases.values())}.items()}


def _now() -> _Moment:
    return _Moment(time.monotonic(), _cpu_seconds())


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _process_age() -> float:
    """Seconds since the process started; where the system does not say, since this module was imported."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            # The second field, a name in brackets, may hold anything; the 22nd counts ticks since the system started.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, IndexError, OSError, ValueError):
        return time.monotonic() - _IMPORTED
