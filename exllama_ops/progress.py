"""How long steps say where they are: library code takes a `Notify`, and whoever shows progress passes one."""

from __future__ import annotations

from typing import Protocol


class Notify(Protocol):
    """Takes the steps of something long, and counts within a step. It may be called from any thread."""

    def __call__(self, step: str, done: int | None = None, total: int | None = None) -> None:
        """Say what happens now.

        Args:
            step: one short line, "compiling graph 2 of 4: decoder layer, decode". Another text is another step, which
                ends the one before.
            done: how much of the step is done. Many calls with the same step are one step whose counter moves.
            total: how much there is to do; None if nobody knows.
        """


def ignore(step: str, done: int | None = None, total: int | None = None) -> None:
    """A `Notify` that shows nothing."""
