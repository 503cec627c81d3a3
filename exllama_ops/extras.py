"""Imports of the packages that the extras bring, with the one error that says how to get them."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's garbage collector off where large packages are imported.

    Importing transformers makes hundreds of thousands of objects, which all stay. A full collection looks at each of
    them, and their growth starts one after the other: they take a third of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
