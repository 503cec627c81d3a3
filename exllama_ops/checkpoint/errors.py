"""The one error of this package, and the one for a missing optional dependency."""

from __future__ import annotations

import importlib
from types import ModuleType


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as it is; the text names the file and the tensor or field."""


def optional_module(name: str) -> ModuleType:
    """Import a module of the extra ``hf``, which the core of the package does without.

    Raises:
        ImportError: the module is not installed; the text says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'exllama_ops.checkpoint needs {name.partition(".")[0]}: pip install "exllama-ops[hf]"'
        ) from error
