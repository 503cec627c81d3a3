"""An emulated CUDA device in this process: a library made by `build`, its settings, its record and its faults."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptx_emulator.toolchain import (
    build,
    compile_kernel,
    kernel_names,
    reasons_against,
    sanitizer_environment,
    translate_all,
)

__all__ = [
    "DEVICES",
    "Device",
    "EmulationError",
    "Emulator",
    "Recording",
    "build",
    "reasons_against",
    "sanitizer_environment",
    "translate_all",
]

ORDERS = ("ascending", "descending", "random")


class EmulationError(RuntimeError):
    """A kernel or a runtime call did what a device would punish, or what a captured graph forbids."""


@dataclass(frozen=True)
class Device:
    """What the CUDA runtime says of the device. Sources: CUDA programming guide, table of compute capabilities; data
    sheets for the clocks.
    """

    cc_major: int
    cc_minor: int
    sm_count: int
    shared_per_block_optin: int
    shared_per_sm: int
    l2_bytes: int
    threads_per_sm: int
    blocks_per_sm: int
    clock_khz: int
    memory_khz: int
    memory_bits: int
    shared_per_block: int = 48 << 10
    registers_per_sm: int = 65536


DEVICES = {
    75: Device(7, 5, 40, 64 << 10, 64 << 10, 4 << 20, 1024, 16, 1590000, 5001000, 256),  # T4
    80: Device(8, 0, 108, 163 << 10, 164 << 10, 40 << 20, 2048, 32, 1410000, 1593000, 5120),  # A100
    89: Device(8, 9, 128, 99 << 10, 100 << 10, 72 << 20, 1536, 24, 2520000, 10501000, 384),  # RTX 4090
    90: Device(9, 0, 132, 227 << 10, 228 << 10, 50 << 20, 2048, 32, 1980000, 2619000, 5120),  # H100
}


@dataclass
class Recording:
    """The runtime calls between the begin and the end of `Emulator.record`, in order.

    Each is a dict with `call` (launch, memset or memcpy), `stream` and `device`. A launch has `kernel`, `grid`,
    `block`, `shared_bytes`, and whether it `overlaps`; the others have `to`, `bytes` and `value` or `from`.
    """

    index: int
    calls: list[dict[str, Any]] = field(default_factory=list)


_Loader = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)


class _Kernels:
    """Loads the kernels of a library when they are first launched; like a library, it lives as long as the process."""

    of_library: dict[Path, _Kernels] = {}

    def __init__(self, path: Path, library: ctypes.CDLL) -> None:
        self.path = path
        self.error: Exception | None = None
        self.callback = _Loader(self.load)
        library.emu_set_loader(self.callback)

    def load(self, name: bytes) -> int:
        try:
            ctypes.CDLL(str(compile_kernel(self.path, name.decode())))
        except Exception as error:  # it cannot pass through the C++ that called; Emulator.check raises it
            self.error = error
            return 0
        return 1


class Emulator:
    """The device of one library, in its initial state. A library has one device; two libraries share nothing."""

    def __init__(self, library: Path | str, device: Device | None = None) -> None:
        self.path = Path(library)
        self.library = ctypes.CDLL(str(library))
        if self.path not in _Kernels.of_library:
            _Kernels.of_library[self.path] = _Kernels(self.path, self.library)
        for name in ("emu_fault", "emu_record_end"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.emu_record_count.restype = ctypes.c_longlong
        self.library.emu_reset()
        self.set_device(device or DEVICES[80])
        self.set_stream(0)

    def _set(self, name: str, value: int) -> None:
        if not self.library.emu_set(name.encode(), ctypes.c_longlong(value)):
            raise ValueError(f"no setting {name!r}")

    def set_device(self, device: Device) -> None:
        """The device that the host code sees."""
        for name, value in vars(device).items():
            self._set(name, value)

    def set_order(self, order: str, seed: int = 0) -> None:
        """The order of blocks, and of the threads in each: "ascending", "descending" or "random"."""
        self._set("order", ORDERS.index(order))
        self._set("seed", seed)

    def set_only_last_block(self, only: bool) -> None:
        """Of every launch run the last block alone: the offsets of a problem that is too large to compute."""
        self._set("only_last_block", only)

    def set_mma(self, *, truncates: bool = False, flushes_subnormals: bool = False) -> None:
        """How mma.sync sums, and whether subnormal fp16 operands count as zero.

        It rounds to nearest once for each product in the order of k, or `truncates` as tensor cores do.
        """
        self._set("mma_truncates", truncates)
        self._set("mma_flushes_subnormals", flushes_subnormals)

    def set_stream(self, stream: int, *, is_capturing: bool = False, capture: int = 1) -> None:
        """What aoti_torch_get_current_cuda_stream says, and whether that is captured, by which capture."""
        self._set("current_stream", stream)
        self._set("is_capturing", is_capturing)
        self._set("capture", capture)

    def set_graphs_keep_objects(self, keep: bool) -> None:
        """Whether cudaGraphRetainUserObject is supported."""
        self._set("no_graph_keeps_objects", not keep)

    def destroy_graph(self, capture: int) -> None:
        """As when the graph of a capture is destroyed: it gives up what it has retained."""
        self.library.emu_destroy_graph(ctypes.c_longlong(capture))

    def set_current_device(self, index: int) -> None:
        """As the host thread would by cudaSetDevice; there are two devices, alike."""
        self.library.cudaSetDevice(ctypes.c_int(index))
        self.check()

    def begin_on_device(self, index: int) -> None:
        """As a process whose current device this is, and which has used no device so far."""
        self.library.emu_begin_on(ctypes.c_int(index))

    @property
    def current_device(self) -> int:
        """Torch's current device, which is that of cudaGetDevice unless torch puts off a device without a context."""
        index: int = self.library.emu_torch_device()
        return index

    @property
    def devices_with_context(self) -> set[int]:
        """The devices that the process has made a context on: those it made current by cudaSetDevice, or used."""
        return {index for index in range(2) if self.library.emu_has_context(ctypes.c_int(index))}

    @contextmanager
    def only(self, ranges: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Kernels may touch these (address, bytes) of global memory alone, and the module's own variables."""
        flat = [value for address, count in ranges for value in (address, address + count)]
        self.library.emu_set_ranges((ctypes.c_uint64 * len(flat))(*flat), ctypes.c_uint64(len(ranges)))
        self._set("check_ranges", True)
        try:
            yield
        finally:
            self._set("check_ranges", False)

    @property
    def kernels(self) -> list[str]:
        """The names of the .entry functions."""
        return kernel_names(self.path)

    def check(self) -> None:
        """Raises EmulationError if there was a fault since the last check, or why a kernel could not be loaded."""
        text: bytes = self.library.emu_fault()
        message = text.decode(errors="replace")
        self.library.emu_clear_fault()
        kernels = _Kernels.of_library[self.path]
        error, kernels.error = kernels.error, None
        if error is not None:
            raise error
        if message:
            raise EmulationError(message)

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Records the runtime's calls, and raises EmulationError at the end if there was a fault."""
        self.check()
        recording = Recording(self.library.emu_record_count())
        self.library.emu_record_begin()
        try:
            yield recording
        finally:
            recording.calls = json.loads(self.library.emu_record_end())
            self.check()  # also where host code has thrown at a fault: what the fault was says more

    def replay(self, recording: Recording) -> None:
        """Performs the recorded calls again on the same addresses, as the replay of a CUDA graph does."""
        self.library.emu_replay(ctypes.c_longlong(recording.index))
        self.check()

    def launch(
        self, kernel: str, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        """Launches a kernel without host code; `arguments` are ctypes values, or pointers as int."""
        values = [
            a if isinstance(a, ctypes._SimpleCData | ctypes.Structure | ctypes.Array) else ctypes.c_uint64(a)
            for a in arguments
        ]
        pointers = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(value) for value in values))
        extents = [(ctypes.c_uint32 * 3)(*([*extent, 1, 1][:3])) for extent in (grid, block)]
        self.library.emu_launch(
            kernel.encode(),
            *extents,
            pointers,
            ctypes.c_uint32(len(values)),
            ctypes.c_uint64(shared_bytes),
            ctypes.c_uint64(0),
        )
        self.check()
