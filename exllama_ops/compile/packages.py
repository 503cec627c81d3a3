"""Graphs that AOTInductor compiles once: its packages lie in the cache folder, and later processes load them.

A package is machine code of one graph. A process that loads it neither traces nor compiles, and checks no guards. The
packages of one model are one entry: a folder ``packages/MODEL/VERSION`` of the cache, which appears complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.export import ExportedProgram

from exllama_ops.backends.native.compile import CompileError, digest, processes_at_once, run_commands
from exllama_ops.cache import WHAT_TO_DO, cache_folder, publishing_folder
from exllama_ops.progress import Notify

Run = Callable[[list[Tensor]], list[Tensor]]

_RECORD = "record.json"
_PACKAGE = Path(__file__).parents[1]
# Entries of one model that are kept, the newest ones: those of other versions of torch or of other machines.
_KEPT_ENTRIES = 4
# What Inductor reads of the environment, but for the folder of its own cache.
_SETTINGS = ("TORCHINDUCTOR_", "AOT_INDUCTOR_", "ATEN_CPU_CAPABILITY")
# The collector would look through all that is imported, again and again: a fifth of the time. Python puts the present
# folder first, where a file may have the name of a module.
_WORKER = (
    "import gc, sys; gc.disable(); sys.path.remove(''); "
    f"from {__package__}.package_worker import main; sys.exit(main(*sys.argv[1:]))"
)
# Whether torch may believe that instruction sets work.
_PROBES = "TORCHINDUCTOR_VEC_ISA_OK"
_CPU_LINES = ("flags", "Features", "model name")
_NO_SETTINGS = ("TORCHINDUCTOR_CACHE_DIR",)


class PackageError(RuntimeError):
    """A graph does not compile; the text holds what the compiler said."""


class Graph(NamedTuple):
    """A graph to compile.

    Args:
        program: takes and gives tensors alone, and holds none.
        options: of ``torch._inductor.config``, by name.
        fuse: whether `FuseSharedInput` passes over it first.
        title: what people read while it is compiled.
    """

    program: ExportedProgram
    options: Mapping[str, Any]
    fuse: bool
    title: str


class Entry(NamedTuple):
    """Packages that are loaded, and what was noted when they were made.

    Args:
        runs: by the name of the graph; each takes a flat list of tensors, which it empties, and gives one.
        notes: a JSON value.
    """

    runs: Mapping[str, Run]
    notes: Any


def versions() -> dict[str, str]:
    """What machine code depends on beside the model: the sources that trace and compile, and the machine."""
    return {
        # Its Python traces: a graph that other sources made may be another one.
        "exllama_ops": files_digest(_PACKAGE.rglob("*.py")),
        "torch": f"{torch.__version__} {torch.version.git_version or ''}".strip(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_cpu_digest()}",
        "settings": " ".join(
            f"{name}={value}"
            for name, value in sorted(os.environ.items())
            if name.startswith(_SETTINGS) and name not in _NO_SETTINGS
        ),
    }


def find(model: str, needed: Mapping[str, str], notify: Notify) -> Entry | None:
    """The packages of a model, if the cache has them whole and for these versions. A line says why it has not.

    Args:
        model: describes the graphs; the same text means the same graphs.
        needed: the versions.
        notify: takes the steps.
    """
    folder = _folder(model, needed)
    if not os.path.isdir(folder):
        if others := _others(folder, needed):
            notify(f"the compiled graphs in {folder.parent} are of another version: {others}; they are compiled again")
        return None
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if record != _signed(record):
            raise ValueError(f"{_RECORD} is damaged")
        if record["model"] != model or record["versions"] != dict(needed):
            raise ValueError("its record describes other graphs")
        for name, expected in record["files"].items():
            if digest(folder / name) != expected:
                raise ValueError(f"{name} is damaged")
        notify("loading the compiled graphs")
        return Entry({Path(name).stem: load(folder / name) for name in record["files"]}, record["notes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        notify(f"the compiled graphs in {folder} cannot be used: {_one_line(error)}; they are compiled again")
        return None


def make(model: str, needed: Mapping[str, str], graphs: Mapping[str, Graph], notes: Any, notify: Notify) -> Entry:
    """Compile graphs, keep their packages in the cache, and load them.

    Other processes compile, as many at once as there are cores: Inductor's memory is not this process's, and an
    interrupt ends them.

    Args:
        model: as `find` has it.
        needed: as `find` has it.
        graphs: by name.
        notes: a JSON value, to be found with the packages.
        notify: takes the steps.

    Raises:
        PackageError: a graph does not compile.

    Warns:
        UserWarning: the packages cannot be kept.
    """
    with ExitStack() as stack:
        try:
            target = _folder(model, needed)
            _lock(stack, target, notify)
            if target.is_dir() and (entry := find(model, needed, notify)):
                return entry  # of a process that held the lock
            folder = stack.enter_context(_entry_to_fill(target))
        except OSError as error:
            warnings.warn(f"compiled graphs are not kept: {error}; {WHAT_TO_DO}", stacklevel=2)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            _compile(graphs, folder, notify)
        except CompileError as error:
            raise PackageError(str(error)) from error
        runs = {name: load(folder / f"{name}.pt2") for name in graphs}
        record = {
            "model": model,
            "versions": dict(needed),
            "files": {f"{name}.pt2": digest(folder / f"{name}.pt2") for name in graphs},
            "notes": notes,
        }
        (folder / _RECORD).write_text(json.dumps(_signed(record), indent=1) + "\n", encoding="utf-8")
    return Entry(runs, notes)


def _lock(stack: ExitStack, target: Path, notify: Notify) -> None:
    """Let one process at a time compile the graphs of a model; the system releases the lock of one that dies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / ".lock")
    try:
        stack.enter_context(lock.acquire(timeout=0))
    except Timeout:
        notify("waiting for another process, which compiles the graphs of this model")
        stack.enter_context(lock.acquire())


