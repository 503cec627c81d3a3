"""Numbers made of samples whose times and limits are given."""

from __future__ import annotations

import json

import pytest

from benchmarks.cases import Case
from benchmarks.plan import Missing
from benchmarks.quiet import Load
from benchmarks.report import record, table
from benchmarks.results import Measurement, Timed, by_tokens
from benchmarks.timing import HostTimer, Runner, Sample, Spread, interleave

QUIET = Load(0.0, 0.0)
LIMITS = {"dram": 1e9, "float": 1e12, "int16": 2e12, "int8": 4e12}


MACHINE = {
    "cpu": "a CPU", "cores": 2, "threads": 1, "isa": "avx2", "held_to": "avx2", "cpu_flags": ["avx2"],
    "huge_pages": "madvise", "system": "Linux", "python": "3", "commit": "abc",
    "packages": {"torch": "2", "gone": None},
}  # fmt: skip
CONFIGURATION = {"bits": 4, "group_size": 128, "act_order": False}


def samples(*seconds: float, scale: tuple[float, ...] = ()) -> list[Sample]:
    factors = scale or (1.0,) * len(seconds)
    pairs = zip(seconds, factors, strict=True)
    return [Sample(time, {name: value * factor for name, value in LIMITS.items()}) for time, factor in pairs]


def measurement(M: int, *kernels: Timed) -> Measurement:
    return Measurement("gptq_gemm", 1000, 500, M, kernels, by_tokens, QUIET)


def test_one_token_counts_bytes_against_dram() -> None:
    kernel = Timed("exllama_ops high", "int16", 0.0, 250_000, samples(1e-3))
    assert measurement(1, kernel).percent(kernel).median == pytest.approx(25.0)


@pytest.mark.parametrize(("kind", "percent"), [("float", 40.0), ("int16", 20.0), ("int8", 10.0)])
def test_more_tokens_count_operations_against_the_peak_of_the_class(kind: str, percent: float) -> None:
    kernel = Timed("k", kind, 0.0, 250_000, samples(1e-5))
    assert measurement(4, kernel).percent(kernel).median == pytest.approx(percent)


def test_percent_is_the_median_of_ratios_not_the_ratio_of_medians() -> None:
    # A machine whose clock halves in two rounds of three: the kernel is at 40% of it in each.
    kernel = Timed("k", "float", 0.0, 1, samples(1e-5, 2e-5, 2e-5, scale=(1.0, 0.5, 0.5)))
    result = measurement(4, kernel)
    assert result.percent(kernel) == Spread(pytest.approx(40.0), pytest.approx(0.0, abs=1e-9))
    kernel = Timed("k", "float", 0.0, 1, samples(1e-5, 2e-5, 4e-5, scale=(0.5, 1.0, 0.1)))
    assert measurement(4, kernel).percent(kernel).median == pytest.approx(80.0)  # of medians: 40


def test_speedups_are_over_the_fastest_peer_of_a_class_and_never_over_our_own() -> None:
    ours = Timed("exllama_ops high", "int16", 0.0, 1, samples(2.0, 4.0, 1.0))
    better = Timed("exllama_ops medium", "int8", 0.0, 1, samples(0.5, 0.5, 0.5))
    slow = Timed("slow", "float", 0.0, 1, samples(9.0, 9.0, 9.0))
    fast = Timed("fast", "float", 0.0, 1, samples(4.0, 4.0, 4.0))
    (found,) = measurement(4, ours, better, slow, fast).comparisons()
    assert (found.precision, found.peer, found.speedup.median) == ("high", "fast", 2.0)


def test_highest_is_compared_with_float_peers_that_are_as_exact() -> None:
    ours = Timed("exllama_ops highest", "float", 0.0, 1, samples(2.0))
    rough = Timed("rough", "float", 2e-3, 1, samples(1.0))
    exact = Timed("exact", "float", 5e-7, 1, samples(5.0))
    assert measurement(4, ours, rough).comparisons() == []
    (found,) = measurement(4, ours, rough, exact).comparisons()
    assert found.record() == {
        "ours": "highest",
        "class": "exact",
        "peer": "exact",
        "times_faster": {"median": 2.5, "iqr": 0.0},
    }


