"""The command `exllama-ops`. One file per subcommand, each with `add_parser(subparsers)` and `run(args)`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import exllama_ops
from exllama_ops.cli import build, run
from exllama_ops.cli.output import CliError, say

_COMMANDS = (run, build)

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0, or 2 for an expected error, told in one line on stderr.
    """
    parser = argparse.ArgumentParser(prog="exllama-ops", description="GPTQ models through PyTorch custom ops.")
    parser.add_argument("--version", action="version", version=f"exllama-ops {exllama_ops.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        args.command(args)
    except CliError as error:
        say(f"exllama-ops: error: {error}")
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0