def load(path: Path) -> Run:
    """A package as a function, for one thread at a time. A list of tensors in, which is emptied, a list out."""
    # What torch._inductor.aoti_load_package calls, without its imports and its compilation of programs that probe the
    # instruction set, which take seconds.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
    run: Run = loader.boxed_run
    return run


def _compile(graphs: Mapping[str, Graph], folder: Path, notify: Notify) -> None:
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        tasks = []
        for name, graph in graphs.items():
            program, package = f"{scratch}/{name}.pt2", f"{folder}/{name}.pt2"
            torch.export.save(_without_example_data(graph.program), program)
            tasks.append({"program": program, "package": package, "options": dict(graph.options), "fuse": graph.fuse})
        list_of_tasks = Path(scratch) / "tasks.json"
        list_of_tasks.write_text(json.dumps(tasks), encoding="utf-8")
        worker = (sys.executable, "-c", _WORKER, str(list_of_tasks), str(processes_at_once()))
        environment = {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
            # Inductor would start processes for kernels that these graphs have not.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }

        def look() -> None:
            missing = [graph.title for name, graph in graphs.items() if not os.path.exists(folder / f"{name}.pt2")]
            notify("compiling the graphs", len(graphs) - len(missing), len(graphs), ", ".join(missing))

        def run(**more: str) -> None:
            run_commands([worker], Path(scratch), look=look, environment={**environment, **more})

        look()
        # torch compiles and runs a program for every instruction set, to see whether it can. Where a busy machine lets
        # that take too long, it takes a worse one without a word. /proc/cpuinfo says what the CPU has.
        try:
            run(**({} if _PROBES in os.environ else {_PROBES: "1"}))
        except CompileError as error:
            if _PROBES in os.environ or "InvalidCxxCompiler" in str(error):
                raise
            notify("the graphs do not compile for all that this CPU has; torch finds out what the compiler can do")
            run()
        look()


def _without_example_data(program: ExportedProgram) -> ExportedProgram:
    """The program with example inputs that hold one element: weights are among the inputs, and would be saved."""
    args, kwargs = program.example_inputs
    program.example_inputs = (tuple(arg.new_zeros(()).expand(arg.shape) for arg in args), kwargs)
    return program


@contextmanager
def _entry_to_fill(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target``, in the place of what is there. The caller holds the lock.

    What a process that was killed has left is removed.
    """
    for stale in target.parent.glob(".*-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with publishing_folder(target, prefix=f".{target.name}-") as folder:
        yield folder
        entries = sorted((path for path in target.parent.iterdir() if path.is_dir() and path.name[0] != "."), key=_age)
        for path in {target, *entries[: -_KEPT_ENTRIES + 1]}:
            shutil.rmtree(path, ignore_errors=True)


def _signed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the digest of the rest of it."""
    rest = {name: value for name, value in record.items() if name != "digest"}
    return {**rest, "digest": _short_digest(json.dumps(rest, sort_keys=True))}


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process has removed it
        return 0.0


def _folder(model: str, needed: Mapping[str, str]) -> Path:
    return cache_folder() / "packages" / _short_digest(model) / _short_digest(json.dumps(dict(needed), sort_keys=True))


def _others(folder: Path, needed: Mapping[str, str]) -> str:
    """How the newest entry beside ``folder`` differs from what is needed; empty if there is none."""
    if not os.path.isdir(folder.parent):
        return ""
    for path in sorted(folder.parent.iterdir(), key=_age, reverse=True):
        try:
            had = json.loads((path / _RECORD).read_text(encoding="utf-8"))["versions"]
            differing = [name for name, value in needed.items() if had.get(name) != value]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        return ", ".join(f"{name} {had.get(name)}, now {needed[name]}" for name in differing)
    return ""


def files_digest(paths: Iterable[Path]) -> str:
    """The digest of the content of files."""
    digests = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    return _short_digest(" ".join(digests))


def _cpu_digest() -> str:
    """The digest of what this CPU can: the code is compiled for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return _short_digest("\n".join(sorted({line for line in lines if line.startswith(_CPU_LINES)})))


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
