"""GPUs by their data sheets. Of each compute capability csrc/cuda/rates.h has the figures of the first one here."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """One GPU, at its boost clock.

    Attributes:
        lanes: instructions of a lane that an SM issues in a cycle.
        floats: multiply-adds or sums of float32 that an SM does in a cycle.
        mma: multiply-adds of 16 bits with float32 sums that an SM does in a cycle by mma.sync. GeForce cards have half
            the rate of workstation cards.
        blas: the same by the chip's own instructions, which need another layout of W on H100 and B200.
    """

    arch: int
    name: str
    sms: int
    ghz: float
    dram_gb_per_s: float
    l2_mib: int
    lanes: int
    floats: int
    mma: int
    blas: int

    @property
    def dram_bytes_per_cycle(self) -> float:
        """Bytes for one SM."""
        return self.dram_gb_per_s / (self.sms * self.ghz)

    @property
    def is_first(self) -> bool:
        """Whether it stands for its compute capability."""
        return next(gpu for gpu in GPUS if gpu.arch == self.arch) is self


GPUS = (
    Gpu(60, "P100", 56, 1.48, 732, 4, 64, 64, 0, 64),
    Gpu(61, "P40", 30, 1.53, 346, 3, 128, 128, 0, 128),
    Gpu(70, "V100", 80, 1.53, 900, 6, 128, 64, 0, 512),
    Gpu(75, "T4", 40, 1.59, 320, 4, 128, 64, 512, 512),
    Gpu(80, "A100 80 GB", 108, 1.41, 2039, 40, 128, 64, 1024, 1024),
    Gpu(86, "RTX 3090", 82, 1.70, 936, 6, 128, 128, 256, 256),
    Gpu(89, "RTX 4090", 128, 2.52, 1008, 72, 128, 128, 256, 256),
    Gpu(90, "H100 SXM", 132, 1.83, 3350, 50, 128, 128, 1024, 2048),
    Gpu(90, "H200", 132, 1.83, 4800, 50, 128, 128, 1024, 2048),
    Gpu(100, "B200", 148, 1.85, 8000, 126, 128, 128, 1024, 4096),
    Gpu(120, "RTX 5090", 170, 2.41, 1792, 96, 128, 128, 256, 256),
)


def gpu_named(name: str) -> Gpu:
    """The GPU with this name, or the first whose name begins so.

    Raises:
        ValueError: there is none.
    """
    for gpu in GPUS:
        if gpu.name.lower().startswith(name.lower()):
            return gpu
    raise ValueError(f"no GPU of benchmarks/gpus.py is called {name!r}: it has {', '.join(gpu.name for gpu in GPUS)}")
