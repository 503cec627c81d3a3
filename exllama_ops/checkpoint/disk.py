"""What is read of a user's disk: regular files and directories; every failure is a `CheckpointError` with the path."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from exllama_ops.checkpoint.errors import CheckpointError

# What safetensors allows a header.
MAX_JSON_BYTES = 100_000_000
# Far below Python's limit of recursion, which whoever copies, compares or prints the value meets too.
MAX_JSON_DEPTH = 64

_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)

# How a file begins that stands for one which Git LFS keeps elsewhere.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def file_type(path: Path) -> int | None:
    """What a path leads to, as in `stat.S_IFMT`, links followed; None if it leads to nothing.

    Raises:
        CheckpointError: that cannot be known: a name too long, links in a circle, no permission, a null byte.
    """
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error


def list_directory(directory: Path) -> list[str]:
    """The names in a directory, sorted.

    Raises:
        CheckpointError: it cannot be listed.
    """
    try:
        return sorted(os.listdir(directory))
    except (OSError, ValueError) as error:
        raise _unusable(directory, error) from error


def check_regular(path: Path, kind: int | None) -> None:
    """Check that what a path leads to is a regular file.

    Args:
        path: what the error names.
        kind: as `file_type` returns it.

    Raises:
        CheckpointError: it is something else, or nothing.
    """
    if kind is None:
        raise CheckpointError(f"{path}: no such file")
    if kind != stat.S_IFREG:
        raise CheckpointError(f"{path}: must be a regular file; got {_KINDS.get(kind, 'something else')}")


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        CheckpointError: there is none, it is no regular file, it cannot be opened, or Git LFS left a pointer in its
            place.
    """
    # It is checked before it is opened, since opening waits for a FIFO's writer and starts some devices. What was
    # opened is checked once more, since the name may lead to something else by then.
    check_regular(path, file_type(path))
    try:
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error
    try:
        check_regular(path, stat.S_IFMT(os.fstat(descriptor).st_mode))
    except CheckpointError:
        os.close(descriptor)
        raise
    file = os.fdopen(descriptor, "rb")
    try:
        start = file.read(len(_LFS_POINTER))
        file.seek(0)
    except OSError as error:
        file.close()
        raise _unusable(path, error) from error
    if start == _LFS_POINTER:
        file.close()
        raise CheckpointError(
            f"{path}: must be the file itself; got a pointer of Git LFS: run `git lfs pull` in its folder, or download "
            "it anew with `hf download`"
        )
    return file


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object in UTF-8, with or without a byte order mark.

    Where a key stands twice, its last value counts, as in every tool that reads these files with Python.

    Raises:
        CheckpointError: the file cannot be read, is larger than 100 MB, is no JSON, nested deeper than 64 levels, or
            holds another type.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: must be JSON of at most {MAX_JSON_BYTES} bytes; got {size}")
        try:
            value = json.loads(file.read(size).decode("utf-8-sig"))
        except OSError as error:
            raise _unusable(path, error) from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: must be JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object; got {type(value).__name__}")
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise CheckpointError(f"{path}: must be JSON in at most {MAX_JSON_DEPTH} levels; got more")
    return value


def _is_deeper(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        containers = [node for node in level if isinstance(node, (dict, list))]
        if not containers:
            return False
        level = [child for node in containers for child in (node.values() if isinstance(node, dict) else node)]
    return True


def _unusable(path: Path, error: OSError | ValueError) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return CheckpointError(f"{path}: cannot be read: {reason}")
