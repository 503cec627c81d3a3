"""How long steps say where they are: library code takes a `Notify`, and a `Screen` is one that shows them.

On a terminal the present step is a live line at the bottom. A thread writes it anew several times a second, so that
its elapsed time moves even while one compiler runs. Elsewhere a step is a line when it begins and a line when it ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol, TextIO, cast

_BAR_WIDTH = 10


class Notify(Protocol):
    """Takes the steps of something long, and counts within a step. It may be called from any thread."""

    def __call__(self, step: str, done: int | None = None, total: int | None = None, detail: str = "") -> None:
        """Say what happens now.

        Args:
            step: one short line, "compiling graph 2 of 4: decoder layer, decode". Another text is another step, which
                ends the one before.
            done: how much of the step is done. Many calls with the same step are one step whose counter moves.
            total: how much there is to do; None if nobody knows.
            detail: what the step is at, the name of a file for example; only a terminal shows it.
        """


def ignore(step: str, done: int | None = None, total: int | None = None, detail: str = "") -> None:
    """A `Notify` that shows nothing."""


class Screen:
    """Shows steps on a stream, and is a `Notify`.

    As a context manager it also takes the place of ``sys.stderr``. On a terminal a warning, a log record or a bar of
    another library then stands on a line of its own. A line that others have begun, as bars do, hides the live line
    until it ends. Elsewhere a line that others write over and over is written once, as it was when it ended.

    Args:
        stream: where to write; None for ``sys.stderr``.
        prefix: what every line begins with.
        interval_s: how often the live line is written anew.
    """

    def __init__(self, stream: TextIO | None = None, *, prefix: str = "", interval_s: float = 0.1) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._prefix = prefix
        self._interval_s = interval_s
        self._live = _is_terminal(self._stream)
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._step: _Step | None = None
        self._shown = 0  # columns of the live line that are on the screen
        self._others_line = False  # whether others have begun a line
        self._rewritten: str | None = None  # where there is no terminal: a line of others that had a carriage return

    def __call__(self, step: str, done: int | None = None, total: int | None = None, detail: str = "") -> None:
        with self._lock:
            if self._step is None or self._step.text != step:
                self.end()
                self._begin(step)
            assert self._step is not None
            self._step.done, self._step.total, self._step.detail = done, total, detail
            if self._shown == 0:
                self._draw()

    def end(self, *, completed: bool = True) -> None:
        """End the present step, if there is one: its elapsed time stays on the screen."""
        with self._lock:
            step, self._step = self._step, None
            if step is None:
                return
            self._wake.set()
            self._hide()
            how = "" if completed else "stopped after "
            self._write(f"{self._prefix}{step.text}{step.counts()}: {how}{step.age()}\n")

    def __enter__(self) -> Screen:
        if self._stream is sys.stderr and self._stream is not None:
            self._others = _Others(self)
            sys.stderr = cast(TextIO, self._others)
            _redirect_logs(self._stream, sys.stderr)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(completed=kind is None)
        others = getattr(self, "_others", None)
        if others is not None and sys.stderr is others:
            sys.stderr = self._stream
            _redirect_logs(others, self._stream)
        if self._rewritten is not None:
            self.write_for_others("\n")

    def write_for_others(self, text: str) -> None:
        """Write what is none of the screen's own, above the live line."""
        with self._lock:
            if not self._live:
                text = self._once(text)
            self._hide()
            self._stream.write(text)
            if text:
                self._others_line = not text.endswith(("\n", "\r"))
            self._draw()

    def _once(self, text: str) -> str:
        """What of a text can be written where nothing can be written over."""
        if self._rewritten is None and "\r" not in text:
            return text
        whole, newline, line = f"{self._rewritten or ''}{text}".rpartition("\n")
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in whole.split("\n")] if newline else []
        self._rewritten = line.rpartition("\r")[2] or None
        return "".join(f"{line}\n" for line in lines)

    def _begin(self, text: str) -> None:
        self._step = _Step(text)
        self._wake = threading.Event()
        if self._live:
            threading.Thread(target=self._keep_drawing, args=(self._step, self._wake), daemon=True).start()
        else:
            self._write(f"{self._prefix}{text}\n")

    def _keep_drawing(self, step: _Step, ended: threading.Event) -> None:
        while not ended.wait(self._interval_s):
            with self._lock:
                if self._step is step:
                    self._draw()

    def _draw(self) -> None:
        if not self._live or self._step is None or self._others_line:
            return
        line = self._step.live_line(self._prefix, _columns(self._stream))
        self._write("\r" + line + " " * (self._shown - len(line)))
        self._shown = len(line)

    def _hide(self) -> None:
        if self._shown:
            self._write("\r" + " " * self._shown + "\r")
            self._shown = 0

    def _write(self, text: str) -> None:
        # A service may have no stderr, or one that is closed: no reason to stop what is shown.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


class _Step:
    """A step that began when this was made."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.done: int | None = None
        self.total: int | None = None
        self.detail = ""
        self._start = time.monotonic()

    def age(self) -> str:
        return f"{time.monotonic() - self._start:.1f} s"

    def counts(self) -> str:
        if self.done is None:
            return ""
        return f" ({self.done})" if self.total is None else f" ({self.done} of {self.total})"

    def live_line(self, prefix: str, columns: int) -> str:
        """What there is to say in one line of the screen. The text gives way first, then the detail."""
        counter = f" {self._bar()}" if self._bar() else ""
        end = f" {self.age()}"
        room = columns - len(counter) - len(end)
        text = f"{prefix}{self.text}"
        detail = _last(f" {self.detail}", max(room - len(text), room // 2)) if self.detail else ""
        return (_first(text, room - len(detail)) + counter + detail + end)[:columns]

    def _bar(self) -> str:
        if self.done is None:
            return ""
        if not self.total:
            return f"[{self.done}]"
        filled = min(self.done, self.total) * _BAR_WIDTH // self.total
        return f"{'#' * filled}{'.' * (_BAR_WIDTH - filled)} [{self.done}/{self.total}]"


class _Others:
    """``sys.stderr`` of everybody else while a screen has a live line there."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._pid = os.getpid()

    def write(self, text: str) -> int:
        if os.getpid() == self._pid:
            self._screen.write_for_others(text)
        else:  # in a child that was forked, the screen's lock may be held for ever
            self._screen._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._screen._stream, name)


def _first(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: max(length - 3, 0)]}..."


def _last(text: str, length: int) -> str:
    return text if len(text) <= length else f" ...{text[len(text) - max(length - 4, 0) :]}"


def _redirect_logs(old: object, new: TextIO) -> None:
    """Let every log handler that writes to one stream write to another: they keep the stream they were made with."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # no stream after all, or one that is closed
        return False


def _columns(stream: TextIO) -> int:
    """Columns that a line may take without going on in the next one."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (AttributeError, OSError, ValueError):
        columns = 0
    return (columns or 80) - 1
