"""Times calls as a captured graph replays them: no time of the host is in them, and weights come from DRAM."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Call = Callable[[], object]
# Of each round as many replays lie between two events; the median of the rounds counts.
_REPLAYS, _ROUNDS = 5, 5
# Copies of what a call reads are together so many times what L2 holds.
_CACHES = 3


class Clock(Protocol):
    """Times calls where they run."""

    place: torch.device
    cache_bytes: int

    def seconds(self, calls: Sequence[Call]) -> float:
        """Seconds of one call, of several that read different copies of the same."""
        ...


class GraphClock:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.place = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes: int = torch.cuda.get_device_properties(self.place).L2_cache_size

    def seconds(self, calls: Sequence[Call]) -> float:
        """Seconds of one call. All are made once before, since what they load and tune cannot be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call() for call in calls]
        graph.replay()
        rounds: list[float] = []
        for _ in range(_ROUNDS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(_REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            rounds.append(start.elapsed_time(end) / 1e3 / _REPLAYS / len(calls))
        del results
        return statistics.median(rounds)


class HostClock:
    """The host in a device's place: what it tells means nothing."""

    place = torch.device("cpu")
    cache_bytes = 1

    def seconds(self, calls: Sequence[Call]) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)


def copies(clock: Clock, nbytes: int) -> int:
    """How many copies of so many bytes are more than the caches hold."""
    return max(2, min(64, -(-_CACHES * clock.cache_bytes // nbytes)))
