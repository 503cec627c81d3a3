"""Interleaved timing: in each round every kernel runs once between two measurements of the limits."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Protocol

from benchmarks.peers.peer import nothing

# A burst of short calls holds several, after one that is not timed. The caches and sleeping threads of a kernel come
# back to it, as in a model that has many layers of it.
BURST_CALLS = 4
BURST_TOKENS = 16
# After a burst, until its threads have stopped spinning for more work.
SETTLE_SECONDS = 0.002


@dataclass
class Runner:
    """A kernel that is timed: calls on one copy of its weight after the other, so that weights come from memory.

    Args:
        name: of the kernel.
        calls: one for each copy.
        enter: called before each burst, not timed.
    """

    name: str
    calls: Sequence[Callable[[], object]]
    enter: Callable[[], None] = nothing
    _copies: Iterator[Callable[[], object]] = field(init=False)

    def __post_init__(self) -> None:
        self._copies = cycle(self.calls)

    def take(self, calls: int) -> list[Callable[[], object]]:
        """The next calls, each on the next copy."""
        return [next(self._copies) for _ in range(calls)]


class Timer(Protocol):
    """Times kernels where they run."""

    def warm_up(self, runner: Runner, tokens: int) -> None:
        """Make every call once, so that none is a first one when it is timed; raises what hinders its timing."""
        ...

    def time(self, runner: Runner, tokens: int) -> float:
        """Seconds of a call of the kernel, with ``tokens`` rows of x."""
        ...


class HostTimer:
    """Times calls that are done when they return.

    Args:
        clock: tells seconds.
        sleep: waits for seconds.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep

    def warm_up(self, runner: Runner, tokens: int) -> None:
        """Make every call once."""
        for call in runner.take(len(runner.calls)):
            call()

    def time(self, runner: Runner, tokens: int) -> float:
        """Seconds of a call in a burst; before a burst of several, another call is made that is not timed."""
        calls = BURST_CALLS if tokens <= BURST_TOKENS else 1
        runner.enter()
        if calls > 1:
            (untimed,) = runner.take(1)
            untimed()
        burst = runner.take(calls)
        start = self._clock()
        for call in burst:
            call()
        seconds = (self._clock() - start) / calls
        self._sleep(SETTLE_SECONDS)
        return seconds


@dataclass(frozen=True)
class Sample:
    """One timing: seconds of a call, and the limits around it."""

    seconds: float
    limits: Mapping[str, float]


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range."""

    median: float
    iqr: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one value or more."""
        if len(values) == 1:
            return cls(values[0], 0.0)
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, high - low)


def interleave(
    runners: Sequence[Runner],
    measure_limits: Callable[[], Mapping[str, float]],
    *,
    tokens: int,
    seconds: float,
    rounds: int,
    timer: Timer,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Sample]]:
    """Time kernels in turns, in another order each round.

    Args:
        runners: the kernels.
        measure_limits: measures the limits; called before the first timing of a round and after every one.
        tokens: M.
        seconds: no round is begun after as many.
        rounds: the least number of rounds, however long they take.
        timer: times each kernel.
        clock: tells the seconds of all of it.

    Returns:
        For each kernel its samples, one a round; sample i of all kernels is of the same round.
    """
    shuffle = random.Random(0)
    samples: dict[str, list[Sample]] = {runner.name: [] for runner in runners}
    start = clock()
    done = 0
    while done < rounds or clock() - start < seconds:
        before = measure_limits()
        for runner in shuffle.sample(runners, len(runners)):
            time_of_call = timer.time(runner, tokens)
            after = measure_limits()
            around = {name: (before[name] + after[name]) / 2 for name in before}
            samples[runner.name].append(Sample(time_of_call, around))
            before = after
        done += 1
    return samples
