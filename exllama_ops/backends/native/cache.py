"""Where a native library lies: in a given folder, in the installed package, or in a cache that is built into.

The cache has a folder for every key of sources, flags, machine, compiler and GPUs, so that nothing in it goes stale.
A folder appears by one rename, complete. Builds of one key wait for each other at a lock that the system releases
when its process dies. What a build that was killed has left is removed by the next one, of whatever key.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import torch

from exllama_ops.backends.native import compile as compiling
from exllama_ops.backends.native.compile import CompileError, Compiler, Recipe
from exllama_ops.cache import WHAT_TO_DO, cache_folder, publishing_folder
from exllama_ops.progress import Notify

_PACKAGE = Path(__file__).parents[2]


class BuildError(RuntimeError):
    """The library cannot be built; the text says why, with the compiler's words if it was the compiler."""


class Built(NamedTuple):
    """A library, and how it was built."""

    path: Path
    compiler: str
    flags: list[str]
    seconds: float
    fresh: bool  # built just now, not found


def packaged(recipe: Recipe) -> Path | None:
    """The library that a wheel brought, or None."""
    path = _PACKAGE / "_native" / recipe.device / recipe.library
    return path if os.path.isfile(path) else None


def given(recipe: Recipe) -> Path | None:
    """The library in the folder that the recipe's variable names, or None if it names none.

    Raises:
        BuildError: it is not whole, or other sources made it.
    """
    name = os.environ.get(recipe.given)
    if not name:
        return None
    built, sources = read(recipe, Path(name)), csrc()
    if built is None:
        whole = f"a whole {recipe.library} and its record"
        raise BuildError(f"{recipe.given} must name a folder with {whole}; got {name!r}")
    made_of = json.loads((Path(name) / compiling.RECORD).read_text()).get("sources")
    if sources is not None and made_of != compiling.source_key(recipe, sources):
        raise BuildError(f"{recipe.given}={name!r} has a library that was built from other sources; build it anew")
    return built.path


def origin(recipe: Recipe, path: Path) -> str:
    """Where a library came from, in a word: "given", "packaged" or "cached"."""
    name = os.environ.get(recipe.given)
    if name and path.parent == Path(name):
        return "given"
    return "packaged" if path == packaged(recipe) else "cached"


def csrc() -> Path | None:
    """The C++ sources: inside an installed package, beside it in a checkout."""
    for folder in (_PACKAGE / "_csrc", _PACKAGE.parent / "csrc"):
        if os.path.isfile(folder / "bindings" / "checks.cpp"):
            return folder
    return None


def root() -> Path:
    """Where libraries are built and found."""
    return cache_folder() / "native"


def find(recipe: Recipe, codes: tuple[str, ...] = ()) -> Path | None:
    """A whole library of the cache for the present sources and compiler, or None. Builds nothing.

    Without a compiler, any compiler's library serves. One with more device code than ``codes`` serves too.
    """
    folder = csrc()
    if folder is None or not os.path.isdir(root()):
        return None
    key = compiling.source_key(recipe, folder)
    compiler = compiling.find_compiler(recipe)
    pattern = f"{key}-{compiling.compiler_key(compiler)}" if compiler else f"{key}-????????"
    paths = [path for path in sorted(root().glob(f"{pattern}*")) if _has_codes(path, codes)]
    found = (built for path in paths if (built := read(recipe, path)))
    return next((built.path for built in found), None)


def _name(key: str, codes: tuple[str, ...]) -> str:
    return f"{key}-{'+'.join(codes)}" if codes else key


_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}(?:-([a-z0-9_+]+))?")


