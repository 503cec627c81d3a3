"""A GPU: our kernels by algorithm and by Triton, each call timed by events with cold caches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.cases import Weight
from benchmarks.conformance import Gate
from benchmarks.devices.cuda_bounds import TRITON, cuda_gate
from benchmarks.devices.cuda_limits import CudaLimits, dram_peak
from benchmarks.devices.device import DeviceError, OurKernel
from benchmarks.devices.events import Event, EventTimer, Queue
from benchmarks.peers import CUDA_PEERS, exllama_cuda
from benchmarks.peers.peer import Peer
from benchmarks.results import OURS, LimitRule, by_roofline
from benchmarks.timing import Timer
from exllama_ops.backends.triton import tiles

# What a flush writes, in caches.
_FLUSH = 2


class Gpu(Queue, Protocol):
    """All that is asked of a GPU: where tensors lie, what it is, and its queue of work."""

    place: torch.device
    properties: Any


class TorchGpu:
    """The current CUDA device.

    Raises:
        DeviceError: there is none.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise DeviceError("--device cuda: torch sees no CUDA device")
        self.place = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.place)
        self._flushed = torch.empty(_FLUSH * self.properties.L2_cache_size, dtype=torch.uint8, device=self.place)

    def event(self) -> Event:
        """A new event, which takes the time."""
        return torch.cuda.Event(enable_timing=True)

    def delay(self, cycles: int) -> None:
        """Keep the device busy."""
        torch.cuda._sleep(cycles)

    def flush(self) -> None:
        """Write more than the caches hold."""
        self._flushed.zero_()


class Cuda:
    """A GPU.

    Args:
        gpu: the device.
        dtype: of the dense product that is its limit.
    """

    peers: Sequence[Peer] = CUDA_PEERS
    threads = 1
    rotates = False
    limit_rule: LimitRule = staticmethod(by_roofline)

    def __init__(self, gpu: Gpu, dtype: torch.dtype) -> None:
        self.place = gpu.place
        self._events = EventTimer(gpu)
        self.timer: Timer = self._events
        self._properties = gpu.properties
        self._dtype = dtype

    def open(self) -> None:
        """Build our kernels if need be.

        Raises:
            DeviceError: none of them can run.
        """
        native, triton = exllama_cuda.reasons_against_native(), exllama_cuda.reasons_against_triton()
        if native and triton:
            raise DeviceError(f"no kernel of ours runs here: native: {'; '.join(native)}; Triton: {'; '.join(triton)}")
        peak, cache_bytes = dram_peak(self._properties), self._properties.L2_cache_size
        self._limits = CudaLimits(self._events.seconds, self.place, self._dtype, peak, cache_bytes)

    def admit(self, peer: Peer) -> None:
        """Every peer: there is nothing to be held to."""

    def gate(self, weight: Weight, x: Tensor, grad: Tensor | None, tokens: Sequence[int]) -> Gate:
        """The bounds of the algorithms and of Triton, computed on the host."""
        return cuda_gate(weight, x, grad, tokens, tiles.device_of(self.place))

    def kernels(self, weight: Weight, gate: Gate, dtype: torch.dtype) -> Sequence[OurKernel]:
        """The library's own choice, each of its algorithms, Triton; and the gradient of x by both."""

        def gemm(name: str, prepare: partial[Any]) -> OurKernel:
            return OurKernel(f"{OURS} {name}", "gptq_gemm", "float", prepare, partial(gate.check, precision=name))

        algorithms = (exllama_cuda.AUTO, *exllama_cuda.ALGORITHMS)
        return [
            *(gemm(name, partial(exllama_cuda.gemm, weight, name, dtype)) for name in algorithms),
            gemm(TRITON, partial(exllama_cuda.triton_gemm, weight, dtype)),
            *(
                OurKernel(f"{OURS} {name}", "gptq_gemm_dx", "float", partial(prepare, weight, dtype), gate.check_dx)
                for name, prepare in (("dx", exllama_cuda.gemm_dx), (f"{TRITON} dx", exllama_cuda.triton_gemm_dx))
            ),
        ]

    def measure_limits(self) -> Mapping[str, float]:
        """DRAM and a dense product."""
        return self._limits.measure()

    def machine(self, packages: Iterable[str]) -> dict[str, Any]:
        """GPU, driver and software."""
        return machine.gpu_description(self._properties, packages)

    @property
    def label(self) -> str:
        """The GPU's name, as files have names."""
        return re.sub(r"[^a-z0-9]+", "-", self._properties.name.lower()).strip("-")
