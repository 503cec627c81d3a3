"""Compile csrc into the CPU library with a plain C++ compiler.

The standard library is all it uses: pip's build loads this file by its path, in an environment without torch. torch's
stable headers and the names of its libraries are all that is needed of torch, and both lie on disk.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

LIBRARY = "libexllama_cpu.so"
RECORD = "build.json"  # beside the library: how it was built

# The bindings of the CPU library; every .cpp of the folder csrc/cpu belongs to it too.
_BINDINGS = ("bindings/checks.cpp", "bindings/cpu.cpp")
_STABLE_ABI_HEADER = "torch/csrc/stable/library.h"

COMPILE_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    # Products and sums are fused where the source says so and nowhere else: results are the same bits on every ISA.
    "-ffp-contract=off",
    # One file serves every torch from 2.10 on.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
# With the name of the library in it, the loader resolves torch's symbols from the libtorch_cpu that Python has loaded.
LINK_FLAGS = ("-shared", "-ltorch_cpu")


class CompileError(RuntimeError):
    """The compiler failed; the text holds its command and what it said."""


class Compiler(NamedTuple):
    """A C++ compiler: the words of its command, the first one resolved to a file."""

    command: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.command)

    def identity(self) -> str:
        """What tells one compiler from another without running it."""
        program = Path(self.command[0]).resolve()
        status = program.stat()
        return f"{shlex.join(self.command)} {program} {status.st_size} {status.st_mtime_ns}"


def find_compiler() -> Compiler | None:
    """The compiler that CXX names, if it is set; else g++ or clang++ from PATH."""
    chosen = os.environ.get("CXX")
    for command in [shlex.split(chosen)] if chosen else [["g++"], ["clang++"]]:
        program = shutil.which(command[0]) if command else None
        if program:
            return Compiler((program, *command[1:]))
    return None


def no_compiler() -> str:
    """Why `find_compiler` found none, and what to do about it."""
    chosen = os.environ.get("CXX")
    where = f"CXX={chosen} names no program" if chosen else "there is no g++ or clang++ in PATH, and CXX is not set"
    return (
        f"its kernels are compiled on first use, which needs a C++ compiler, and {where}; install one "
        "(apt-get install g++, dnf install gcc-c++) and start again"
    )


def has_stable_headers(torch_directory: Path) -> bool:
    """Whether an installed torch brings the headers that the bindings include."""
    return (torch_directory / "include" / _STABLE_ABI_HEADER).is_file()


def sources(csrc: Path) -> list[Path]:
    """The files to compile."""
    return [*(csrc / name for name in _BINDINGS), *sorted((csrc / "cpu").rglob("*.cpp"))]


def source_key(csrc: Path) -> str:
    """What the library is made of, but for the compiler: sources, headers, flags and machine."""
    digest = hashlib.sha256(repr((COMPILE_FLAGS, LINK_FLAGS, platform.machine())).encode())
    for folder in ("bindings", "cpu", "layout"):
        for path in sorted(path for path in (csrc / folder).rglob("*") if path.is_file()):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def compiler_key(compiler: Compiler) -> str:
    return hashlib.sha256(compiler.identity().encode()).hexdigest()[:8]


def compile_library(
    csrc: Path, torch_directory: Path, compiler: Compiler, folder: Path, say: Callable[[str], None]
) -> None:
    """Compile the sources in parallel and link them: `LIBRARY` in ``folder``, and its `RECORD`.

    Args:
        csrc: the folder of the sources.
        torch_directory: the installed package torch, for its headers and the library to link with.
        compiler: from `find_compiler`.
        folder: where to write; it exists.
        say: takes a line of progress.

    Raises:
        CompileError: the compiler failed.
    """
    units = sources(csrc)
    jobs = min(len(units), _jobs())
    include = ("-I", str(csrc), "-isystem", str(torch_directory / "include"))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = {unit: Path(scratch) / f"{number}-{unit.stem}.o" for number, unit in enumerate(units)}
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            running = {
                pool.submit(_run, (*compiler.command, *COMPILE_FLAGS, *include, "-c", str(unit), "-o", str(path))): unit
                for unit, path in objects.items()
            }
            try:
                for done, future in enumerate(concurrent.futures.as_completed(running), start=1):
                    future.result()
                    unit = running[future].relative_to(csrc)
                    say(f"[{done}/{len(units)}] {unit} ({time.perf_counter() - start:.0f} s)")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        link = ("-L", str(torch_directory / "lib"), *LINK_FLAGS)
        _run((*compiler.command, *map(str, objects.values()), *link, "-o", str(folder / LIBRARY)))
    record = {
        "sha256": digest(folder / LIBRARY),
        "compiler": str(compiler),
        "flags": [*COMPILE_FLAGS, *LINK_FLAGS],
        "seconds": round(time.perf_counter() - start, 1),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def digest(path: Path) -> str:
    """Of a library, by which a truncated one is told from a whole one."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _jobs() -> int:
    """As many compilers as cores, unless MAX_JOBS, which torch's own builds obey too, says less."""
    limit = os.environ.get("MAX_JOBS", "")
    if limit.isdecimal() and int(limit) > 0:
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(command: tuple[str, ...]) -> None:
    # Messages in English, whatever the user's locale: they end in bug reports.
    environment: Mapping[str, str] = {**os.environ, "LC_ALL": "C"}
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            check=False,
        )
    except OSError as error:
        raise CompileError(f"{command[0]}: {error}") from error
    if result.returncode:
        raise CompileError(f"{shlex.join(command)}\n{result.stdout.strip()}\n(exit status {result.returncode})")
