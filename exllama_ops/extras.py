"""Imports of the packages that the extras bring, with the one error that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any


def require(name: str, extra: str = "hf") -> Any:
    """Import a module of an extra.

    Raises:
        ImportError: it is not installed; the text says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # An installed package that fails on an import of its own is another fault, with its own text.
        if error.name != name.partition(".")[0]:
            raise
        raise ImportError(
            f'{error.name} is needed here and not installed: pip install "exllama-ops[{extra}]"'
        ) from error
