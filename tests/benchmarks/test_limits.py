"""The limits compile and answer; how fast a machine is, no test says."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.limits import ARM_ISAS, DOTS, DRAM, ISAS, SOURCE, Limits, LimitsError
from exllama_ops.backends.cpu import BACKEND

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() not in ("x86_64", "aarch64"), reason="needs g++"
)


@needs_compiler
@pytest.mark.parametrize("isa", ISAS)
def test_every_limit_of_every_instruction_set_is_measured(isa: str) -> None:
    BACKEND.build()
    assert BACKEND.library is not None
    if not BACKEND.library.isas().get(isa):
        pytest.skip(f"this CPU has no {isa}")
    measured = Limits(isa, 2).measure()
    assert set(measured) == {DRAM, *DOTS}
    assert all(1e8 < value < 1e14 for value in measured.values())


ARM_COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
ARM_MAIN = """
#include <cstdio>
#include <vector>
int main() {
  const std::vector<char> memory(1 << 20, 1);
  std::printf("%g\\n", limits_dram(memory.data(), memory.size(), 2));
  for (const char* isa : {ISAS}) {
    for (const char* kind : {"float", "int16", "int8"}) std::printf("%g\\n", limits_dot(isa, kind, 2));
  }
}
"""


@pytest.mark.skipif(
    shutil.which(ARM_COMPILER) is None or shutil.which(QEMU) is None, reason=f"needs {ARM_COMPILER} and {QEMU}"
)
def test_every_limit_of_arm_runs_in_qemu(tmp_path: Path) -> None:
    isas = ", ".join(f'"{isa}"' for isa in ARM_ISAS)
    (tmp_path / "main.cpp").write_text(f'#include "{SOURCE}"\n{ARM_MAIN.replace("ISAS", isas)}')
    command = [ARM_COMPILER, "-O2", "-std=c++17", "-static", "-pthread", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    ran = subprocess.run([QEMU, "-cpu", "max", "./main"], cwd=tmp_path, capture_output=True, text=True, check=True)
    speeds = [float(line) for line in ran.stdout.split()]
    assert len(speeds) == 1 + len(ARM_ISAS) * len(DOTS)
    assert all(speed > 0 for speed in speeds)


def test_an_instruction_set_without_known_peaks_is_refused() -> None:
    with pytest.raises(LimitsError, match="the kernels use scalar"):
        Limits("scalar", 1)
