"""Compile csrc into the native library of a device: the CPU's with a C++ compiler, CUDA's with nvcc.

The standard library is all it uses: pip's build loads this file by its path, in an environment without torch. torch's
stable headers and the names of its libraries are all that is needed of torch, and both lie on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

RECORD = "build.json"  # beside the library: how it was built

_STABLE_ABI_HEADER = "torch/csrc/stable/library.h"
# One file serves every torch from 2.10 on.
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"

# A file takes a minute or two. A compiler that needs longer than this waits for what does not come: a licence, a disk.
_LIMIT_S = 3600.0
# How often compilers, locks and interrupts are looked at.
INTERVAL_S = 0.05


class Recipe(NamedTuple):
    """How the library of one device is made.

    Args:
        device: the folder of its kernels in csrc; every file there with the suffix belongs to it.
        suffix: of the kernels' files.
        library: the name of its file.
        bindings: the files of csrc/bindings that belong to it.
        variable: the environment variable that names its compiler.
        programs: its compilers, first choice first; used if the variable is not set.
        homes: the environment variables of folders whose bin may have its compiler; they come before its programs.
        install: how a user gets one.
        compile_flags: for every file.
        link_flags: with the name of torch's library in them, the loader resolves torch's symbols from the one that
            Python has loaded.
        device_code: of nvcc. The device code has four variants: for no tensor cores, for those of sm_75, for those from
            sm_80 on, and for launches that overlap, from sm_90 on. Each is machine code for these GPUs, if this nvcc
            knows them, and for their minor versions (sm_80 runs on 8.6 and 8.9). Those of Tegra run on no other. The
            PTX is for GPUs to come.
        given: the environment variable that names a folder with a library that was built elsewhere; empty for none.
    """

    device: str
    suffix: str
    library: str
    bindings: tuple[str, ...]
    variable: str
    programs: tuple[str, ...]
    install: str
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    device_code: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    given: str = ""
    homes: tuple[str, ...] = ()


CPU = Recipe(
    device="cpu",
    suffix=".cpp",
    library="libexllama_cpu.so",
    bindings=("bindings/checks.cpp", "bindings/cpu.cpp"),
    variable="CXX",
    programs=("g++", "clang++"),
    install="apt-get install g++, dnf install gcc-c++",
    compile_flags=(
        "-O3",
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        # Products and sums are fused where the source says so and nowhere else: results are the same bits on every ISA.
        "-ffp-contract=off",
        _TORCH_TARGET,
    ),
    link_flags=("-shared", "-ltorch_cpu"),
)

# No kernels: the schemas, for programs without Python.
SCHEMA = CPU._replace(device="schema", library="libexllama_schema.so", bindings=("bindings/schema.cpp",))

CUDA = Recipe(
    device="cuda",
    suffix=".cu",
    library="libexllama_cuda.so",
    bindings=("bindings/checks.cpp", "bindings/cuda.cpp"),
    variable="EXLLAMA_OPS_NVCC",
    programs=("nvcc", "/usr/local/cuda/bin/nvcc"),
    install="NVIDIA's CUDA toolkit of the version of torch.version.cuda",
    compile_flags=(
        "-O3",
        "-std=c++17",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
        _TORCH_TARGET,
    ),
    # libtorch_cuda, which has the function for the current stream, is found through libtorch, in whose place a torch
    # without CUDA has one that the library loads beside.
    link_flags=("-shared", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"),
    device_code={
        "compute_60": ("sm_60", "sm_70"),
        "compute_75": ("sm_75",),
        "compute_80": ("sm_80", "sm_87"),
        "compute_90": ("sm_90", "sm_100", "sm_110", "sm_120", "compute_90"),
    },
    given="EXLLAMA_OPS_CUDA_LIBRARY",
    homes=("CUDA_HOME", "CUDA_PATH"),
)

# Jetson Orin and Thor are Arm computers. Their code runs on no other GPU, and no other code runs on them.
_TEGRA = ("sm_87", "sm_110")
# What GPUs to come compile.
PTX = "compute_90"
# All device code of a recipe that a compiler knows and a machine can have a use for.
ALL = ("all",)


class CompileError(RuntimeError):
    """The compiler failed; the text holds its command and what it said."""


class Compiler(NamedTuple):
    """A compiler.

    Args:
        command: the words of its command, the first one resolved to a file.
        identity: what tells it from another one without running it.
    """

    command: tuple[str, ...]
    identity: str

    def __str__(self) -> str:
        return shlex.join(self.command)


def find_compiler(recipe: Recipe) -> Compiler | None:
    """The compiler that the recipe's variable names, if it is set; else the first of its homes' and its programs."""
    chosen = os.environ.get(recipe.variable)
    homes = [home for name in recipe.homes if (home := os.environ.get(name))]
    programs = [*(os.path.join(home, "bin", recipe.programs[0]) for home in homes), *recipe.programs]
    try:
        commands = [shlex.split(chosen)] if chosen else [[program] for program in programs]
    except ValueError:  # a quote that is not closed
        return None
    for command in commands:
        program = shutil.which(command[0]) if command else None
        with contextlib.suppress(OSError):  # it may go away while it is looked at
            if program:
                words = (program, *command[1:])
                file = os.path.realpath(program)
                status = os.stat(file)
                return Compiler(words, f"{shlex.join(words)} {file} {status.st_size} {status.st_mtime_ns}")
    return None


def no_compiler(recipe: Recipe) -> str:
    """Why `find_compiler` found none, and what to do about it."""
    programs = " or ".join(program for program in recipe.programs if "/" not in program)
    folders = [*recipe.homes, "PATH", *(os.path.dirname(program) for program in recipe.programs if "/" in program)]
    chosen = chosen_compiler(recipe)
    where = (
        f"{chosen} names no program that can be run"
        if chosen
        else f"there is no {programs} in {' or '.join(folders)}, and {recipe.variable} is not set"
    )
    kind = "nvcc" if recipe is CUDA else "a C++ compiler"
    return (
        f"its kernels are compiled on first use, which needs {kind}, and {where}; install one "
        f"({recipe.install}) and start again"
    )


def chosen_compiler(recipe: Recipe) -> str:
    """The recipe's variable and what it holds, for messages; empty if it is not set."""
    value = os.environ.get(recipe.variable)
    return f"{recipe.variable}={value if len(value) <= 200 else f'{value[:200]}...'!r}" if value else ""


