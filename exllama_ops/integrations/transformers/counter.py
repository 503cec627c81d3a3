"""How far loading is."""

from __future__ import annotations

import threading
from typing import Any

from exllama_ops.progress import Notify


class Counter:
    """Counts, on a bar and for a `Notify`. Threads may count at once.

    Args:
        bar: of tqdm.
        notify: takes the step, what is done of it and the total.
        step: what is done.
        total: how much there is.
    """

    def __init__(self, bar: Any, notify: Notify, step: str, total: int) -> None:
        self._bar, self._notify, self._step, self._total = bar, notify, step, total
        self._done = 0
        self._lock = threading.Lock()
        notify(step, 0, total)

    def count(self) -> None:
        """One more is done."""
        with self._lock:
            self._done += 1
            self._bar.update()
            self._notify(self._step, self._done, self._total)
