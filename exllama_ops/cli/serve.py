"""`exllama-ops serve`: `transformers serve` with this library's layers registered first."""

from __future__ import annotations

import argparse
from typing import Any

from exllama_ops.cli.output import CliError, expected_errors
from exllama_ops.extras import require


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
        require("transformers")
        from transformers.utils.import_utils import is_serve_available

        if not is_serve_available():
            raise CliError("serve: needs fastapi, uvicorn and openai: pip install 'transformers[serving]'")
        import typer
        from transformers.cli.serve import Serve

        from exllama_ops.integrations.transformers import register

        app = typer.Typer(add_completion=False)
        app.command()(Serve)
        with register():
            try:
                app(args.arguments, prog_name="exllama-ops serve", standalone_mode=False)
            except Exception as error:
                # An argument that is wrong; the class of the error depends on the version.
                if not hasattr(error, "format_message"):
                    raise
                raise CliError(f"serve: {error.format_message()}") from error
