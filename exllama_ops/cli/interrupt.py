"""Ctrl-C: whether it came, for those who see only what it led to, and an end to what goes on all the same."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_CODE = 130  # 128 + SIGINT, as shells have it

# From an interrupt to the end of a process that goes on.
_GRACE_S = 2.0
# From an interrupt that Python dropped to the next try: what dropped it is over by then.
_AGAIN_S = 0.05

_CAME, _DROPPED = b".", b"!"

_number = 0  # of those that came so far
_handled = 0
_bell = -1  # a pipe: a handler of signals may write to it at any moment, and may take no lock


@contextmanager
def watched() -> Iterator[None]:
    """Note every Ctrl-C, which raises KeyboardInterrupt as ever, and see that it leads to something.

    A compiler or a pip that Ctrl-C has ended is an error for the library that started it, which hides what happened.
    In a callback Python drops the exception: it is raised again then, and no traceback is shown. A process that goes on
    nevertheless is ended, since no step leaves anything half done that another process would take for whole.
    """
    global _bell
    handled()
    # Somebody else's handler stays. So does that of a job in the background, which ignores the signal.
    if (
        sys.platform == "win32"
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    show = sys.unraisablehook

    def show_others(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            os.write(_bell, _DROPPED)
        else:
            show(dropped)

    listening, _bell = os.pipe()
    threading.Thread(target=_watch, args=(listening, threading.get_ident()), daemon=True).start()
    sys.unraisablehook = show_others
    signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = show
        handled()
        os.close(_bell)


def came() -> bool:
    """Whether a Ctrl-C came that nobody has handled."""
    return _number > _handled


def handled() -> None:
    """Forget it: what it asked for is done."""
    global _handled
    _handled = _number


def end_process() -> None:
    """End the process as after Ctrl-C, at once: what runs at exit may wait for compilers."""
    with suppress(AttributeError, OSError, ValueError):  # no stdout, or nobody who reads it
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(EXIT_CODE)


def _note(number: int, frame: FrameType | None) -> None:
    global _number
    _number += 1
    os.write(_bell, _CAME)
    signal.default_int_handler(number, frame)


def _watch(listening: int, main: int) -> None:
    deadline: float | None = None
    waits_for = 0
    while True:
        remaining = None if deadline is None else max(deadline - time.monotonic(), 0)
        if select.select([listening], [], [], remaining)[0]:
            heard = os.read(listening, 1)
            if not heard:
                break
            if heard == _DROPPED:
                time.sleep(_AGAIN_S)
                if came():
                    signal.pthread_kill(main, signal.SIGINT)
            elif deadline is None:
                deadline, waits_for = time.monotonic() + _GRACE_S, _number
        elif _handled < waits_for:
            if os.isatty(2):
                os.write(2, b"\n")  # after the live line
            end_process()
        elif came():
            deadline, waits_for = time.monotonic() + _GRACE_S, _number
        else:
            deadline = None
    os.close(listening)
