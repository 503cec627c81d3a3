"""The emulator runs what is right and catches what is wrong: each fault beside the kernel without it."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ptx_emulator.emulator import DEVICES, EmulationError, Emulator, build, sanitizer_environment

SOURCE = Path(__file__).parent / "kernels" / "faults.cu"
STREAM = 0x57


class Kernels:
    """The functions of faults.cu on two buffers of 256 floats."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.source = (ctypes.c_float * 256)(*range(256))
        self.target = (ctypes.c_float * 256)(*([-1.0] * 256))

    def ranges(self) -> list[tuple[int, int]]:
        return [(ctypes.addressof(buffer), ctypes.sizeof(buffer)) for buffer in (self.source, self.target)]

    def run(self, name: str, value: int = 0) -> list[float]:
        function = self.emulator.library[name]
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
        function(self.source, self.target, value, STREAM)
        self.emulator.check()
        return list(self.target)


@pytest.fixture(scope="module")
def library() -> Path:
    return build([SOURCE])


@pytest.fixture
def kernels(library: Path) -> Kernels:
    return Kernels(Emulator(library))


REVERSED = [255.0 - i for i in range(256)]


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_right_kernels_are_right_in_every_order(kernels: Kernels, order: str) -> None:
    kernels.emulator.set_order(order, seed=3)
    with kernels.emulator.only(kernels.ranges()):
        assert kernels.run("reverse_right") == REVERSED
        assert kernels.run("swap_right")[:32] == [float(i ^ 1) for i in range(32)]
        assert kernels.run("two_rounds_right") == [2 * value + 1 for value in REVERSED]
        assert kernels.run("staged_right") == [float((i // 4 ^ 1) * 4 + i % 4) for i in range(256)]
        kernels.target[1] = 0.0
        assert kernels.run("fenced_sum")[0] == 15.0


@pytest.mark.parametrize("name", ["reverse", "swap", "two_rounds"])
def test_a_missing_barrier_changes_results_in_some_order(kernels: Kernels, name: str) -> None:
    right = kernels.run(f"{name}_right")
    results = []
    for order in ("ascending", "descending"):
        kernels.emulator.set_order(order)
        results.append(kernels.run(f"{name}_wrong") == right)
    assert not all(results)


def test_a_missing_wait_for_cp_async_reads_nan(kernels: Kernels) -> None:
    got = kernels.run("staged_without_wait")
    assert any(value != value for value in got[:128])
    assert got[128:] == kernels.run("staged_right")[128:]


def test_cp_async_fills_what_is_beyond_its_source_with_zeros(kernels: Kernels) -> None:
    assert kernels.run("partial", 8)[:8] == [0.0, 1.0, 0.0, 0.0] * 2


def test_shared_memory_begins_as_nan(kernels: Kernels) -> None:
    assert all(value != value for value in kernels.run("uninitialized")[:32])


def test_reads_beyond_registered_memory_are_caught_with_their_line(kernels: Kernels) -> None:
    line = next(n for n, text in enumerate(SOURCE.read_text().splitlines(), 1) if "void copy(" in text)
    with kernels.emulator.only(kernels.ranges()):
        assert kernels.run("copy_from", 192)[63] == 255.0
        with pytest.raises(
            EmulationError, match=rf"faults.cu:{line}: a global access of 4 bytes .* outside .*thread \(63, 0, 0\)"
        ):
            kernels.run("copy_from", 193)


def test_a_fault_does_not_outlive_its_report(kernels: Kernels) -> None:
    with pytest.raises(EmulationError, match="misaligned"):
        kernels.run("copy_float4_from", 1)
    assert kernels.run("reverse_right") == REVERSED


def test_variables_are_as_in_the_beginning_after_a_fault(kernels: Kernels) -> None:
    """A device's context ends with it."""
    assert [kernels.run("count_until")[0] for _ in range(3)] == [1.0, 2.0, 3.0]
    with pytest.raises(EmulationError, match="trap"):
        kernels.run("count_until", 4)
    assert kernels.run("count_until")[0] == 1.0


CAUGHT = [
    ("copy_float4_from", 1, r"faults.cu:\d+: a global access of 16 bytes at 0x\w+ is misaligned"),
    ("shared_beyond_end", 64, r"faults.cu:\d+: a shared access of 1 bytes at 0x440 is out of bounds"),
    ("shared_next", 1, r"faults.cu:\d+: a shared access of 4 bytes at 0x\w+ leads out of its array"),
    ("shared_next", 65, r"faults.cu:\d+: a shared access of 4 bytes at 0x\w+ leads out of its array"),
    ("deadlock", 0, r"deadlock: .*16 at a barrier at line \d+, 16 at a barrier at line \d+"),
    ("returned_early", 33, "deadlock: threads wait for each other: 33 at a barrier at line .*, 31 at its end"),
    ("shuffle_returned", 0, "lane 5 of the mask 0xffffffff has returned"),
    ("block_waits", 0, "a loop that does not end, or waits for a block"),
    ("bounded_launch", 65, "65 threads, where __launch_bounds__ allow 64"),
    ("much_shared", 50000, "50000 dynamic shared bytes, where 49152 are allowed"),
    ("copy_then_synchronize", 0, "cudaDeviceSynchronize: not allowed"),
    ("allocate", 0, "cudaMalloc: not allowed"),
]


@pytest.mark.parametrize(("name", "value", "message"), CAUGHT, ids=[name for name, *_ in CAUGHT])
def test_fault_is_caught(kernels: Kernels, name: str, value: int, message: str) -> None:
    ctypes.memset(kernels.target, 0, 4)
    with pytest.raises(EmulationError, match=message):
        kernels.run(name, value)


def test_a_barrier_after_other_threads_have_returned_is_caught_at_once(kernels: Kernels) -> None:
    kernels.emulator.set_order("descending")
    with pytest.raises(EmulationError, match="divergent barrier 0: 31 threads have returned"):
        kernels.run("returned_early", 33)


def test_what_is_within_the_limits_is_not_caught(kernels: Kernels) -> None:
    kernels.run("bounded_launch", 64)
    kernels.run("shared_beyond_end", 63)
    kernels.run("returned_early", 64)
    assert kernels.run("shared_next", 0)[:64] == [float(i + (i ^ 1)) for i in range(64)]


def test_dynamic_shared_memory_beyond_48_kib_needs_the_opt_in(kernels: Kernels) -> None:
    assert kernels.emulator.library.allow_shared(100_000) == 0
    kernels.run("much_shared", 100_000)
    kernels.emulator.set_device(DEVICES[75])
    kernels.emulator.library.allow_shared(100_000)
    with pytest.raises(EmulationError, match=r"100000 dynamic shared bytes .* where the device has 65536"):
        kernels.emulator.check()


def test_the_order_of_blocks_decides_who_writes_last(kernels: Kernels) -> None:
    def last(order: str, seed: int = 0) -> int:
        kernels.emulator.set_order(order, seed)
        kernels.run("last_block_writes")
        return ctypes.cast(kernels.target, ctypes.POINTER(ctypes.c_int))[0]

    assert (last("ascending"), last("descending")) == (6, 0)
    assert len({last("random", seed) for seed in range(20)}) > 2
    assert last("random", 7) == last("random", 7)


def test_the_record_names_every_call_and_replays_on_new_data(kernels: Kernels) -> None:
    with kernels.emulator.record() as recording:
        kernels.run("memset_then_copy", 5)
    memset, launch = recording.calls
    target = ctypes.addressof(kernels.target)
    assert memset == {"call": "memset", "stream": STREAM, "device": 0, "to": target, "bytes": 256, "value": 0}
    assert "copy" in launch.pop("kernel")
    where = {"stream": STREAM, "device": 0}
    assert launch == {
        "call": "launch",
        **where,
        "grid": [1, 1, 1],
        "block": [32, 1, 1],
        "shared_bytes": 0,
        "overlaps": False,
    }
    kernels.source[5] = 1000.0
    kernels.emulator.replay(recording)
    assert kernels.target[0] == 1000.0


# --- sanitizers, in processes of their own


def sanitized(sanitize: str, name: str, value: int = 0) -> subprocess.CompletedProcess[str]:
    library = build([SOURCE], sanitize=sanitize)
    script = f"""
import ctypes
from ptx_emulator.emulator import Emulator
from ptx_emulator.tests.test_faults import Kernels
kernels = Kernels(Emulator({str(library)!r}))
ctypes.memset(kernels.target, 0, 1024)
kernels.run({name!r}, {value})
"""
    environment = {
        **sanitizer_environment(sanitize),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def source_lines(*fragments: str) -> set[int]:
    text = SOURCE.read_text().splitlines()
    return {next(n for n, line in enumerate(text, 1) if fragment in line) for fragment in fragments}


RACES: Sequence[tuple[str, tuple[str, ...]]] = [
    ("reverse_wrong", ("s_values[threadIdx.x] = from[threadIdx.x];", "to[threadIdx.x] = s_values[255 - threadIdx.x];")),
    ("swap_wrong", ("to[threadIdx.x] = s_values[threadIdx.x ^ 1];",)),
    ("two_rounds_wrong", ("s_values[threadIdx.x] = from[threadIdx.x] + round;", "sum += s_values[255 - threadIdx.x];")),
    ("staged_without_barrier", ("s_stage[stage][threadIdx.x ^ 1];",)),
    ("last_block_writes", ("*to = blockIdx.x;",)),
    ("unfenced_sum", ("sum += partial[i];",)),
]


@pytest.mark.parametrize(("name", "lines"), RACES, ids=[name for name, _ in RACES])
def test_thread_sanitizer_reports_the_race_at_its_line(name: str, lines: tuple[str, ...]) -> None:
    result = sanitized("thread", name)
    assert "WARNING: ThreadSanitizer: data race" in result.stderr, result.stderr[-2000:]
    named = {int(number) for number in re.findall(r"faults\.cu:(\d+)", result.stderr)}
    assert source_lines(*lines) <= named, result.stderr[:3000]


@pytest.mark.parametrize("name", ["reverse_right", "swap_right", "two_rounds_right", "staged_right", "fenced_sum"])
def test_thread_sanitizer_is_silent_on_the_right_kernel(name: str) -> None:
    result = sanitized("thread", name)
    assert (result.returncode, result.stderr) == (0, "")


def test_address_sanitizer_catches_an_off_by_one() -> None:
    result = sanitized("address", "copy_from", 193)
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr, result.stderr[-2000:]
    assert f"faults.cu:{min(source_lines('void copy('))}" in result.stderr


@pytest.mark.parametrize("name", ["reverse_right", "staged_right", "copy_from"])
def test_address_sanitizer_is_silent_on_the_right_kernel(name: str) -> None:
    result = sanitized("address", name, 192)
    assert (result.returncode, result.stderr) == (0, "")