def test_a_peer_of_two_classes_has_a_row_for_each() -> None:
    peers = [Timed("peer", kind, 1e-6, 1, samples(1e-3)) for kind in ("float", "int8")]
    result = record(
        "", MACHINE, CONFIGURATION, [measurement(M, peer) for M, peer in zip((1, 4), peers, strict=True)], [], QUIET
    )
    rows = [line.split("|") for line in table(result).splitlines() if line.startswith("| peer")]
    assert [(row[2].strip(), bool(row[4].strip()), bool(row[5].strip())) for row in rows] == [
        ("float", True, False), ("int8", False, True),
    ]  # fmt: skip


def test_a_machine_that_was_not_quiet_is_told_in_the_record_and_in_the_table() -> None:
    loud = Load(0.8, 0.0)
    assert measurement(1).record()["machine_was"] == {"quiet": True, "others": 0.0, "stolen": 0.0, "spread": 0.0}
    result = record("", MACHINE, CONFIGURATION, [measurement(1)], [], loud)
    assert (result["quiet"], result["before"]["quiet"]) == (False, False)
    assert "The machine was not quiet in 1 of 2 measurements: at most 0.80 cores to other processes" in table(result)


def test_spread_of_one_and_of_five() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 0.0)
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0)


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


def test_each_burst_stands_between_two_measurements_of_the_limits() -> None:
    clock = Clock()
    events: list[str] = []
    limits = iter(range(100))

    def measure() -> dict[str, float]:
        events.append("limits")
        return {"dram": float(next(limits))}

    def call(name: str) -> None:
        events.append(name)
        clock.sleep(1.0 if name == "a" else 2.0)

    runners = [Runner(name, [lambda name=name: call(name)]) for name in "ab"]
    found = interleave(
        runners, measure, tokens=64, seconds=0.0, rounds=2, timer=HostTimer(clock, clock.sleep), clock=clock
    )
    assert [event == "limits" for event in events] == [True, False, True, False, True] * 2
    assert [sample.seconds for sample in found["a"]] == pytest.approx([1.0, 1.0])
    assert [sample.seconds for sample in found["b"]] == pytest.approx([2.0, 2.0])
    between = sorted(sample.limits["dram"] for name in "ab" for sample in found[name])
    assert between == [0.5, 1.5, 3.5, 4.5]


def test_rounds_go_on_until_the_seconds_are_over() -> None:
    clock = Clock()
    runner = Runner("a", [lambda: clock.sleep(1.0)])
    found = interleave(
        [runner], dict, tokens=64, seconds=4.5, rounds=1, timer=HostTimer(clock, lambda seconds: None), clock=clock
    )
    assert len(found["a"]) == 5


def test_a_burst_of_few_tokens_is_several_calls_on_all_copies_after_one_untimed() -> None:
    clock = Clock()
    called: list[int] = []

    def call(copy: int) -> None:
        called.append(copy)
        clock.sleep(10.0 if len(called) == 1 else 1.0)

    runner = Runner("a", [lambda copy=copy: call(copy) for copy in range(3)])
    found = interleave(
        [runner], dict, tokens=1, seconds=0.0, rounds=1, timer=HostTimer(clock, clock.sleep), clock=clock
    )
    assert called == [0, 1, 2, 0, 1]
    assert found["a"][0].seconds == 1.0


def test_the_table_shows_times_percents_speedups_and_what_is_missing() -> None:
    ours = Timed("exllama_ops high", "int16", 2e-4, 250_000, samples(1e-3, 1e-3))
    peer = Timed("peer", "float", 1e-6, 500_000, samples(3e-3, 3e-3))
    missing = [Missing("other", Case(1000, 500), None, "ImportError: no")]
    result = record("python -m benchmarks.run", MACHINE, CONFIGURATION, [measurement(1, ours, peer)], missing, QUIET)
    text = table(json.loads(json.dumps(result)))
    assert "| exllama_ops high | int16 | 2.0e-04 | 1 ±0, 25% |" in text
    assert "| high than the best float peer | 3.00 (peer) |" in text
    assert "- other: ImportError: no" in text
    assert "gone missing" in text
    assert "all held to avx2" in text
    assert "The machine was quiet" in text
