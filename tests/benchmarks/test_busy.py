"""The benchmark of a busy core: its loop runs when it should, its figures are those of the calls."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import busy


def state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="pins a process as Linux does")
def test_the_loop_stops_and_goes_on_and_ends() -> None:
    before = {int(name) for name in os.listdir("/proc") if name.isdigit()}
    core = min(os.sched_getaffinity(0))
    with busy.busy_loop(core) as wanted:
        (process,) = (
            child
            for child in ({int(name) for name in os.listdir("/proc") if name.isdigit()} - before)
            if f"\nPPid:\t{os.getpid()}\n" in Path(f"/proc/{child}/status").read_text()
        )
        assert os.sched_getaffinity(process) == {core}
        wanted(False)
        while state(process) != "T":
            pass
        wanted(True)
        while state(process) == "T":
            pass
    assert not Path(f"/proc/{process}").exists()


def test_the_table_compares_with_one_thread_of_the_same_kind() -> None:
    rows = [
        {"K": 8, "N": 16, "group_size": 4, "threads": threads, "busy": loop, **busy.spread([mean - 1, mean, mean + 1])}
        for threads, loop, mean in ((1, False, 10.0), (1, True, 20.0), (2, False, 5.0), (2, True, 30.0))
    ]
    machine = {"cpu": "a", "cores": 2, "isa": "b", "commit": "c", "packages": {"torch": "d"}}
    page = busy.table({"command": "python -m benchmarks.busy", "machine": machine, "microseconds": rows})
    ratios = [line.split("|")[-2].strip() for line in page.splitlines() if line.startswith("| 8 x 16")]
    assert ratios == ["1.00", "1.00", "0.50", "1.50"]


def test_a_window_times_one_call_at_least() -> None:
    called: list[int] = []
    times = busy.calls_in_window([lambda: called.append(0), lambda: called.append(1)])
    assert len(times) == len(called) - 1 >= 1
    assert called[:3] == [0, 1, 0]
