"""The CPU: our kernels by precision, timed in bursts on the host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.cases import Weight
from benchmarks.conformance import Gate
from benchmarks.devices.device import OurKernel
from benchmarks.limits import Limits, LimitsError
from benchmarks.peers import PEERS, exllama
from benchmarks.peers.peer import Peer, Unsupported
from benchmarks.results import OURS, LimitRule, by_tokens
from benchmarks.timing import HostTimer, Timer
from exllama_ops.backends.cpu import BACKEND


class Cpu:
    """Some cores of this machine.

    Args:
        threads: that every kernel uses.
        held: the value of --isa; peers that do not obey it are refused.
    """

    peers: Sequence[Peer] = PEERS
    place = torch.device("cpu")
    rotates = True
    limit_rule: LimitRule = staticmethod(by_tokens)

    def __init__(self, threads: int, held: str = "native") -> None:
        self.threads = threads
        self.timer: Timer = HostTimer()
        self._held = held

    def open(self) -> None:
        """Build our kernels if need be.

        Raises:
            LimitsError: they cannot be used, or the limits of this CPU cannot be measured.
        """
        torch.set_num_threads(self.threads)
        self._isa = _isa_in_use()
        self._limits = Limits(self._isa, self.threads)

    def admit(self, peer: Peer) -> None:
        """Refuse a peer that cannot be held to the instruction set."""
        if self._held != "native" and self._held not in peer.held:
            raise Unsupported(f"cannot be held to {self._held}")

    def gate(self, weight: Weight, x: Tensor, grad: Tensor | None, tokens: Sequence[int]) -> Gate:
        """The bounds of the precisions, which do not depend on the number of tokens."""
        return Gate(weight, x, grad)

    def kernels(self, weight: Weight, gate: Gate, dtype: torch.dtype) -> Sequence[OurKernel]:
        """Every precision of gptq_gemm; gptq_gemm_dx has one."""
        gemms = [
            OurKernel(
                f"{OURS} {precision}",
                "gptq_gemm",
                kind,
                partial(exllama.gemm, weight, precision, dtype),
                partial(gate.check, precision=precision),
            )
            for precision, kind in exllama.PRECISIONS.items()
        ]
        dx = OurKernel(f"{OURS} dx", "gptq_gemm_dx", "float", partial(exllama.gemm_dx, weight, dtype), gate.check_dx)
        return [*gemms, dx]

    def measure_limits(self) -> Mapping[str, float]:
        """DRAM reading and the peaks of multiply-and-add."""
        return self._limits.measure()

    def machine(self, packages: Iterable[str]) -> dict[str, Any]:
        """CPU, cores, instruction set and software."""
        return machine.description(self.threads, self._isa, self._held, packages)

    @property
    def label(self) -> str:
        """Threads, and the instruction set that all are held to."""
        held = "" if self._held == "native" else f"{self._held}-"
        return f"{held}{self.threads}thread{'' if self.threads == 1 else 's'}"


def _isa_in_use() -> str:
    """The instruction set of our kernels; builds them if need be."""
    BACKEND.build()
    isa = None if BACKEND.library is None else BACKEND.library.isa_in_use()
    if isa is None:
        reasons = "; ".join(BACKEND.failure) or "EXLLAMA_OPS_CPU_ISA names an instruction set that this CPU lacks"
        raise LimitsError(f"the native CPU kernels are not in use: {reasons}")
    return isa
