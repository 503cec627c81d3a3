"""What others take of a machine whose clock and counts are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quiet import Load, Watch, said, spread_of
from benchmarks.timing import Sample


class Machine:
    """Two cores whose counts a test moves on; 100 are a second."""

    def __init__(self, stat: Path) -> None:
        self.stat, self.seconds, self.own = stat, 0.0, 0.0
        self.counts = [5000, 7, 300, 90000, 20, 3, 4, 50, 0, 0]
        self.pass_time(0.0)

    def pass_time(self, seconds: float, *, own: float = 0.0, others: float = 0.0, stolen: float = 0.0) -> None:
        self.seconds += seconds
        self.own += own
        self.counts[0] += round(100 * own)
        self.counts[2] += round(100 * others)
        self.counts[3] += round(100 * (2 * seconds - own - others - stolen))
        self.counts[7] += round(100 * stolen)
        self.stat.write_text(f"cpu  {' '.join(map(str, self.counts))}\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 5\n")

    def watch(self) -> Watch:
        return Watch(self.stat, lambda: self.seconds, lambda: self.own, tick=0.01)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "stat")


def test_what_this_process_takes_is_not_noise(machine: Machine) -> None:
    watch = machine.watch()
    machine.pass_time(3.0, own=6.0)
    load = watch.look()
    assert (load.others, load.stolen, load.quiet) == (pytest.approx(0.0, abs=1e-9), 0.0, True)


@pytest.mark.parametrize("taken", ["others", "stolen"])
def test_a_core_for_another_process_or_the_host_is_noise(machine: Machine, taken: str) -> None:
    watch = machine.watch()
    machine.pass_time(4.0, own=4.0, **{taken: 2.0})
    load = watch.look()
    assert getattr(load, taken) == pytest.approx(0.5)
    assert not load.quiet


def test_a_look_begins_where_the_last_one_ended(machine: Machine) -> None:
    watch = machine.watch()
    machine.pass_time(1.0, own=1.0, others=1.0)
    assert not watch.look().quiet
    machine.pass_time(1.0, own=1.0)
    assert watch.look().quiet


def test_limits_that_spread_are_noise(machine: Machine) -> None:
    watch = machine.watch()
    machine.pass_time(1.0, own=1.0)
    steady = [Sample(1.0, {"dram": 10.0, "float": 5.0}) for _ in range(5)]
    assert watch.look(steady) == Load(pytest.approx(0.0, abs=1e-9), 0.0, 0.0)
    machine.pass_time(1.0, own=1.0)
    unsteady = [Sample(1.0, {"dram": 10.0, "float": peak}) for peak in (3.0, 4.0, 5.0, 6.0, 7.0)]
    load = watch.look(unsteady)
    assert (load.spread, load.quiet) == (pytest.approx(0.4), False)


def test_no_limits_have_no_spread() -> None:
    assert spread_of([]) == 0.0


def test_the_sentence_has_the_worst_of_each_number() -> None:
    calm, loud = Load(0.01, 0.0, 0.05), Load(0.0, 0.9, 0.01)
    assert said([calm]) == "The machine was quiet: at most 0.01 cores to other processes, 0.00 to the host, limits ±5%."
    assert said([calm, loud]).startswith(
        "The machine was not quiet in 1 of 2 measurements: at most 0.01 cores to other processes, 0.90 to the host"
    )
