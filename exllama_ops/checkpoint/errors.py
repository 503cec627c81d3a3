"""The one error of this package, and how its texts show what a file says."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

_NAMES_SHOWN = 8

_REPR = reprlib.Repr()
_REPR.maxstring = 200


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as it is; the text names the file and the tensor or field.

    Attributes:
        reasons: all that speaks against it, as far as it was looked at. The text is the first, and counts the others.
    """

    def __init__(self, text: str, reasons: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.reasons = tuple(reasons) or (text,)


class Reasons:
    """What several checks refuse, for one error: each check runs in a ``with`` block of this object."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, CheckpointError):
            return False
        self._texts += error.reasons
        return True

    def raise_all(self) -> None:
        """Raise the error, if anything was refused. Its text is the first reason, and counts the others."""
        if self._texts:
            others = len(self._texts) - 1
            more = f" (and {others} more, which `exllama-ops inspect` lists)" if others else ""
            raise CheckpointError(f"{self._texts[0]}{more}", self._texts)


def shown(value: object) -> str:
    """The repr of a value out of a file, cut short where it is long or deep."""
    return _REPR.repr(value)


def listed(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
