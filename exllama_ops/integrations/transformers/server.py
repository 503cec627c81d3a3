"""`transformers serve`, with this library's layers registered first."""

from __future__ import annotations

from collections.abc import Sequence

from exllama_ops.extras import require
from exllama_ops.integrations.transformers import register


def serve(arguments: Sequence[str]) -> None:
    """Run transformers' server until it ends.

    Args:
        arguments: of its command line.

    Raises:
        ImportError: what the server needs is not installed; the text says what to install.
        ValueError: an argument is wrong.
    """
    require("transformers")
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("serve: needs fastapi, uvicorn and openai: pip install 'transformers[serving]'")
    from transformers.cli.serve import Serve

    app = require("typer").Typer(add_completion=False)
    app.command()(Serve)
    with register():
        try:
            app(list(arguments), prog_name="exllama-ops serve", standalone_mode=False)
        except Exception as error:
            # An argument that is wrong; the class of the error depends on typer's version.
            if not hasattr(error, "format_message"):
                raise
            raise ValueError(f"serve: {error.format_message()}") from error