def has_stable_headers(torch_directory: Path) -> bool:
    """Whether an installed torch brings the headers that the bindings include."""
    return os.path.isfile(torch_directory / "include" / _STABLE_ABI_HEADER)


def sources(recipe: Recipe, csrc: Path) -> list[Path]:
    """The files to compile."""
    kernels = sorted((csrc / recipe.device).rglob(f"*{recipe.suffix}"))
    return [*(csrc / name for name in recipe.bindings), *kernels]


def source_key(recipe: Recipe, csrc: Path) -> str:
    """What the library is made of, but for the compiler: sources, headers, flags and machine."""
    flags = (recipe.compile_flags, recipe.link_flags, sorted(recipe.device_code.items()))
    digest = hashlib.sha256(repr((flags, platform.machine())).encode())
    files = {csrc / name for name in recipe.bindings} | set((csrc / "bindings").glob("*.h"))
    for folder in (recipe.device, "layout"):
        files |= {path for path in (csrc / folder).rglob("*") if path.is_file()}
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def compiler_key(compiler: Compiler) -> str:
    return hashlib.sha256(os.fsencode(compiler.identity)).hexdigest()[:8]


def codes_for(recipe: Recipe, capabilities: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    """The recipe's device code that GPUs of some compute capabilities need; PTX where it has no machine code.

    A GPU that is too old for the recipe counts as its own code, which no compiler has for it.
    """
    known = [code for codes in recipe.device_code.values() for code in codes if code.startswith("sm_")]
    codes = set()
    for major, minor in capabilities:
        own = f"sm_{major}{minor}"
        alike = [code for code in known if code not in _TEGRA and code[3:-1] == str(major) and int(code[-1]) <= minor]
        if own in _TEGRA or (major, minor) < (6, 0):
            codes.add(own)
        else:
            codes.add(max(alike, key=_number) if alike else PTX)
    return tuple(sorted(codes, key=_number))


def _number(code: str) -> int:
    return int(code.partition("_")[2])


def compile_library(
    recipe: Recipe,
    csrc: Path,
    torch_directory: Path,
    compiler: Compiler,
    folder: Path,
    tell: Callable[[int, int, str], None],
    codes: tuple[str, ...] = ALL,
) -> None:
    """Compile the sources in parallel and link them: the recipe's library in ``folder``, and its `RECORD`.

    Args:
        recipe: of the device.
        csrc: the folder of the sources.
        torch_directory: the installed package torch, for its headers and the library to link with.
        compiler: from `find_compiler`.
        folder: where to write; it exists.
        tell: takes how many files are compiled, how many there are, and the name of the last one.
        codes: of the recipe's device code.

    Raises:
        CompileError: the compiler failed, or has none of the device code.

    Warns:
        UserWarning: MAX_JOBS is no number of compilers.
    """
    units = sources(recipe, csrc)
    include = ("-I", str(csrc), "-isystem", str(torch_directory / "include"))
    link = ("-L", str(torch_directory / "lib"), *recipe.link_flags)
    library = folder / recipe.library
    start = time.perf_counter()

    def tell_of(done: int, number: int) -> None:
        tell(done, len(units), units[number].relative_to(csrc).as_posix())

    tell(0, len(units), "")
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        flags = (*recipe.compile_flags, *device_flags(recipe, compiler, Path(scratch), codes))
        objects = [f"{scratch}/{number}-{unit.stem}.o" for number, unit in enumerate(units)]
        jobs = processes_at_once()
        compile_only = (*compiler.command, *flags, *include, *_threads(recipe, jobs, len(units)), "-c")
        commands = [(*compile_only, str(unit), "-o", path) for unit, path in zip(units, objects, strict=True)]
        run_commands(commands, Path(scratch), jobs, tell_of)
        command = (*compiler.command, *objects, *link, "-o", str(library))
        run_commands([command], Path(scratch))
    if not library.is_file():
        raise CompileError(f"{shlex.join(command)}\n(exit status 0, and no {library.name})")
    record = {
        "sha256": digest(library),
        "sources": source_key(recipe, csrc),
        "compiler": str(compiler),
        "flags": [*flags, *recipe.link_flags],
        "seconds": round(time.perf_counter() - start, 1),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _threads(recipe: Recipe, jobs: int, units: int) -> tuple[str, ...]:
    """Where there are more cores than files, nvcc has some for the codes of a file."""
    return ("--threads", str(jobs // units)) if recipe.device_code and jobs >= 2 * units else ()


def device_flags(recipe: Recipe, compiler: Compiler, scratch: Path, codes: tuple[str, ...] = ALL) -> list[str]:
    """Options for the device code, of what the compiler knows; PTX in the place of what it does not know yet.

    Raises:
        CompileError: the compiler does not say, or has none of the code.
    """
    if not recipe.device_code:
        return []
    known = set(run_commands([(*compiler.command, "--list-gpu-code")], scratch)[0].split())
    flags = []
    for virtual, of_variant in recipe.device_code.items():
        usable = [code for code in of_variant if code in known or (code == virtual and known & set(of_variant))]
        if codes == ALL:
            kept = [code for code in usable if code not in _TEGRA or platform.machine() == "aarch64"]
        else:
            kept = [code for code in usable if code in codes]
            if virtual in usable and virtual not in kept and set(codes) & (set(of_variant) - set(usable)):
                kept.append(virtual)
        if kept:
            flags += ["-gencode", f"arch={virtual},code=[{','.join(kept)}]"]
    if not flags:
        raise CompileError(
            f"{compiler} compiles for {', '.join(sorted(known, key=_number))}, and the kernels are needed for "
            f"{', '.join(codes)}: take a CUDA toolkit that has it, by CUDA_HOME or {recipe.variable}"
        )
    return flags


def digest(path: Path) -> str:
    """The digest of a library, which tells a truncated file from a whole one."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_interrupt() -> None:
    """Raise KeyboardInterrupt in a thread other than the main one if the main one was interrupted.

    Python interrupts the main thread alone, which then waits for the others: who waits in one of them has to look.
    """
    main = threading.main_thread()
    if threading.current_thread() is main:
        return
    # What it handles, as in the exit of a pool of threads; or what it ended with.
    raised = sys._current_exceptions().get(main.ident or 0) if main.is_alive() else getattr(sys, "last_value", None)
    if isinstance(raised[1] if isinstance(raised, tuple) else raised, KeyboardInterrupt):  # a tuple before Python 3.12
        raise KeyboardInterrupt


def processes_at_once() -> int:
    """As many compilers as cores, unless MAX_JOBS, which torch's own builds obey too, says less."""
    limit = os.environ.get("MAX_JOBS")
    if limit:
        with contextlib.suppress(ValueError):
            if int(limit) > 0:
                return int(limit)
        warnings.warn(
            f"MAX_JOBS must be a number of compilers, 1 or more; got {limit[:200]!r}: as many run as there are cores",
            stacklevel=3,
        )
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Process(NamedTuple):
    """A command that runs, and the file that it prints to."""

    command: tuple[str, ...]
    output: Path
    pid: int
    deadline: float


def run_commands(
    commands: Sequence[tuple[str, ...]],
    scratch: Path,
    jobs: int = 1,
    tell: Callable[[int, int], None] = lambda done, number: None,
    look: Callable[[], None] = lambda: None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """What each command prints. When this ends, however it does, none of them runs, nor what they have started.

    They are started and waited for in this thread: an interrupt of it is the only one there can be.

    Args:
        commands: programs with their arguments.
        scratch: a folder for their temporary files.
        jobs: how many run at once.
        tell: takes how many have succeeded, and the number of the last one.
        look: is called several times a second.
        environment: variables to add to those of this process.

    Raises:
        CompileError: one of them failed, or ran for longer than `_LIMIT_S`.
    """
    # Messages in English, whatever the user's locale: they end in bug reports.
    variables = {**os.environ, **environment, "LC_ALL": "C", "TMPDIR": str(scratch)}
    waiting = list(range(len(commands)))[::-1]
    running: dict[int, _Process] = {}
    printed: dict[int, str] = {}
    try:
        with _group() as group:
            while waiting or running:
                check_interrupt()
                while waiting and len(running) < jobs:
                    number = waiting.pop()
                    output = scratch / f"{number}.txt"
                    pid = _start(commands[number], variables, group, os.devnull, str(output))
                    running[number] = _Process(commands[number], output, pid, time.monotonic() + _LIMIT_S)
                time.sleep(INTERVAL_S)
                look()
                for number, process in list(running.items()):
                    status = _wait(process.pid, os.WNOHANG)
                    if status is not None:
                        del running[number]
                        printed[number] = _printed(process, status)
                        tell(len(printed), number)
                    elif time.monotonic() > process.deadline:
                        raise CompileError(f"{shlex.join(process.command)}\n(ended after {_LIMIT_S:.0f} s)")
    finally:
        for process in running.values():
            _wait(process.pid)
    return [printed[number] for number in range(len(commands))]


def _printed(process: _Process, status: int) -> str:
    """What a command that ended has printed; raises CompileError with it if it failed."""
    text = process.output.read_text(encoding="utf-8", errors="replace")
    if status:
        raise CompileError(f"{shlex.join(process.command)}\n{text.strip()}\n(exit status {status})")
    return text


@contextlib.contextmanager
def _group() -> Iterator[int]:
    """A process group that ends with the block, and with this process, however that ends; for g++ and nvcc run others.

    Its leader waits for the end of a pipe, which comes when there is no process left that could write to it.
    """
    reading, writing = os.pipe()
    leader = None
    try:
        leader = _start(("/bin/sh", "-c", "read -r line; kill -KILL 0"), os.environ, 0, reading, os.devnull)
        yield leader
    finally:
        os.close(reading)
        os.close(writing)
        if leader is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)
            _wait(leader)


def _start(
    command: tuple[str, ...], environment: Mapping[str, str], group: int, stdin: int | str, stdout: int | str
) -> int:
    """Start a command in a process group, of which it is the leader if that is 0. Files are numbers or names."""
    actions = [_redirect(0, stdin), _redirect(1, stdout), (os.POSIX_SPAWN_DUP2, 1, 2)]
    ignored = (signal.SIGPIPE, signal.SIGXFSZ)  # by Python, and by what it starts
    try:
        # subprocess knows no groups before Python 3.11.
        return os.posix_spawn(
            command[0], command, environment, file_actions=actions, setpgroup=group, setsigdef=ignored
        )
    except OSError as error:
        raise CompileError(f"{command[0]}: {error}") from error


def _redirect(number: int, file: int | str) -> tuple[int, ...] | tuple[int, int, str, int, int]:
    if isinstance(file, int):
        return (os.POSIX_SPAWN_DUP2, file, number)
    return (os.POSIX_SPAWN_OPEN, number, file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)


def _wait(pid: int, options: int = 0) -> int | None:
    """The exit status of a child; None, with WNOHANG, while it runs."""
    try:
        ended, status = os.waitpid(pid, options)
    except ChildProcessError:  # its status went to somebody else, or to nobody, where SIGCHLD is ignored
        return 0
    return os.waitstatus_to_exitcode(status) if ended else None
