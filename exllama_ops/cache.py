"""Where the package keeps files between processes; each user of it has a folder of its own there."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The variable EXLLAMA_OPS_CACHE, by default ~/.cache/exllama_ops."""
    return Path(os.environ.get("EXLLAMA_OPS_CACHE") or Path.home() / ".cache" / "exllama_ops")
