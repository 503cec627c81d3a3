"""Launches that overlap with the kernel before: whoever touches global memory before it has waited is caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptx_emulator.emulator import DEVICES, EmulationError, Emulator, build
from ptx_emulator.tests.test_faults import Kernels

FAULTS = {
    "reads_before": "global access .* comes before griddepcontrol.wait",
    "one_warp_waits": "global access .* comes before griddepcontrol.wait",
    "ends_without_a_wait": "a thread ends without griddepcontrol.wait",
    "lets_next_begin_before": r"griddepcontrol.launch_dependents comes before griddepcontrol.wait",
}


@pytest.fixture
def kernels() -> Kernels:
    return Kernels(Emulator(build([Path(__file__).parent / "kernels" / "overlap.cu"], arch=90), DEVICES[90]))


@pytest.mark.parametrize("overlaps", [0, 1])
def test_a_kernel_that_waits_first_may_overlap(kernels: Kernels, overlaps: int) -> None:
    with kernels.emulator.record() as recording, kernels.emulator.only(kernels.ranges()):
        assert kernels.run("launch_waits", overlaps)[:64] == list(range(64))
    assert [call["overlaps"] for call in recording.calls] == [bool(overlaps)]
    kernels.source[3] = 100.0
    kernels.emulator.replay(recording)
    assert kernels.target[3] == 100.0


@pytest.mark.parametrize("name", FAULTS)
def test_a_kernel_that_does_not_wait_must_not_overlap(kernels: Kernels, name: str) -> None:
    kernels.run(f"launch_{name}", 0)
    with pytest.raises(EmulationError, match=FAULTS[name]):
        kernels.run(f"launch_{name}", 1)


def test_the_ptx_says_for_what_it_was_compiled(kernels: Kernels) -> None:
    kernels.emulator.set_device(DEVICES[80])
    assert kernels.emulator.library.ptx_version() == 90
