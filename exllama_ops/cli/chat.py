"""`exllama-ops chat`: a conversation with a GPTQ model, on a terminal or as a filter."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from exllama_ops.cli import interrupt
from exllama_ops.cli.output import CliError, emit, expected_errors, say
from exllama_ops.cli.session import Answer, Session, add_arguments, report_session
from exllama_ops.cli.text import conversation_tokens
from exllama_ops.progress import Screen

_EXIT = "/exit"
_ASK = "> "


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with a GPTQ model",
        description="Load a GPTQ checkpoint, compile the model and talk with it: a line of stdin is a message. "
        f"{_EXIT} or the end of stdin ends the conversation, and Ctrl-C the present answer.",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message, before the first one of yours")
    add_arguments(parser, max_new_tokens=256)
    parser.set_defaults(command=chat)


def chat(args: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
        CliError: whatever a user can cause.
        KeyboardInterrupt: Ctrl-C came, and not in an answer on a terminal.
    """
    with expected_errors(), Screen() as screen:
        session = Session(args, screen)
        if not session.tokenizer.chat_template:
            raise CliError(
                f"{session.path}: its tokenizer has no chat template, which a conversation needs; "
                "`exllama-ops run` takes plain prompts"
            )
        conversation = _Conversation(session, args.system)
        session.load()
        session.compile()
        on_terminal = sys.stdin.isatty()
        if on_terminal:
            say(f"a line is a message; {_EXIT} or Ctrl-D ends, Ctrl-C stops an answer")
        for message in _messages_on_terminal() if on_terminal else _messages_of_filter():
            answer = conversation.answer(message, on_terminal)
            if answer is not None and answer.interrupted and not on_terminal:
                raise KeyboardInterrupt
        if conversation.answers:
            report_session(session)


class _Conversation:
    """What was said, and the answers to come.

    Raises:
        CliError: the chat template has no system message, and there is one.
    """

    def __init__(self, session: Session, system: str | None) -> None:
        self.answers = 0
        self._session = session
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []  # user, assistant, user, assistant ...
        self._tokens([*self._system, {"role": "user", "content": "."}])

    def answer(self, message: str, on_terminal: bool) -> Answer | None:
        """Answer a message; None if there is no answer, and then the message is forgotten.

        Raises:
            CliError: the message is too long, and there is no terminal where another one could be tried.
            KeyboardInterrupt: Ctrl-C came, there is no token yet and no terminal.
        """
        self._turns.append({"role": "user", "content": message})
        try:
            answer = self._session.answer(self._fitting(), emit)
        except CliError as error:
            self._turns.pop()
            if not on_terminal:
                raise
            say(f"{error}; the message is forgotten")
            return None
        except KeyboardInterrupt:
            self._turns.pop()
            if not on_terminal:
                raise
            interrupt.handled()
            say("\nthe message is forgotten")
            return None
        emit("\n")
        if len(answer.tokens) == self._session.args.max_new_tokens:
            say(f"[stopped after --max-new-tokens {len(answer.tokens)}]")
        self._turns.append({"role": "assistant", "content": answer.text})
        self.answers += 1
        return answer

    def _fitting(self) -> list[int]:
        """The tokens of the conversation, without the oldest turns if the model has too few positions for all."""
        dropped = 0
        while True:
            prompt = self._tokens([*self._system, *self._turns[dropped:]])
            reason = self._session.reasons_against(prompt)
            if not reason:
                break
            if dropped == len(self._turns) - 1:
                raise CliError(reason)
            dropped += 2
        if dropped:
            del self._turns[:dropped]
            say(
                f"[the conversation is longer than the model's {self._session.generator.max_length} positions: its "
                f"oldest {dropped} messages are dropped]"
            )
        return prompt

    def _tokens(self, messages: list[dict[str, str]]) -> list[int]:
        return conversation_tokens(self._session.tokenizer, messages)


def _messages_of_filter() -> Iterator[str]:
    """The lines of stdin, as they come."""
    for line in iter(sys.stdin.readline, ""):
        message = line.strip()
        if message == _EXIT:
            return
        if message:
            yield message


def _messages_on_terminal() -> Iterator[str]:
    """What is typed, with a history if Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401 (input() uses it)
    while True:
        try:
            message = _ask().strip()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            interrupt.handled()
            say(f"\n{_EXIT} or Ctrl-D ends")
            continue
        if message == _EXIT:
            return
        if message:
            yield message


def _ask() -> str:
    """A line of the terminal. The prompt is no result: stdout has it only where that is the terminal too.

    Raises:
        EOFError: there are no more.
    """
    if sys.stdout.isatty():
        return input(_ASK)
    sys.stderr.write(_ASK)
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
