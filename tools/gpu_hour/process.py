"""A process with a time limit, whose children end with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def run(command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str], folder: Path) -> int | None:
    """Run a command, and write what it prints to a file.

    Args:
        command: the program and its arguments.
        log: the file.
        seconds: after which the process and all that it has started are killed.
        environment: all of its variables.
        folder: in which it runs.

    Returns:
        The exit status, negative for a signal; None if it was killed because of its time.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,  # with a process group of its own
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def find(program: str) -> str | None:
    """The file of a program, in PATH or where CUDA's toolkit has it."""
    return shutil.which(program) or shutil.which(f"/usr/local/cuda/bin/{program}")


def last_lines(log: Path, count: int = 3) -> list[str]:
    """The last lines of a log that say something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return [line[:300] for line in lines if line][-count:]
