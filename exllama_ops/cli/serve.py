"""`exllama-ops serve`: `transformers serve` with this library's layers registered first."""

from __future__ import annotations

import argparse
from typing import Any

from exllama_ops.cli.output import expected_errors


def add_parser(subparsers: Any) -> None:
    """Register the subcommand. Its arguments are those of transformers, so that no character begins an option here."""
    parser = subparsers.add_parser(
        "serve", help="serve GPTQ models by `transformers serve`, whose arguments it takes", prefix_chars="\0"
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(command=serve)


def serve(args: argparse.Namespace) -> None:
    """Run the subcommand, until Ctrl-C.

    Raises:
        CliError: whatever a user can cause.
    """
    with expected_errors():
        from exllama_ops.integrations.transformers.server import serve as serve_models

        serve_models(args.arguments)
