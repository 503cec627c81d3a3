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

    @classmethod
    def of_all(cls, reasons: Sequence[str]) -> CheckpointError:
        """The error of several reasons."""
        others = f" ({len(reasons) - 1} more reasons: `exllama-ops inspect` has them)" if len(reasons) > 1 else ""
        return cls(f"{reasons[0]}{others}", reasons)


def shown(value: object) -> str:
    """The repr of a value out of a file, cut short where it is long or deep."""
    return _REPR.repr(value)


def listed(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
