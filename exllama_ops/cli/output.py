"""What the command line writes: results to stdout, everything else to stderr."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class CliError(Exception):
    """An expected error: one line for the user, no traceback."""


@contextmanager
def expected_errors() -> Iterator[None]:
    """Errors that the library documents become one line; the rest keep their tracebacks."""
    try:
        yield
    except (CliError, ModuleNotFoundError):
        # A missing extra arrives as a plain ImportError whose text says what to install.
        raise
    except (ImportError, ValueError) as error:
        raise CliError(one_line(error)) from error
    except RuntimeError as error:
        if type(error).__module__.partition(".")[0] != __name__.partition(".")[0]:
            raise
        raise CliError(one_line(error)) from error


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Each warning becomes one line on stderr, and comes once."""
    told = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        text = f"exllama-ops: warning: {' '.join(str(message).split())}"
        if text not in told:
            told.add(text)
            say(text)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def one_line(error: Exception) -> str:
    """The text of an error, in one line."""
    return " ".join(str(error).split())


def emit(text: str) -> None:
    """Write a piece of the result, at once: it is read while it grows."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(line: str) -> None:
    """Write a line of progress, report or error."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
