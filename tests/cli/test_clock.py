"""`exllama_ops.cli.clock`: phases that divide the life of the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from exllama_ops.cli import clock
from exllama_ops.cli.clock import Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Wall and CPU seconds as the clock reads them; the process is 2 and 1 seconds old when it is made."""
    time = [100.0, 50.0]
    monkeypatch.setattr(clock, "_now", lambda: clock._Moment(*time))
    monkeypatch.setattr(clock, "_process_age", lambda: 2.0)
    monkeypatch.setattr(clock, "_cpu_seconds", lambda: 1.0)
    return time


def test_each_phase_has_the_time_since_the_lap_before(now: list[float]) -> None:
    laps = Clock()
    for phase, wall, cpu in (("load", 3, 4), ("build", 10, 20), ("load", 0.5, 0.25)):
        now[0] += wall
        now[1] += cpu
        laps.lap(phase)
    assert laps.seconds() == {"start": 2, "load": 3.5, "build": 10, "first_token": 15.5}
    assert laps.cpu_seconds() == {"start": 1, "load": 4.25, "build": 20, "first_token": 25.25}


def test_a_phase_begun_anew_has_its_last_time_alone_and_what_is_skipped_counts_nowhere(now: list[float]) -> None:
    laps = Clock()
    for wall in (5, 7):
        now[0] += 100
        laps.begin("prefill")
        now[0] += wall
        laps.lap("prefill")
    assert laps.seconds() == {"start": 2, "prefill": 7, "first_token": 9}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_process_began_before_its_first_line() -> None:
    code = "import time; time.sleep(0.5); from exllama_ops.cli.clock import Clock; print(Clock().seconds()['start'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.5


def test_where_the_system_does_not_say_the_process_is_as_old_as_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise OSError

    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr(clock, "_IMPORTED", clock.time.monotonic() - 1000)
    assert clock._process_age() >= 1000
