"""Where the package keeps files between processes; each user of it has a folder of its own there."""

from __future__ import annotations

import os
from pathlib import Path

# For those who cannot write there.
WHAT_TO_DO = "set EXLLAMA_OPS_CACHE to a folder that can be written"


def cache_folder() -> Path:
    """The variable EXLLAMA_OPS_CACHE, by default ~/.cache/exllama_ops.

    Raises:
        FileNotFoundError: the variable is not set, and the user has no home.
    """
    chosen = os.environ.get("EXLLAMA_OPS_CACHE")
    if chosen:
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "exllama_ops"
    except RuntimeError as error:
        raise FileNotFoundError("there is no home directory to keep files in") from error
