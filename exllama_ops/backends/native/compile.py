"""Compile csrc into the native library of a device: the CPU's with a C++ compiler, CUDA's with nvcc.

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
from types import MappingProxyType
from typing import NamedTuple

RECORD = "build.json"  # beside the library: how it was built

_STABLE_ABI_HEADER = "torch/csrc/stable/library.h"
# One file serves every torch from 2.10 on.
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


class Recipe(NamedTuple):
    """How the library of one device is made.

    Args:
        device: the folder of its kernels in csrc; every file there with the suffix belongs to it.
        suffix: of the kernels' files.
        library: the name of its file.
        bindings: the files of csrc/bindings that belong to it.
        variable: the environment variable that names its compiler.
        programs: its compilers, first choice first; used if the variable is not set.
        install: how a user gets one.
        compile_flags: for every file.
        link_flags: with the name of torch's library in them, the loader resolves torch's symbols from the one that
            Python has loaded.
        device_code: of nvcc. The device code has three variants, for the tensor cores of sm_75, those from sm_80 on,
            and none; of each, machine code for these GPUs, if this nvcc knows them, and for their minor versions
            (sm_80 runs on 8.6 and 8.9). The PTX is for GPUs to come.
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
        "compute_80": ("sm_80", "sm_90", "sm_100", "sm_120", "compute_80"),
    },
)


class CompileError(RuntimeError):
    """The compiler failed; the text holds its command and what it said."""


class Compiler(NamedTuple):
    """A compiler: the words of its command, the first one resolved to a file."""

    command: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.command)

    def identity(self) -> str:
        """What tells one compiler from another without running it."""
        program = Path(self.command[0]).resolve()
        status = program.stat()
        return f"{shlex.join(self.command)} {program} {status.st_size} {status.st_mtime_ns}"


def find_compiler(recipe: Recipe) -> Compiler | None:
    """The compiler that the recipe's variable names, if it is set; else the first of its programs that is there."""
    chosen = os.environ.get(recipe.variable)
    for command in [shlex.split(chosen)] if chosen else [[program] for program in recipe.programs]:
        program = shutil.which(command[0]) if command else None
        if program:
            return Compiler((program, *command[1:]))
    return None


def no_compiler(recipe: Recipe) -> str:
    """Why `find_compiler` found none, and what to do about it."""
    chosen = os.environ.get(recipe.variable)
    programs = " or ".join(program for program in recipe.programs if "/" not in program)
    missing = f"{recipe.variable}={chosen} names no program"
    where = missing if chosen else f"there is no {programs} in PATH, and {recipe.variable} is not set"
    kind = "nvcc" if recipe is CUDA else "a C++ compiler"
    return (
        f"its kernels are compiled on first use, which needs {kind}, and {where}; install one "
        f"({recipe.install}) and start again"
    )


def has_stable_headers(torch_directory: Path) -> bool:
    """Whether an installed torch brings the headers that the bindings include."""
    return (torch_directory / "include" / _STABLE_ABI_HEADER).is_file()


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
    return hashlib.sha256(compiler.identity().encode()).hexdigest()[:8]


def compile_library(
    recipe: Recipe, csrc: Path, torch_directory: Path, compiler: Compiler, folder: Path, say: Callable[[str], None]
) -> None:
    """Compile the sources in parallel and link them: the recipe's library in ``folder``, and its `RECORD`.

    Args:
        recipe: of the device.
        csrc: the folder of the sources.
        torch_directory: the installed package torch, for its headers and the library to link with.
        compiler: from `find_compiler`.
        folder: where to write; it exists.
        say: takes a line of progress.

    Raises:
        CompileError: the compiler failed.
    """
    units = sources(recipe, csrc)
    jobs = min(len(units), _jobs())
    include = ("-I", str(csrc), "-isystem", str(torch_directory / "include"))
    start = time.perf_counter()
    flags = (*recipe.compile_flags, *device_flags(recipe, compiler))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = {unit: Path(scratch) / f"{number}-{unit.stem}.o" for number, unit in enumerate(units)}
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            running = {
                pool.submit(_run, (*compiler.command, *flags, *include, "-c", str(unit), "-o", str(path))): unit
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
        link = ("-L", str(torch_directory / "lib"), *recipe.link_flags)
        _run((*compiler.command, *map(str, objects.values()), *link, "-o", str(folder / recipe.library)))
    record = {
        "sha256": digest(folder / recipe.library),
        "compiler": str(compiler),
        "flags": [*flags, *recipe.link_flags],
        "seconds": round(time.perf_counter() - start, 1),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def device_flags(recipe: Recipe, compiler: Compiler) -> list[str]:
    """The recipe's device code, of what the compiler knows.

    Raises:
        CompileError: the compiler does not say.
    """
    if not recipe.device_code:
        return []
    known = set(_run((*compiler.command, "--list-gpu-code")).split())
    flags = []
    for virtual, codes in recipe.device_code.items():
        if known & set(codes):
            kept = ",".join(code for code in codes if code in known or code == virtual)
            flags += ["-gencode", f"arch={virtual},code=[{kept}]"]
    return flags


def digest(path: Path) -> str:
    """Of a library, by which a truncated one is told from a whole one."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _jobs() -> int:
    """As many compilers as cores, unless MAX_JOBS, which torch's own builds obey too, says less."""
    limit = os.environ.get("MAX_JOBS", "")
    if limit.isdecimal() and int(limit) > 0:
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(command: tuple[str, ...]) -> str:
    """What the command prints."""
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
    return result.stdout
