"""What the command line writes: results to stdout, everything else to stderr."""

from __future__ import annotations

import sys


class CliError(Exception):
    """An expected error: one line for the user, no traceback."""


def emit(text: str) -> None:
    """Write a piece of the result, at once: it is read while it grows."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(line: str) -> None:
    """Write a line of progress, report or error."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
