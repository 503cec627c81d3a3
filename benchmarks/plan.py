"""Every kernel on one weight: prepared copies, checked, then timed for each number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DX_TOKENS, Case, Weight, activations
from benchmarks.conformance import ConformanceError, relative_error
from benchmarks.devices.device import Device, OurKernel
from benchmarks.peer_class import class_of, probe
from benchmarks.peers.peer import Kind, Layer, Peer, Unsupported
from benchmarks.quiet import Watch
from benchmarks.results import Measurement, Timed
from benchmarks.timing import BURST_TOKENS, Runner, interleave
from exllama_ops.cli.output import say

# Copies of a weight are used in turns; together they are as much as this, and more than the caches keep.
ROTATION_BYTES = 256 << 20
# Above as many tokens two copies take turns. A burst is one call, and between two calls of a kernel the limits and the
# other kernels read more than the rotation holds.
ROTATED_TOKENS = BURST_TOKENS
# Rows of which the error of a peer is taken.
ERROR_ROWS = 16

MeasureLimits = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Budget:
    """How long a measurement goes on: for as many seconds, and at least as many rounds."""

    seconds: float
    rounds: int


@dataclass(frozen=True)
class Missing:
    """A kernel that was not measured, and why."""

    name: str
    case: Case
    tokens: int | None
    error: str


@dataclass(frozen=True)
class _Kernel:
    """A kernel with copies of its weight."""

    name: str
    # None for a peer, whose class is found for each number of tokens.
    kind: Kind | None
    layers: Sequence[Layer]
    # Raises ConformanceError; None for a peer, whose error is only shown.
    check: Callable[[Tensor], None] | None = None


class Plan:
    """All measurements of one weight.

    Args:
        case: the weight.
        tokens: values of M.
        peers: the kernels beside ours.
        device: where they run.
        dtype: of x for our kernels.
        say: takes a line of progress.
    """

    def __init__(
        self,
        case: Case,
        tokens: Sequence[int],
        peers: Sequence[Peer],
        *,
        device: Device,
        dtype: torch.dtype = torch.float16,
        say: Callable[[str], None] = say,
    ) -> None:
        self.case = case
        self.missing: list[Missing] = []
        self._say = say
        self._tokens = tokens
        say(f"{case}: preparing")
        weight = Weight(case)
        self._x = activations(max(tokens), case.K).to(dtype)
        self._dx_tokens = [M for M in tokens if M in DX_TOKENS]
        self._grad = activations(max(self._dx_tokens), case.N, seed=2).to(dtype) if self._dx_tokens else None
        gate = device.gate(weight, self._x, self._grad, tokens)
        self._dense = weight.dense
        self._device = device
        placed = weight.to(device.place)
        ours = device.kernels(placed, gate, dtype)
        self._gemms = self._prepared(kernel for kernel in ours if kernel.op == "gptq_gemm")
        self._gemms += filter(None, (self._peer(peer, placed) for peer in peers))
        self._dxs = self._prepared(kernel for kernel in ours if kernel.op == "gptq_gemm_dx")

    def measurements(self, measure_limits: MeasureLimits, budget: Budget) -> Iterator[Measurement]:
        """Time everything, one number of tokens after the other.

        Args:
            measure_limits: as in `benchmarks.timing.interleave`.
            budget: of each number of tokens.

        Raises:
            ConformanceError: one of our results is wrong. Nothing is timed with it.
        """
        for M in self._tokens:
            yield self._measure("gptq_gemm", self._gemms, self._x[:M], measure_limits, budget)
            if M in self._dx_tokens and self._grad is not None:
                yield self._measure("gptq_gemm_dx", self._dxs, self._grad[:M], measure_limits, budget)

    def _prepared(self, kernels: Iterable[OurKernel]) -> list[_Kernel]:
        prepared = []
        for kernel in kernels:
            try:
                layers = self._copies(kernel.prepare)
                prepared.append(_Kernel(kernel.name, kernel.kind, layers, kernel.check))
            except Unsupported as error:
                self._miss(kernel.name, None, error)
        return prepared

    def _peer(self, peer: Peer, weight: Weight) -> _Kernel | None:
        try:
            self._device.admit(peer)
            return _Kernel(peer.name, None, self._copies(lambda: peer.prepare(weight, self._device.threads)))
        except Exception as error:
            self._miss(peer.name, None, error)
            return None

    def _copies(self, prepare: Callable[[], Layer]) -> list[Layer]:
        first = prepare()
        if not self._device.rotates:
            return [first]
        # At least two: one alone would stay where it is.
        count = max(2, -(-ROTATION_BYTES // first.nbytes))
        return [first, *(prepare() for _ in range(count - 1))]

    def _miss(self, name: str, M: int | None, error: Exception) -> None:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        where = f"{self.case}" if M is None else f"{self.case}, M={M}"
        self._say(f"{where}: {name} is not measured: {text}")
        self.missing.append(Missing(name, self.case, M, text))

    def _measure(
        self, op: str, kernels: Sequence[_Kernel], x: Tensor, measure_limits: MeasureLimits, budget: Budget
    ) -> Measurement:
        M = x.shape[0]
        self._say(f"{self.case}: {op}, M={M}")
        exact = lru_cache(maxsize=1)(partial(_exact, op, x))  # which most kernels share
        runners: list[Runner] = []
        ready: list[tuple[_Kernel, Kind, float]] = []
        for kernel in kernels:
            try:
                layers = kernel.layers if M <= ROTATED_TOKENS else kernel.layers[:2]
                inputs = [layer.take(x.to(self._device.place)) for layer in layers]
                error = self._error(kernel, inputs[0], exact)
                kind = kernel.kind or self._found_class(kernel.layers[0], M)
                calls = [partial(layer.run, given) for layer, given in zip(layers, inputs, strict=True)]
                runner = Runner(kernel.name, calls, kernel.layers[0].enter)
                # Some libraries compile a kernel for each M at a layer's first call.
                self._device.timer.warm_up(runner, M)
            except ConformanceError:
                raise
            except Exception as reason:
                self._miss(kernel.name, M, reason)
                continue
            runners.append(runner)
            ready.append((kernel, kind, error))
        watch = Watch()
        samples = interleave(
            runners,
            measure_limits,
            tokens=M,
            seconds=budget.seconds,
            rounds=budget.rounds,
            timer=self._device.timer,
        )
        timed = [
            Timed(kernel.name, kind, error, kernel.layers[0].nbytes, samples[kernel.name])
            for kernel, kind, error in ready
        ]
        load = watch.look([sample for kernel in timed for sample in kernel.samples])
        return Measurement(op, self.case.K, self.case.N, M, timed, self._device.limit_rule, load)

    def _error(self, kernel: _Kernel, given: Any, exact: Callable[[Tensor], Tensor]) -> float:
        """The relative error in some rows, after the check of all of them."""
        layer = kernel.layers[0]
        out = _product(layer, given)
        if kernel.check is not None:
            kernel.check(out)
        return relative_error(out[_rows(out.shape[0])], exact(self._held(layer)))

    def _found_class(self, peer: Layer, M: int) -> Kind:
        """The class of a peer for as many tokens; it may have another kernel for more."""
        x = probe(M, self.case.K)
        rows = _rows(M)
        return class_of(_product(peer, peer.take(x.to(self._device.place)))[rows], x[rows], self._held(peer))

    def _held(self, layer: Layer) -> Tensor:
        return self._dense if layer.dense is None else layer.dense.cpu()


def _product(layer: Layer, given: Any) -> Tensor:
    """The product of what a layer took, on the host."""
    layer.enter()
    return layer.give(layer.run(given)).cpu()


def _exact(op: str, x: Tensor, dense: Tensor) -> Tensor:
    """The rows of a product of which errors are taken, in float64."""
    return x[_rows(x.shape[0])].double() @ (dense.t() if op == "gptq_gemm_dx" else dense).double()


def _rows(M: int) -> Tensor:
    """Rows of which errors are taken, the last one among them."""
    return torch.linspace(0, M - 1, min(ERROR_ROWS, M)).long()
