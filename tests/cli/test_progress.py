"""`exllama_ops.progress`: a live line on a terminal that moves and garbles nothing, and plain lines elsewhere."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import select
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from typing import TextIO

import pytest

from exllama_ops.progress import Screen, ignore


class Terminal:
    """A pseudo-terminal of 60 columns, and what was written to it."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 60)) if sys.version_info >= (3, 11) else None
        self.stream: TextIO = os.fdopen(slave, "w", encoding="utf-8")
        self.written = ""

    def read_until(self, pattern: str) -> str:
        """Everything written so far, read until a pattern is in it."""
        while not re.search(pattern, self.written, re.DOTALL):
            assert select.select([self._master], [], [], 30)[0], f"no {pattern!r} in {self.written!r}"
            assert len(self.written) < 50_000, f"no {pattern!r} in {self.written[-200:]!r}"
            self.written += os.read(self._master, 65536).decode()
        return self.written

    def lines(self) -> list[str]:
        """The lines as a terminal shows them: what follows a carriage return stands over what is there."""
        shown = []
        for line in self.written.split("\r\n"):
            columns: list[str] = []
            for piece in line.split("\r"):
                columns[: len(piece)] = piece
            shown.append("".join(columns).rstrip())
        return shown

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_the_live_line_moves_while_a_step_does_nothing(terminal: Terminal) -> None:
    screen = Screen(terminal.stream, interval_s=0.01)
    screen("waiting")
    terminal.read_until(r"waiting 0\.1 s.*waiting 0\.2 s.*waiting 0\.3 s")
    screen.end()
    terminal.read_until("\n")
    first, last = terminal.lines()
    assert re.fullmatch(r"waiting: \d+\.\d s", first)
    assert last == ""


def test_a_counter_has_a_bar_and_what_it_is_at(terminal: Terminal) -> None:
    screen = Screen(terminal.stream, interval_s=0.01)
    screen("building", 0, 17)
    terminal.read_until(r"building \.{10} \[0/17\] 0\.\d s")
    screen("building", 9, 17, "cpu/isa.cpp")
    terminal.read_until(r"building #{5}\.{5} \[9/17\] cpu/isa\.cpp \d+\.\d s")
    screen("unknown", 3)
    terminal.read_until(r"building \(9 of 17\): \d+\.\d s\r\n\runknown \[3\] 0\.\d s")
    screen.end()
    terminal.read_until(r"unknown \(3\): ")


def test_a_long_line_stays_within_the_terminal(terminal: Terminal) -> None:
    screen = Screen(terminal.stream, interval_s=0.01)
    screen("building the kernels " + "x" * 80, 1, 2, "y" * 80 + "/gemm.cpp")
    terminal.read_until(r"building.*\.\.\. #{5}\.{5} \[1/2\] \.\.\.y*/gemm\.cpp 0\.\d s")
    assert max(map(len, re.split("[\r\n]", terminal.written))) < (60 if sys.version_info >= (3, 11) else 80)
    screen.end()


def test_what_others_write_stands_on_lines_of_its_own(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings, logs of handlers that were made before, and a bar, which hides the live line while it is there."""
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    logger = logging.getLogger("exllama_ops.test_progress")
    logger.propagate = False
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    with Screen(interval_s=0.01) as screen:
        screen("loading")
        terminal.read_until("loading 0.1 s")
        print("words of a warning", file=sys.stderr)  # as the module warnings does
        terminal.read_until("warning\r\n.*loading 0")
        logger.warning("words of a log")
        terminal.read_until("log\r\n.*loading 0")
        assert sys.stderr.isatty()
        sys.stderr.write("\r 10% of a bar")
        sys.stderr.flush()
        threading.Event().wait(0.1)  # the live line would come back meanwhile
        sys.stderr.write("\r 20% of a bar\n")
        terminal.read_until("20% of a bar\r\n.*loading 0")
    assert sys.stderr is terminal.stream
    assert handler.stream is terminal.stream
    logger.removeHandler(handler)
    terminal.read_until(r"loading: ")
    warning, log, bar, loading, *_ = terminal.lines()
    assert warning == "words of a warning"
    assert (log, bar) == ("words of a log", " 20% of a bar")
    assert re.match(r"loading: \d+\.\d s", loading)
    assert re.search("10% of a bar\r 20% of a bar", terminal.written)  # nothing between them


def test_no_terminal_gets_two_plain_lines_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(prefix="exllama_ops: ", interval_s=0.01) as screen:
        for number in range(200):
            screen("quantizing", number + 1, 200, "a layer")
        screen("loading")
    lines = capsys.readouterr().err.split("\n")
    assert [re.sub(r"\d+\.\d s$", "T", line) for line in lines] == [
        *("exllama_ops: quantizing", "exllama_ops: quantizing (200 of 200): T"),
        *("exllama_ops: loading", "exllama_ops: loading: T", ""),
    ]


def test_without_a_terminal_a_line_that_others_write_over_and_over_is_written_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Screen() as screen:
        screen("reading")
        for percent in range(0, 101, 10):
            sys.stderr.write(f"\r {percent}%")
        sys.stderr.write("\na warning\npart")
        sys.stderr.write(" and rest\n")
        sys.stderr.write("\rshown for a while\r                 \r")
        assert capsys.readouterr().err == "reading\n 100%\na warning\npart and rest\n"
        sys.stderr.write("\r 50%")
    assert re.fullmatch(r"reading: \d+\.\d s\n 50%\n", capsys.readouterr().err)


def test_a_dumb_terminal_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen(terminal.stream)
    screen("loading")
    screen.end()
    assert terminal.read_until("s\r\n").startswith("loading\r\nloading: ")


def test_an_error_ends_the_step_as_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()

    def load() -> None:
        with screen:
            screen("loading")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load()
    assert re.fullmatch(r"loading\nloading: stopped after \d+\.\d s\n", capsys.readouterr().err)


def test_no_stderr_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        with Screen() as screen:
            screen("loading", 1, 2)
    ignore("loading", 1, 2, "a file")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_writes_past_a_lock_that_another_thread_held(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    with Screen(interval_s=0.01) as screen:
        screen("loading")
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with screen._lock:
                held.set()
                release.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        child = os.fork()
        if child == 0:
            sys.stderr.write("written by the child\n")
            sys.stderr.flush()
            os._exit(0)
        try:
            terminal.read_until("written by the child")
        finally:
            os.kill(child, signal.SIGKILL)  # in case that it waits
            os.waitpid(child, 0)
            release.set()
            thread.join()
