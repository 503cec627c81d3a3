"""The limits compile and answer; how fast a machine is, no test says."""

from __future__ import annotations

import platform
import shutil

import pytest

from benchmarks.limits import DOTS, DRAM, ISAS, Limits, LimitsError
from exllama_ops.backends.cpu import BACKEND

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)


@needs_compiler
@pytest.mark.parametrize("isa", ISAS)
def test_every_limit_of_every_instruction_set_is_measured(isa: str) -> None:
    BACKEND.build()
    assert BACKEND.library is not None
    if not BACKEND.library.isas()[isa]:
        pytest.skip(f"this CPU has no {isa}")
    measured = Limits(isa, 2).measure()
    assert set(measured) == {DRAM, *DOTS}
    assert all(1e8 < value < 1e14 for value in measured.values())


def test_an_instruction_set_without_known_peaks_is_refused() -> None:
    with pytest.raises(LimitsError, match="the kernels use scalar"):
        Limits("scalar", 1)
