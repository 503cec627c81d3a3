"""All C++ compiles without warnings, and is formatted by clang-format. Users' builds take warnings as such."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exllama_ops.backends.native import compile as compiling
from ptx_emulator.toolchain import WARNINGS, cuda_include

ROOT = Path(__file__).parents[2]
INCLUDE = Path(torch.__file__).parent / "include"
FOLDERS = ("csrc", "tests", "benchmarks", "tools")
# Other tests compile three kinds with the same warnings: the runtime of the emulator and the .cu files where they are
# emulated, and the program that runs a package where it is run.
SOURCES = [
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.cpp"))
    if folder != "tools" and "kernels" not in path.parent.name and path.name != "aoti_program.cpp"
]


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_there_are_no_warnings(source: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    include = [INCLUDE]
    flags = [flag for flag in compiling.CPU.compile_flags if flag.startswith(("-std", "-D"))]
    if '"cuda/launch.h"' in (ROOT / source).read_text():
        if shutil.which("nvcc") is None:
            pytest.skip("needs nvcc, for CUDA's headers")
        include.append(cuda_include())
    system = [word for folder in include for word in ("-isystem", str(folder))]
    command = ["g++", *flags, *WARNINGS, "-fsyntax-only", "-I", "csrc", *system, str(source)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_clang_format_has_nothing_to_change() -> None:
    program = shutil.which("clang-format", path=Path(sys.executable).parent) or shutil.which("clang-format")
    if program is None:
        pytest.skip("needs clang-format")
    suffixes = {".h", ".cpp", ".cu", ".cuh"}
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in suffixes]
    result = subprocess.run(
        [program, "--dry-run", "-Werror", *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
