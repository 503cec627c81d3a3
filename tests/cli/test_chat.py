"""`exllama-ops chat`: a conversation on a terminal and as a filter, and what happens when it grows too long."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exllama_ops.cli import main

pytest.importorskip("transformers", reason='needs the extra "hf"')


class Typist(io.StringIO):
    """A terminal as stdin, at which these lines are typed."""

    def isatty(self) -> bool:
        return True


def chat(*arguments: str | Path) -> int:
    return main(["chat", "--max-new-tokens", "20", *map(str, arguments)])


def test_a_line_is_a_message_and_answers_go_to_stdout(
    chat_checkpoint: Path,
    answering: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n  two \nthree\n/exit\nfour\n"))
    generator = answering("1", "2", "3")
    assert chat(chat_checkpoint, "--system", "be short") == 0
    captured = capsys.readouterr()
    assert captured.out == "1\n2\n3\n"
    assert generator.prompts == [
        "s[be short]u[one]",
        "s[be short]u[one]a[1]u[two]",
        "s[be short]u[one]a[1]u[two]a[2]u[three]",
    ]
    assert "\r" not in captured.err
    assert "> " not in captured.err
    assert "first token:" in captured.err


def test_a_model_without_a_chat_template_is_refused_before_it_is_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("exllama_ops.integrations.transformers.load_model", None)
    assert chat(checkpoint) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("exllama-ops: error: ")
    assert "no chat template" in last
    assert "`exllama-ops run` takes plain prompts" in last


def test_a_template_that_refuses_the_system_message_is_a_clear_error(
    chat_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (chat_checkpoint / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}")
    assert chat(chat_checkpoint, "--system", "be short") == 2
    error = "exllama-ops: error: the chat template refuses messages of system, user: no system here"
    assert capsys.readouterr().err.splitlines()[-1] == error


def test_oldest_turns_are_dropped_aloud_and_the_system_message_stays(
    chat_checkpoint: Path,
    answering: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a" * 40 + "\n" + "b" * 40 + "\n" + "c" * 10 + "\n"))
    generator = answering("1", "2", "3")
    assert chat(chat_checkpoint, "--system", "x") == 0
    assert generator.prompts == [
        f"s[x]u[{'a' * 40}]",
        f"s[x]u[{'a' * 40}]a[1]u[{'b' * 40}]",
        f"s[x]u[{'b' * 40}]a[2]u[{'c' * 10}]",
    ]
    err = capsys.readouterr().err
    assert "[the conversation is longer than the model's 128 positions: its oldest 2 messages are dropped]" in err


def test_a_message_that_is_too_long_ends_a_filter_and_not_a_conversation(
    chat_checkpoint: Path,
    answering: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = "a" * 120 + "\nshort\n"
    reason = "prompt and --max-new-tokens must fit the model's 128 positions; got 123 tokens and 20"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert answering("1").prompts == []
    assert chat(chat_checkpoint) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"exllama-ops: error: {reason}"
    monkeypatch.setattr(sys, "stdin", Typist(lines))
    generator = answering("1")
    assert chat(chat_checkpoint) == 0
    assert f"{reason}; the message is forgotten" in capsys.readouterr().err
    assert generator.prompts == ["u[short]"]


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(
    chat_checkpoint: Path,
    answering: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", Typist("one\ntwo\nthree\n"))
    generator = answering(("beg", KeyboardInterrupt()), ("", KeyboardInterrupt()), "3")
    assert chat(chat_checkpoint) == 0
    captured = capsys.readouterr()
    assert captured.out == "beg\n3\n"
    assert generator.prompts == ["u[one]", "u[one]a[beg]u[two]", "u[one]a[beg]u[three]"]
    assert captured.err.count("the message is forgotten") == 1
    assert captured.err.count("> ") == 4


@pytest.mark.parametrize("begun", ["beg", ""])
def test_ctrl_c_ends_a_filter(
    begun: str,
    chat_checkpoint: Path,
    answering: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    answering((begun, KeyboardInterrupt()), "never asked for")
    assert chat(chat_checkpoint) == 130
    assert capsys.readouterr().out == (f"{begun}\n" if begun else "")


def test_an_answer_that_is_cut_short_is_said_to_be(
    chat_checkpoint: Path,
    answering: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    answering("123456")
    assert chat(chat_checkpoint, "--max-new-tokens", "4") == 0
    captured = capsys.readouterr()
    assert captured.out == "1234\n"
    assert "[stopped after --max-new-tokens 4]" in captured.err


def test_a_terminal_has_a_live_line_and_a_prompt_and_survives_ctrl_c(chat_checkpoint: Path) -> None:
    """The real command on a pseudo-terminal: stdin, stdout and stderr are all it."""
    child, terminal = pty.fork()
    if child == 0:
        command = [sys.executable, "-m", "exllama_ops", "chat", str(chat_checkpoint)]
        options = ["--no-compile", "--max-new-tokens", "5"]
        os.execve(sys.executable, [*command, *options], {**os.environ, "TERM": "xterm"})
    written = ""

    def wait_for(pattern: str, again: bytes = b"") -> None:
        nonlocal written
        for _ in range(60):
            while not (match := re.search(pattern, written, re.DOTALL)) and select.select([terminal], [], [], 1)[0]:
                written += os.read(terminal, 65536).decode(errors="replace")
            if match:
                break
            os.write(terminal, again)
        assert match, f"no {pattern!r} in {written!r}"
        written = written[match.end() :]

    try:
        wait_for(r"\rloading \S+ \d+\.\d s\r.*loading \S+ \(\d+ of \d+\): \d+\.\d s\r\n")
        wait_for("Ctrl-C stops an answer\r\n.*> ")
        os.write(terminal, b"hello\n")
        wait_for(r"hello\r\n.*prefill of 8 tokens: \d+\.\d s\r\n.*> ")
        os.write(terminal, b"\x03")
        # Readline does not see a signal that comes just before it waits for a key.
        wait_for(r"/exit or Ctrl-D ends\r\n.*> ", again=b"\x03")
        os.write(terminal, b"\x04")
        wait_for("first token:.*peak memory: [^\n]*\n")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(terminal)
