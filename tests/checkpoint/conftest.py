"""What the tests of checkpoints share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def no_hang() -> Iterator[None]:
    """A test fails that waits for a FIFO in Python, or matches an expression for ever."""
    former = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("no answer"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)
