"""The torch-free C++ tests of csrc/cpu, compiled plainly, under sanitizers and by other compilers, and run.

For aarch64 they are compiled by a cross compiler and run in qemu's user mode, where both are installed (Debian:
g++-aarch64-linux-gnu, qemu-user).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Build(NamedTuple):
    compiler: str
    flags: list[str]
    runner: list[str]
    extent: str = "quick"


BUILDS = {
    "plain": Build("g++", ["-O2"], []),
    # Many times as slow; every kind of numbers still comes up with some shapes of each width.
    "address-undefined": Build(
        "g++", ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], [], "sampled"
    ),
    "thread": Build("g++", ["-O1", "-g1", "-fsanitize=thread"], [], "sampled"),
    "clang": Build("clang++", ["-O2"], []),
    "aarch64": Build("aarch64-linux-gnu-g++", ["-O2", "-static", "-DIN_QEMU"], ["qemu-aarch64"], "sampled"),
}


KERNELS = sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))


# Kernels share no memory but through the workers, whose own test runs under the thread sanitizer each time. Under the
# other sanitizers the kernels are compared as they are in a plain build.
KERNEL_BUILDS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in ("thread", "plain") else [])
    for name in BUILDS
    if name != "aarch64"
]


@pytest.mark.parametrize("name", KERNEL_BUILDS)
def test_kernels_agree_with_double_sums_and_with_themselves(name: str, tmp_path: Path) -> None:
    run(BUILDS[name], "test_cpu.cpp", KERNELS, [BUILDS[name].extent], tmp_path)


# CPUs of qemu, and what the kernels may use of them. The first has all widths.
ARMS = {
    "max": "neon_i8mm neon_dotprod neon scalar",
    "neoverse-n1": "neon_dotprod neon scalar",
    "cortex-a57": "neon scalar",
}


def test_kernels_agree_on_arms_that_have_what_their_system_reports(tmp_path: Path) -> None:
    build = BUILDS["aarch64"]
    program = compile_test(build, "test_cpu.cpp", KERNELS, tmp_path)
    for cpu, isas in ARMS.items():
        widths = [] if cpu == "max" else ["4"]
        printed = run_program([*build.runner, "-cpu", cpu, program, build.extent, *widths])
        assert printed.endswith(f" 0 failures on {isas}\n"), cpu


@pytest.mark.parametrize("name", BUILDS)
def test_workers_compute_every_task_once_and_nobody_waits_for_one_that_sleeps(name: str, tmp_path: Path) -> None:
    run(BUILDS[name], "test_workers.cpp", [ROOT / "csrc" / "cpu" / "workers.cpp"], [], tmp_path)


def run(build: Build, test: str, sources: Sequence[Path], arguments: Sequence[str], folder: Path) -> str:
    """Compile a file of this folder with sources, and run it: what it prints."""
    return run_program([*build.runner, compile_test(build, test, sources, folder), *arguments])


def compile_test(build: Build, test: str, sources: Sequence[Path], folder: Path) -> Path:
    """Compile a file of this folder with sources, or skip the test where a program is missing."""
    missing = [program for program in (build.compiler, *build.runner) if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    flags = ["-std=c++17", "-pthread", "-ffp-contract=off", "-I", str(ROOT / "csrc"), *build.flags]
    objects = []
    for number, source in enumerate([Path(__file__).parent / test, *sources]):
        objects.append(folder / f"{number}.o")
        subprocess.run([build.compiler, *flags, "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([build.compiler, *flags, *objects, "-o", folder / "test"], check=True)
    return folder / "test"


def run_program(command: Sequence[str | Path]) -> str:
    """Run a test program, of which nothing may fail: what it prints."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failures" in result.stdout
    return result.stdout
