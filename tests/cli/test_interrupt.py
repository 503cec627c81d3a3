"""Ctrl-C leads to an end, whatever code it comes into."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from exllama_ops.cli import interrupt

HEAD = """
import signal, sys, time, weakref
from exllama_ops import cli
from exllama_ops.cli import interrupt

class Thing:
    pass

def interrupt_me(*args):
    signal.raise_signal(signal.SIGINT)

def command(args):
"""
TAIL = """
cli.run.run = command
sys.argv[1:] = ["run"]
cli.entry()
"""


def ended(body: str) -> tuple[int, str]:
    """The exit code and stderr of a process whose subcommand does this."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    done = subprocess.run([sys.executable, "-c", HEAD + lines + TAIL], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def test_one_that_comes_in_a_callback_is_raised_again_without_a_traceback() -> None:
    body = """
try:
    thing = Thing()
    reference = weakref.ref(thing, interrupt_me)
    del thing
    time.sleep(1000)
except KeyboardInterrupt:
    sys.exit(7)
"""
    assert ended(body) == (7, "")


def test_code_that_goes_on_is_ended() -> None:
    body = """
while True:
    try:
        interrupt_me()
    except KeyboardInterrupt:
        pass
"""
    assert ended(body) == (130, "")


def test_one_that_was_handled_ends_nothing() -> None:
    body = """
interrupt._GRACE_S = 0.01
try:
    interrupt_me()
except KeyboardInterrupt:
    interrupt.handled()
time.sleep(0.5)
sys.exit(7)
"""
    assert ended(body) == (7, "")


def test_what_runs_at_exit_is_not_waited_for() -> None:
    body = """
import concurrent.futures
pool = concurrent.futures.ThreadPoolExecutor()
pool.submit(time.sleep, 1000)
interrupt_me()
"""
    assert ended(body) == (130, "")


def test_other_errors_that_python_drops_are_shown_as_ever() -> None:
    code, err = ended("thing = Thing()\nreference = weakref.ref(thing, lambda ref: 1 / 0)\ndel thing\nsys.exit(7)")
    assert code == 7
    assert "ZeroDivisionError" in err


def test_a_handler_of_somebody_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.watched():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    seen = []

    def elsewhere() -> None:
        with interrupt.watched():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]
