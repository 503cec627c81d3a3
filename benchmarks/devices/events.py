"""Timing on a GPU: events around a call whose caches are cold, while the host is ahead of the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from benchmarks.devices.device import DeviceError
from benchmarks.timing import Runner

# Cycles of the device: between 0.1 and 0.3 ms, in which the host launches what one call takes.
_FIRST_HEAD_START = 1 << 18
# Some 40 ms, in which the host of no kernel is late; one that is waits for the device.
_LAST_HEAD_START = 1 << 26


class TimingError(DeviceError):
    """A call cannot be timed alone."""


class Event(Protocol):
    """What is used of `torch.cuda.Event` with ``enable_timing``."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class Queue(Protocol):
    """Where a GPU takes its work from, in order."""

    def event(self) -> Event:
        """A new event, which takes the time."""
        ...

    def delay(self, cycles: int) -> None:
        """Keep the device busy."""
        ...

    def flush(self) -> None:
        """Write more than the caches hold."""
        ...


class EventTimer:
    """Times one call at a time, by events of the device.

    A kernel of a single token takes microseconds, less than Python takes to launch it. So the device is kept busy
    until all of the call is in its queue, and what is timed has no gap for the host. That the host was ahead is looked
    up after the call. If the first event was over by then, the call is timed again with a longer head start. A captured
    graph would hide the host too, but its own launch lies between the events, and not every kernel can be captured.

    Args:
        queue: of the device.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._head_start = _FIRST_HEAD_START

    def warm_up(self, runner: Runner, tokens: int) -> None:
        """Make every call once, which may tune or compile, and time one.

        Raises:
            TimingError: it cannot be timed.
        """
        for call in runner.take(len(runner.calls)):
            call()
        self.time(runner, tokens)

    def time(self, runner: Runner, tokens: int) -> float:
        """Seconds of a call."""
        runner.enter()
        (call,) = runner.take(1)
        return self.seconds(call)

    def seconds(self, call: Callable[[], object]) -> float:
        """Seconds that the device takes for what a call launches.

        Raises:
            TimingError: the call returns only when the device is done.
        """
        while True:
            start, end = self._queue.event(), self._queue.event()
            self._queue.delay(self._head_start)
            self._queue.flush()
            start.record()
            call()
            end.record()
            host_was_late = start.query()
            end.synchronize()
            if not host_was_late:
                return start.elapsed_time(end) / 1e3
            if self._head_start == _LAST_HEAD_START:
                self._head_start = _FIRST_HEAD_START
                raise TimingError("the call waits for the device, so its launches are part of every time")
            self._head_start *= 2
