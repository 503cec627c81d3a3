"""A native library by the C functions that every device's has."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exllama_ops.ops import _library


class LoadError(RuntimeError):
    """The library cannot be loaded."""


class Library:
    """A loaded library. Loading has no effect on torch or a device; `register` has, on torch.

    Args:
        path: its file.
        prefix: what the names of its functions begin with, "exllama_cpu".
        also: the names, without the prefix, of functions beside those that every library has.

    Raises:
        LoadError: the system cannot load it, or it lacks a function.
    """

    def __init__(self, path: Path, prefix: str, also: tuple[str, ...] = ()) -> None:
        self.path = path
        try:
            library = ctypes.CDLL(str(path))
            self._functions: dict[str, Any] = {
                name: getattr(library, f"{prefix}_{name}") for name in ("register", "op_name", *also)
            }
        except OSError as error:
            raise LoadError(f"{path}: {error}") from error
        except AttributeError as error:
            raise LoadError(f"{path}: it is of another version of exllama_ops: {error}") from error
        self._register = self._declare("register", [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_char_p)
        op_name = self._declare("op_name", [ctypes.c_int32], ctypes.c_char_p)
        self.ops: frozenset[str] = frozenset(names_of(op_name))
        """The ops, and overloads of ops, that it has kernels for."""

    def _declare(self, name: str, arguments: list[Any], result: Any) -> Any:
        function = self._functions[name]
        function.argtypes, function.restype = arguments, result
        return function

    def reasons_against(self, op: str) -> list[str]:
        """Why the library cannot serve an op: it lacks the op, or one of its overloads."""
        lacks = [name for name in _library.schemas() if _library.op_of(name) == op and name not in self.ops]
        return [f"its library has no {', '.join(lacks)}"] if lacks else []

    def register(self, namespace: str, op: str) -> None:
        """Give ``namespace::op`` its kernel.

        Raises:
            RuntimeError: the library has no such kernel, or torch refuses it.
        """
        error: bytes | None = self._register(namespace.encode(), op.encode())
        if error is not None:
            raise RuntimeError(f"{self.path}: {namespace}::{op}: {error.decode()}")


def names_of(name_at: Callable[[int], bytes | None]) -> list[str]:
    """What a function of a library gives by index, up to the first null."""
    names: list[str] = []
    while name := name_at(len(names)):
        names.append(name.decode())
    return names