def _has_codes(path: Path, codes: tuple[str, ...]) -> bool:
    """Whether the name of a library's folder says that it has the device code."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return False
    has = tuple(match[1].split("+")) if match[1] else ()
    return has == compiling.ALL or set(codes) <= set(has)


def reasons_against_building(recipe: Recipe) -> list[str]:
    """Why no library can be built here, as far as can be told without trying."""
    if csrc() is None:
        return ["the package has neither its native library nor the sources for it"]
    if compiling.find_compiler(recipe) is None:
        return [compiling.no_compiler(recipe)]
    if not compiling.has_stable_headers(_torch_directory()):
        return [f"torch has no C++ headers in {_torch_directory() / 'include'}, which its kernels are compiled with"]
    return []


def find_or_build(recipe: Recipe, notify: Notify, codes: tuple[str, ...] = (), *, force: bool = False) -> Built:
    """The library of the cache for the present sources and compiler, built if it is not there.

    Args:
        recipe: of the device.
        notify: takes the steps.
        codes: the device code that it has, none for a CPU.
        force: build it even if it is there.

    Raises:
        BuildError: it cannot be built.
    """
    reasons = reasons_against_building(recipe)
    folder, compiler = csrc(), compiling.find_compiler(recipe)
    if reasons or folder is None or compiler is None:
        raise BuildError("; ".join(reasons))
    try:
        key = _name(f"{compiling.source_key(recipe, folder)}-{compiling.compiler_key(compiler)}", codes)
    except OSError as error:
        raise BuildError(f"its sources cannot be read: {error}") from error
    try:
        target = root() / key
        found = None if force else read(recipe, target)  # before the lock, for which a folder must be writable
        if found:
            return found
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(_lock_of(target), notify):
            found = None if force else read(recipe, target)
            return found or _build(recipe, folder, compiler, target, notify, codes)
    except OSError as error:
        raise BuildError(f"its library cannot be kept: {error}; {WHAT_TO_DO}") from error
    except CompileError as error:
        chosen = compiling.chosen_compiler(recipe)
        raise BuildError(f"the compiler{f', by {chosen},' if chosen else ''} failed:\n{error}") from error


def _build(
    recipe: Recipe, folder: Path, compiler: Compiler, target: Path, notify: Notify, codes: tuple[str, ...]
) -> Built:
    _sweep(target)
    what = f" for {', '.join(codes)}" if codes not in ((), compiling.ALL) else ""
    step = f"building the {recipe.device.upper()} kernels{what} (once, for some minutes) with {compiler} into {target}"
    tell = functools.partial(notify, step)
    prefix = f"{target.name}."  # by which `_sweep` knows what a killed build has left
    with publishing_folder(target, prefix=prefix) as scratch:
        compiling.compile_library(recipe, folder, _torch_directory(), compiler, scratch, tell, codes)
        if target.exists():
            # A library may be in use: it is moved away whole, and a process that has loaded it keeps it.
            old = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            target.rename(old / "old")
            shutil.rmtree(old, ignore_errors=True)
    built = read(recipe, target)
    if built is None:
        raise BuildError(f"{target} changed while it was built")
    return built._replace(fresh=True)


def read(recipe: Recipe, folder: Path) -> Built | None:
    """The library of a folder, if it is whole: a truncated one would kill the process that loads it."""
    library = folder / recipe.library
    try:
        record = json.loads((folder / compiling.RECORD).read_text())
        if compiling.digest(library) != record["sha256"]:
            return None
        return Built(library, record["compiler"], record["flags"], record["seconds"], fresh=False)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def codes_of(path: Path) -> frozenset[str]:
    """The device code that a library has, by its record; none if there is no record."""
    try:
        flags = json.loads(path.with_name(compiling.RECORD).read_text())["flags"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return frozenset()
    return frozenset(re.findall(r"\b(?:sm|compute)_\d+", " ".join(re.findall(r"code=\[(.*?)\]", " ".join(flags)))))


def _torch_directory() -> Path:
    return Path(torch.__file__).parent


# The names of scratch folders; the key comes first.
_SCRATCH = re.compile(rf"({_NAME.pattern})\..{{8}}")


def _sweep(target: Path) -> None:
    """Remove scratch folders whose builders are no more: those of a key that nobody else has locked."""
    for folder in target.parent.iterdir():
        if match := _SCRATCH.fullmatch(folder.name):
            with suppress(OSError), ExitStack() as stack:
                if match[1] != target.name:  # which is locked by the caller
                    stack.enter_context(_held(_lock_of(folder.with_name(match[1]))))
                shutil.rmtree(folder)


def _lock_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.lock")


@contextmanager
def _locked(path: Path, notify: Notify) -> Iterator[None]:
    """Hold a lock, after its holder if there is one."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(_held(path))
                break
            except BlockingIOError:
                notify(f"waiting for another process that builds the kernels ({path})")
            compiling.check_interrupt()
            time.sleep(compiling.INTERVAL_S)
        yield


# A forked child has the locks that its parent held, and would keep them when the parent is no more.
_open_locks: set[IO[str]] = set()


def _close_locks() -> None:
    for lock in _open_locks:
        lock.close()
    _open_locks.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_locks)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock.

    Raises:
        BlockingIOError: somebody else holds it.
    """
    if sys.platform == "win32":
        raise BuildError("its library is for Linux")
    import fcntl

    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _open_locks.add(lock)
        try:
            yield
        finally:
            _open_locks.discard(lock)
