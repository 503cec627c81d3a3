"""The command `exllama-ops`. One file per subcommand, each with `add_parser(subparsers)` and `run(args)`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import exllama_ops
from exllama_ops.cli import build, chat, convert, info, inspect, interrupt, run, serve
from exllama_ops.cli.output import CliError, say, warnings_as_lines

_COMMANDS = (run, chat, serve, inspect, convert, info, build)

_NOBODY_READS = 141  # 128 + SIGPIPE


def entry() -> NoReturn:
    """The command as a process of its own."""
    code = main()
    if code == interrupt.EXIT_CODE:
        interrupt.end_process()
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0; 2 for an expected error, told in one line on stderr; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="exllama-ops", description="GPTQ models through PyTorch custom ops.")
    parser.add_argument("--version", action="version", version=f"exllama-ops {exllama_ops.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    with interrupt.watched(), warnings_as_lines():
        try:
            args.command(args)
        except KeyboardInterrupt:
            return interrupt.EXIT_CODE
        except BrokenPipeError:
            # What is still in the buffer would be an error at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _NOBODY_READS
        except CliError as error:
            if interrupt.came():
                return interrupt.EXIT_CODE
            say(f"exllama-ops: error: {error}")
            return 2
        except Exception:
            if interrupt.came():
                return interrupt.EXIT_CODE
            raise
    return 0
