"""The torch-free C++ tests of csrc/cpu, compiled plainly and under sanitizers, and run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")

BUILDS = {
    "plain": ["-O2"],
    "address-undefined": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("build", BUILDS)
def test_kernels_agree_with_double_sums_and_with_themselves(build: str, tmp_path: Path) -> None:
    sources = [ROOT / "tests" / "native" / "test_cpu.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    flags = ["-std=c++17", "-pthread", "-ffp-contract=off", *BUILDS[build]]
    objects = []
    for source in sources:
        objects.append(tmp_path / f"{source.stem}.o")
        subprocess.run([str(COMPILER), *flags, "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([str(COMPILER), *flags, *objects, "-o", tmp_path / "test_cpu"], check=True)
    result = subprocess.run([tmp_path / "test_cpu", "quick"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failures" in result.stdout
