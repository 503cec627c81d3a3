"""Ctrl-C: whether it came, for those who see only what it led to."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 130  # 128 + SIGINT, as shells have it

_came = False


@contextmanager
def watched() -> Iterator[None]:
    """Note every Ctrl-C, which raises KeyboardInterrupt as ever.

    A compiler or a pip that Ctrl-C has ended is an error for the library that started it, which hides what happened.
    """
    handled()
    # Somebody else's handler stays. So does that of a job in the background, which ignores the signal.
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    try:
        signal.signal(signal.SIGINT, _note)
    except ValueError:  # not the main thread, which alone is interrupted
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def came() -> bool:
    """Whether a Ctrl-C came that nobody has handled."""
    return _came


def handled() -> None:
    """Forget it: what it asked for is done."""
    global _came
    _came = False


def _note(number: int, frame: FrameType | None) -> None:
    global _came
    _came = True
    signal.default_int_handler(number, frame)
