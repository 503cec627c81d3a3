"""The first build under hard conditions: interrupts, killed builders, odd variables, no place to write to.

Compilers are shell scripts here. Processes that are to be ended run `compile.py` by its file, as pip's build does,
which needs no torch.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from exllama_ops.backends.cpu import CpuBackend
from exllama_ops.backends.native import cache
from exllama_ops.backends.native import compile as compiling
from exllama_ops.backends.native.compile import CPU, CUDA, CompileError, Recipe
from exllama_ops.progress import ignore

# Compiles with what CXX names, in the folder that is the first argument. The second says in which thread: the main one,
# one that it joins, or one of a pool that it leaves.
BUILD = f"""
import concurrent.futures, importlib.util, pathlib, sys, threading
spec = importlib.util.spec_from_file_location("compile", {compiling.__file__!r})
compiling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiling)
folder = pathlib.Path(sys.argv[1])

def build():
    compiler = compiling.find_compiler(compiling.CPU)
    compiling.compile_library(compiling.CPU, folder / "csrc", folder, compiler, folder / "out", print)

if sys.argv[2] == "main":
    build()
elif sys.argv[2] == "thread":
    thread = threading.Thread(target=build)
    thread.start()
    thread.join()
else:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(build).result()
"""

# Starts another process, as g++ and nvcc do, and never ends.
HANGS = "sleep 1000 & echo $$ $! >> $FOLDER/pids; wait"
# Writes what it is asked for, and a line into its trace.
WORKS = 'echo "$@" >> $FOLDER/trace; while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three sources to compile, and a place for the library."""
    for name in (*CPU.bindings, "cpu/gemm/gemm.cpp"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()
    (tmp_path / "out").mkdir()
    return tmp_path


def compiler(folder: Path, script: str) -> str:
    """A program that does what the script says."""
    program = folder / "compiler"
    program.write_text(f"#!/bin/sh\nFOLDER={shlex.quote(str(folder))}\n{script}\n")
    program.chmod(0o755)
    return str(program)


def compile_library(folder: Path, tell: Callable[[int, int, str], None] = lambda done, total, file: None) -> None:
    found = compiling.find_compiler(CPU)
    assert found is not None
    compiling.compile_library(CPU, folder / "csrc", folder, found, folder / "out", tell)


def pids(folder: Path) -> list[int]:
    file = folder / "pids"
    return [int(word) for word in file.read_text().split()] if file.exists() else []


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def signalled(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """The errors of a process that ends by a signal, which Python forgets if it comes just before a thread waits."""
    for _ in range(12):
        process.send_signal(number)
        try:
            return process.communicate(timeout=5)[1]
        except subprocess.TimeoutExpired:
            pass
    raise TimeoutError(f"{process.args} does not end")


def comes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


# Interrupts


@pytest.mark.parametrize(
    ("number", "thread"),
    [
        (signal.SIGINT, "main"),
        (signal.SIGINT, "thread"),
        (signal.SIGINT, "pool"),
        (signal.SIGTERM, "main"),
        (signal.SIGKILL, "main"),
    ],
)
def test_a_signal_to_python_alone_ends_it_and_its_compilers(folder: Path, number: signal.Signals, thread: str) -> None:
    environment = {**os.environ, "CXX": compiler(folder, HANGS), "MAX_JOBS": "2"}
    command = [sys.executable, "-c", BUILD, str(folder), thread]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert comes_true(lambda: len(pids(folder)) == 4)
        err = signalled(process, number)
        assert process.returncode == -number
        if number == signal.SIGINT:
            assert err.splitlines()[-1] == "KeyboardInterrupt"
            assert list((folder / "out").iterdir()) == []
        assert comes_true(lambda: not any(map(is_running, pids(folder))))
    finally:
        process.kill()
        for pid in filter(is_running, pids(folder)):
            os.kill(pid, signal.SIGKILL)


def test_one_compiler_that_fails_ends_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = 'case "$*" in *gemm.cpp*) until [ -s $FOLDER/pids ]; do sleep 0.01; done; echo words >&2; exit 3;; esac'
    monkeypatch.setenv("CXX", compiler(folder, f"{fails}\n{HANGS}"))
    monkeypatch.setenv("MAX_JOBS", "3")
    with pytest.raises(CompileError, match=r"gemm\.cpp -o [^\n]*\nwords\n\(exit status 3\)$"):
        compile_library(folder)
    assert pids(folder)
    assert comes_true(lambda: not any(map(is_running, pids(folder))))
    assert list((folder / "out").iterdir()) == []


def test_a_compiler_that_hangs_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler(folder, HANGS))
    monkeypatch.setattr(compiling, "_LIMIT_S", 1.0)
    with pytest.raises(CompileError, match=r"\n\(ended after 1 s\)$"):
        compile_library(folder)
    assert pids(folder)
    assert comes_true(lambda: not any(map(is_running, pids(folder))))


# Killed builders


@pytest.fixture
def root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder of libraries, for a compiler that works."""
    monkeypatch.setenv("CXX", compiler(folder, WORKS))
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(folder / "cache"))
    monkeypatch.setattr(cache, "csrc", lambda: folder / "csrc")
    return cache.root()


def build(**options: bool) -> cache.Built:
    return cache.find_or_build(CPU, ignore, **options)


def test_the_next_build_removes_what_killed_ones_have_left(root: Path) -> None:
    key = build().path.parent.name
    other, locked, of_a_user = "0123456789abcdef-01234567", "0123456789abcdef-89abcdef", "a.folder"
    folders = [f"{key}.0scratch", f"{other}.1scratch", f"{locked}.2scratch", other, of_a_user]
    for name in folders:
        (root / name / "deep").mkdir(parents=True)
        (root / name / "deep" / "file").write_text("half")
    with cache._held(root / f"{locked}.lock"):
        build(force=True)
    kept = sorted(path.name for path in root.iterdir() if path.suffix != ".lock")
    assert kept == sorted([key, other, f"{locked}.2scratch", of_a_user])


def test_a_library_serves_the_gpus_whose_code_it_has(root: Path) -> None:
    two = cache.find_or_build(CPU, ignore, ("sm_80", "sm_90"))
    assert two.path.parent.name.endswith("-sm_80+sm_90")
    assert cache.find(CPU, ("sm_90",)) == two.path
    assert cache.find(CPU, ("sm_90", "sm_120")) is None
    assert cache.find(CPU, compiling.ALL) is None
    every = cache.find_or_build(CPU, ignore, compiling.ALL)
    assert cache.find(CPU, ("sm_90", "sm_120")) == cache.find(CPU, compiling.ALL) == every.path
    (root / f"{two.path.parent.name}.0scratch").mkdir()
    cache.find_or_build(CPU, ignore, ("sm_80", "sm_90"), force=True)
    assert not (root / f"{two.path.parent.name}.0scratch").exists()


def test_a_forked_child_has_no_lock_of_its_parent(root: Path) -> None:
    root.mkdir(parents=True)
    lock = root / "x.lock"
    reading, writing = os.pipe()
    with cache._held(lock):
        child = os.fork()
        if not child:
            os.write(writing, b"forked")
            signal.pause()
    try:
        assert os.read(reading, 6) == b"forked"
        with cache._held(lock):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


# Variables


@pytest.mark.parametrize("recipe", [CPU, CUDA], ids=lambda recipe: recipe.variable)
@pytest.mark.parametrize(
    "value", ['g++ "', "g++ 'x", "\\", "   ", "/", "/etc/passwd", "no-such -O2", "x" * 5000, "\udcff"]
)
def test_a_variable_that_names_no_compiler_is_a_reason_that_quotes_it(
    recipe: Recipe, value: str, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.setenv(recipe.variable, value)
    shown = value if len(value) < 200 else value[:200] + "..."
    reason = f", and {recipe.variable}={shown!r} names no program that can be run; install one ({recipe.install})"
    assert compiling.find_compiler(recipe) is None
    (found,) = cache.reasons_against_building(recipe)
    assert reason in found
    assert cache.find(recipe) is None
    with pytest.raises(cache.BuildError, match=re.escape(reason)):
        cache.find_or_build(recipe, ignore)


def test_a_variable_that_names_no_compiler_is_no_failed_search(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setenv("CXX", 'g++ "')
    (reason,) = CpuBackend().reasons_against("gptq_gemm", "CPU")
    assert "CXX='g++ \"' names no program" in reason


def test_a_compiler_that_goes_away_while_it_is_looked_at_is_none(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: "/no/such/compiler")
    assert compiling.find_compiler(CPU) is None


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (b"no program", r"compiler: \[Errno 8\] Exec format error: "),
        (b"#!/no/such/shell\n", r"compiler: \[Errno 2\] No such file or directory: "),
        (b"#!/bin/sh\n", r"-o .*/libexllama_cpu\.so\n\(exit status 0, and no libexllama_cpu\.so\)$"),
        (b"#!/bin/sh\necho what?\nexit 1\n", r"\nwhat\?\n\(exit status 1\)$"),
        (b"#!/bin/sh\nkill -SEGV $$\n", r"\(exit status -11\)$"),
    ],
    ids=["no program", "no interpreter", "does nothing", "fails", "crashes"],
)
def test_a_program_that_is_no_compiler_is_named_with_its_variable(
    root: Path, folder: Path, script: bytes, message: str
) -> None:
    program = folder / "compiler"
    program.write_bytes(script)
    with pytest.raises(cache.BuildError, match=rf"(?s)^the compiler, by CXX='{program}', failed:\n.*{message}"):
        build()
    assert [path.suffix for path in root.iterdir()] == [".lock"]


@pytest.mark.parametrize("value", ["0", "-1", "many", "1e3", "9" * 5000])
def test_another_number_of_jobs_is_said_and_not_used(folder: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler(folder, WORKS))
    monkeypatch.setenv("MAX_JOBS", value)
    message = f"MAX_JOBS must be a number of compilers, 1 or more; got {value[:200]!r}"
    with pytest.warns(UserWarning, match=rf"^{re.escape(message)}"):
        compile_library(folder)
    assert (folder / "out" / CPU.library).read_text() == "made\n"


# Places


@pytest.mark.parametrize("place", ["/dev/null", "/dev/null/below", "/proc/nowhere", "x" * 5000, "/" + "x/" * 3000])
def test_a_cache_that_cannot_be_written_says_what_to_do(
    place: str, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", place)
    backend = CpuBackend()
    assert backend.reasons_against("gptq_gemm", "CPU") == []
    backend.build()
    (reason,) = backend.failure
    assert reason.startswith("its library cannot be kept: ")
    assert reason.endswith("; set EXLLAMA_OPS_CACHE to a folder that can be written")


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without HOME whom the system does not know, as in a container that runs as any number."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("EXLLAMA_OPS_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_without_a_home_the_reason_says_what_to_do(root: Path, no_home: None) -> None:
    backend = CpuBackend()
    assert backend.reasons_against("gptq_gemm", "CPU") == []
    backend.build()
    assert backend.failure == [
        "its library cannot be kept: there is no home directory to keep files in; "
        "set EXLLAMA_OPS_CACHE to a folder that can be written"
    ]


def test_a_library_in_a_cache_that_cannot_be_written_serves(root: Path) -> None:
    built = build()
    lock = built.path.parent.with_name(f"{built.path.parent.name}.lock")
    lock.unlink()
    lock.mkdir()  # nobody can open it
    assert build() == built._replace(fresh=False)
    with pytest.raises(cache.BuildError, match=r"its library cannot be kept: .*; set EXLLAMA_OPS_CACHE to a folder"):
        build(force=True)
