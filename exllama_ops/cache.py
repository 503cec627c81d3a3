"""Where the package keeps files between processes; each user of it has a folder of its own there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def publishing_folder(target: Path, *, prefix: str) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` when the block ends. It vanishes if the block raises.

    Nobody sees a half of it. A process that is killed leaves it behind, under a name that begins with ``prefix``.

    Args:
        target: a folder that is not there when the block ends; the one above it is.
        prefix: of the name beside ``target`` until then.
    """
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp keeps others out
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def publishing_file(target: Path, *, prefix: str) -> Iterator[Path]:
    """A path to write to, whose file takes the place of ``target`` when the block ends.

    Nobody sees a half of it, and on an error ``target`` stays as it was.

    Args:
        target: a file, which may be there; the folder above it is.
        prefix: of the folder beside ``target`` that holds the file until then.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as scratch:
        whole = Path(scratch) / target.name
        yield whole
        whole.replace(target)
