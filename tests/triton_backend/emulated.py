"""A device for Triton that is an emulated sm_80: real launches of compiled kernels, on CPU tensors.

What Triton asks of a driver is little: a target, a stream, and a launcher that is given the grid and the arguments. The
PTX that comes with the machine code of a kernel runs in the emulator.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from exllama_ops.backends.triton import tiles
from ptx_emulator.emulator import DEVICES, Emulator, build

ARCH = 80
# What plans are made for: few processors, so that small weights are split.
A100 = tiles.Device("sm80", 4)


class _Utils:
    """Where a driver loads machine code and says what a device has."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 163 << 10, "multiprocessor_count": 4, "warpSize": 32}

    @staticmethod
    def load_binary(name: str, machine_code: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024


class EmulatedDriver:
    """What Triton asks of a driver.

    Attributes:
        launches: the names of the kernels that were launched.
        truncates: whether matrix instructions cut sums off.
        only_last_block: whether of a launch the last block alone runs.
        order: in which the blocks run, and its seed.
    """

    def __init__(self) -> None:
        self.utils = _Utils()
        self.launches: list[str] = []
        self.truncates = False
        self.only_last_block = False
        self.order = ("ascending", 0)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Launches a kernel with the signature of its source."""
        names = list(source.fn.arg_names)
        types = {"i32": ctypes.c_int32, "i64": ctypes.c_int64}
        emulator: Emulator | None = None

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            nonlocal emulator
            _stream, _function, _packed, _metadata, _enter, _exit, *args = rest
            if emulator is None:
                cached = triton.runtime.cache.get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
                assert cached is not None
                emulator = Emulator(build(ptx_files=[Path(cached)]))
                # Triton's own loader asks for all the shared memory that a block may have.
                a100 = DEVICES[ARCH]
                emulator.set_device(replace(a100, shared_per_block=a100.shared_per_block_optin))
            emulator.set_mma(truncates=self.truncates)
            emulator.set_only_last_block(self.only_last_block)
            emulator.set_order(*self.order)
            values: list[Any] = []
            ranges = []

            def add(argument: Any, kind: Any, place: tuple[int, ...]) -> None:
                if isinstance(argument, tuple):
                    for i, one in enumerate(argument):
                        add(one, kind[i], (*place, i))
                elif isinstance(argument, Tensor):
                    values.append(argument.data_ptr())
                    ranges.append((argument.data_ptr(), argument.numel() * argument.element_size()))
                elif kind in types and place not in source.constants:
                    values.append(types[kind](argument))

            for i, (name, argument) in enumerate(zip(names, args, strict=True)):
                add(argument, source.signature[name], (i,))
            self.launches.append(metadata.name)
            with emulator.only([r for r in ranges if r[1]]):
                emulator.launch(metadata.name, [x, y, z], [32 * metadata.num_warps], [*values, 0, 0], metadata.shared)

        return launch


@functools.cache
def _device() -> EmulatedDriver:
    """One in a process, since Triton keeps each compiled kernel with the launcher that it first got."""
    return EmulatedDriver()


@contextmanager
def emulated_device() -> Iterator[EmulatedDriver]:
    """Have Triton launch on the emulated device."""
    device = _device()
    device.launches.clear()
    device.truncates = device.only_last_block = False
    device.order = ("ascending", 0)
    driver.set_active(device)
    try:
        yield device
    finally:
        driver.set_active(None)  # the next to ask gets the default
