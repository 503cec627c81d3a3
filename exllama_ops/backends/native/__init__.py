"""What the native backends share: a library is found or built, loaded, and serves the ops of one dispatch key.

The library is looked for when the package is imported, in the installed package and in the cache. A variable may name
another folder, which then is the only one. Neither a compiler nor a build is needed for that. If it is there, its
kernels are the ops' kernels and no Python runs in a call.

If it is not, an op's one kernel is a Python function. The first op to be called on a tensor of the device builds the
library into the cache, with a message and progress on stderr. A kernel that torch has cannot be exchanged safely:
another thread may be inside it, or find none. So in this one process the Python functions stay and call the library's
kernels under a second namespace (`exllama_ops.ops._library.late_kernel`). It takes a few microseconds a call. Later
processes find the library at import. Where it cannot be built, or lacks an op, the functions run the next backend of
the order.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from exllama_ops.backends._types import NextBest
from exllama_ops.backends.native import cache
from exllama_ops.backends.native.compile import Recipe
from exllama_ops.backends.native.library import Library, LoadError
from exllama_ops.ops import _library
from exllama_ops.progress import Notify, Screen

__all__ = ["Library", "LoadError", "NativeBackend"]


L = TypeVar("L", bound=Library)


class NativeBackend(Generic[L]):
    """Serves the ops that its library has on the tensors of one device. The library is found or built.

    Args:
        recipe: how its library is made.
        load: loads the library of a file; raises LoadError.
    """

    def __init__(self, recipe: Recipe, load: Callable[[Path], L]) -> None:
        self.name = recipe.device
        self.recipe = recipe
        self._load_file = load
        self.library: L | None = None
        # Why there is no library and will be none in this process; empty while there may be one.
        self.failure: list[str] = []
        self._renew_lock()
        # Another thread may be building when the process forks; in the child there is nobody to release its lock.
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self._renew_lock)
        self._searched = False
        self._late: dict[str, Callable[..., Any]] = {}

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def reasons_against(self, op: str, dispatch_key: str) -> list[str]:
        self.find()
        if self.library is not None:
            return self.library.reasons_against(op)
        return self.failure  # what a library will have that is yet to be built, the first call finds out

    def is_settled(self) -> bool:
        return self.library is not None and self.serves_every_device()

    def detail(self, dispatch_key: str) -> str:
        """Where the library is and what it uses, or that it will be built."""
        if self.library is None:
            return "its library is built at the first call"
        path = self.library.path
        return f"{cache.origin(self.recipe, path)} library {path}{self.settings(self.library)}"

    def settings(self, library: L) -> str:
        """What `detail` adds of a library, after a comma."""
        return ""

    def reasons_against_device(self) -> list[str]:
        """Why the device cannot be here, found without touching it."""
        return []

    def codes(self) -> tuple[str, ...]:
        """The device code that a library must have for the GPUs that are here; none for a CPU."""
        return ()

    def reasons_against_library(self, library: L) -> list[str]:
        """Why a library that was loaded cannot serve here, found without touching a device."""
        return []

    def reasons_against_compiler(self) -> list[str]:
        """Why what the compiler makes could not serve here."""
        return []

    def serves_every_device(self) -> bool:
        """Whether its library is known to serve all the devices; if not, `for_devices` chooses at their first calls."""
        return True

    def for_devices(self, kernel: Callable[..., Any], next_best: NextBest) -> Callable[..., Any]:
        """The kernel of its library, or what runs it on the devices that it serves and the next best on others."""
        return kernel

    def say(self, reasons: Sequence[str]) -> None:
        """Tell the user why its library does not serve a device that is here; the reference tells it for a CPU."""

    def kernel(
        self, op: str, dispatch_key: str, passed_over: Mapping[str, Sequence[str]], next_best: NextBest
    ) -> _library.NativeKernel | Callable[..., Any]:
        if self.library is not None and self.serves_every_device():
            return _library.NativeKernel(self.library.register)
        return self._first_use(op, dispatch_key, next_best)

    def find(self) -> None:
        """Load the library if it is there already; if it can be built, the first call decides."""
        if self._searched:
            return
        self._searched = True
        if sys.platform != "linux":
            self.failure = [f"its library is for Linux; this is {sys.platform}"]
            return
        self.failure = self.reasons_against_device()
        if self.failure:
            return
        brought = cache.packaged(self.recipe)
        try:
            brought = cache.given(self.recipe) or brought
            path = brought or cache.find(self.recipe, self.codes())
            if path is not None:
                self._load(path)
        except OSError:
            pass  # an unreadable cache is as good as an empty one; building says what is wrong with it
        except cache.BuildError as error:
            self.failure = [str(error)]
        except LoadError as error:
            if brought is not None:
                self.failure = [f"its {cache.origin(self.recipe, brought)} library cannot be loaded: {error}"]
                self.say(self.failure)
        if self.library is None and not self.failure:
            self.failure = cache.reasons_against_building(self.recipe)

    def build(self, notify: Notify | None = None) -> None:
        """Have a library, or a `failure`; builds at most once, whichever thread comes first.

        Args:
            notify: takes the steps; None shows them on stderr.
        """
        with self._lock:
            if self.library is not None or self.failure:
                return
            self.failure = self.reasons_against_compiler()
            if self.failure:
                return
            try:
                self._load(_find_or_build(self.recipe, self.codes(), notify))
            except cache.BuildError as error:
                self.failure = [str(error)]
            except LoadError as error:
                self.failure = [f"the library that was built cannot be loaded: {error}"]

    def _load(self, path: Path) -> None:
        library = self._load_file(path)
        if reasons := self.reasons_against_library(library):
            raise LoadError("; ".join(reasons))
        self.prepare(library)
        self.library = library

    def prepare(self, library: L) -> None:
        """Give a library the settings of the process."""

    def _first_use(self, op: str, dispatch_key: str, next_best: NextBest) -> Callable[..., Any]:
        chosen: Callable[..., Any] | None = None

        def build_and_compute(*args: Any, **kwargs: Any) -> Any:
            nonlocal chosen
            if chosen is None:
                chosen = self._choose(op, dispatch_key, next_best)
            return chosen(*args, **kwargs)

        return build_and_compute

    def _choose(self, op: str, dispatch_key: str, next_best: NextBest) -> Callable[..., Any]:
        self.build()
        if self.library is None:
            self.say(self.failure)
            return next_best(self.failure)
        if reasons := self.library.reasons_against(op):
            return next_best(reasons)
        with self._lock:
            if op not in self._late:
                self._late[op] = _library.late_kernel(op, dispatch_key, _library.NativeKernel(self.library.register))
        return self.for_devices(self._late[op], next_best)


def _find_or_build(recipe: Recipe, codes: tuple[str, ...], notify: Notify | None) -> Path:
    if notify is not None:
        return cache.find_or_build(recipe, notify, codes).path
    screen = Screen(prefix="exllama_ops: ")  # and what others write to stderr in the meantime is theirs
    completed = False
    try:
        path = cache.find_or_build(recipe, screen, codes).path
        completed = True
    finally:
        screen.end(completed=completed)
    return path
