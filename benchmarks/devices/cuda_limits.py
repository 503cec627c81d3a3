"""Limits of a GPU, measured between the kernels by those of torch: reading DRAM, and a dense product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpus import GPUS
from benchmarks.limits import DRAM, DRAM_PEAK, MATMUL

# A square product of this size has the throughput of larger ones.
_MATMUL_SIZE = 4096
# Of the memory that is read: many times what the caches hold.
_MEMORY_BYTES, _CACHES = 256 << 20, 4

# The names of the data sheets in `benchmarks.gpus`, by those of the driver.
_DATA_SHEETS = {
    "NVIDIA A100-SXM4-80GB": "A100 80 GB",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H200": "H200",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA B200": "B200",
}


class CudaLimits:
    """Measures the limits.

    Args:
        seconds_of: times a call on the device.
        place: the device.
        dtype: of the product.
        dram_peak: bytes per second, by `dram_peak`; None if nobody says.
        cache_bytes: what its caches hold.
    """

    def __init__(
        self,
        seconds_of: Callable[[Callable[[], object]], float],
        place: torch.device,
        dtype: torch.dtype,
        dram_peak: float | None,
        cache_bytes: int,
    ) -> None:
        self._seconds_of = seconds_of
        self._peak = {} if dram_peak is None else {DRAM_PEAK: dram_peak}
        floats = max(_MEMORY_BYTES, _CACHES * cache_bytes) // 4
        self._memory = torch.zeros(floats, device=place)
        self._copy = torch.empty_like(self._memory)
        # Not constants, by which the clock would be higher.
        self._operand = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, device=place).to(dtype)

    def measure(self) -> dict[str, float]:
        """Bytes per second for `DRAM`, by the faster of a sum and a copy, and operations per second for `MATMUL`."""
        nbytes = self._memory.nbytes
        reading = nbytes / self._seconds_of(self._memory.sum)
        copying = 2 * nbytes / self._seconds_of(lambda: self._copy.copy_(self._memory))
        operations = 2 * self._operand.shape[0] ** 3
        matmul = operations / self._seconds_of(lambda: self._operand @ self._operand)
        return {DRAM: max(reading, copying), MATMUL: matmul, **self._peak}


def dram_peak(properties: Any) -> float | None:
    """Bytes per second of the DRAM by its data sheet, else by its clock and width, if this torch tells them.

    Args:
        properties: of `torch.cuda.get_device_properties`.
    """
    sheet = _DATA_SHEETS.get(properties.name)
    for gpu in GPUS:
        if gpu.name == sheet:
            return 1e9 * gpu.dram_gb_per_s
    clock_khz, width_bits = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    # Two transfers a clock.
    return 2 * 1e3 * clock_khz * width_bits / 8 or None
