"""Times of gptq_gemm for 1 to 2048 tokens: what the library chooses, each algorithm, Triton, and cuBLAS.

What it chooses is timed twice: as it is, and with launches that overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case, Weight, activations
from benchmarks.peers import exllama_cuda
from benchmarks.peers.exllama_cuda import ALGORITHMS, AUTO, OVERLAPPING
from benchmarks.peers.peer import Layer
from tools.gpu_hour.clocks import Clock, GraphClock, HostClock, copies
from tools.gpu_hour.part import Options
from tools.gpu_hour.records import Result, Table

TOKENS = tuple(2**power for power in range(12))
_CASE = Case(4096, 4096)
_DRY_CASE = Case(256, 128)
BLAS, TRITON = "cuBLAS", "triton"
Prepare = Callable[[], Layer]


def run(what: str, options: Options) -> Result:
    """Time a weight whose rows are in order, or in an activation order."""
    clock: Clock = HostClock() if options.dry else GraphClock()
    case = _DRY_CASE if options.dry else _CASE
    case = Case(case.K, case.N, act_order=what == "act_order")
    missing: list[str] = []
    times: dict[int, dict[str, float]] = {M: {} for M in ((1, 16) if options.dry else TOKENS)}
    with torch.inference_mode():
        for name, M, seconds in _times(clock, case, list(times), missing):
            times[M][name] = seconds
            print(f"{name}, M={M}: {1e6 * seconds:.1f} us", flush=True)
    table = table_of(case, times)
    data = {
        "case": str(case),
        "microseconds": {M: {name: 1e6 * s for name, s in row.items()} for M, row in times.items()},
    }
    lines = [*missing, *slow_choices(times)]
    not_walked = ["graphs: the host's clock stands in their place"] if options.dry else []
    has_ours = options.dry or any(AUTO in row for row in times.values())
    return Result("passed" if has_ours else "failed", f"{case}, fp16", lines, [table], data, not_walked)


def _times(clock: Clock, case: Case, tokens: Sequence[int], missing: list[str]) -> Iterator[tuple[str, int, float]]:
    """Every kernel for every number of tokens; what cannot be timed is missing, with its error."""
    weight = Weight(case).to(clock.place)
    for name, prepare in kernels(weight).items():
        try:
            layer = prepare()
            layers = [layer, *(prepare() for _ in range(copies(clock, layer.nbytes) - 1))]
        except Exception as error:
            missing.append(f"{name} is not timed: {_told(error)}")
            continue
        for M in tokens:
            x = activations(M, case.K).to(clock.place)
            try:
                seconds = clock.seconds([partial(layer.run, layer.take(x)) for layer in layers])
            except Exception as error:
                missing.append(f"{name}, M={M} is not timed: {_told(error)}")
                continue
            yield name, M, seconds


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def kernels(weight: Weight) -> Mapping[str, Prepare]:
    """What is timed, by name; each returns a layer with memory of its own."""
    ours = {name: partial(exllama_cuda.gemm, weight, name, torch.float16) for name in (AUTO, OVERLAPPING, *ALGORITHMS)}
    triton = {TRITON: partial(exllama_cuda.triton_gemm, weight, torch.float16)}
    return {BLAS: lambda: _blas(weight.dense.half()), **ours, **triton}


def _blas(dense: Tensor) -> Layer:
    own = dense.clone()
    return Layer(take=lambda x: x, run=lambda x: x @ own, give=lambda out: out, nbytes=own.nbytes)


def table_of(case: Case, times: Mapping[int, Mapping[str, float]]) -> Table:
    """Microseconds by tokens and kernel, and how the library's choice compares with cuBLAS."""
    names = [
        name for name in (BLAS, AUTO, OVERLAPPING, *ALGORITHMS, TRITON) if any(name in row for row in times.values())
    ]
    rows = []
    for M, row in times.items():
        ratio = f"{row[AUTO] / row[BLAS]:.2f}" if AUTO in row and BLAS in row else ""
        rows.append([str(M), *(f"{1e6 * row[name]:.1f}" if name in row else "" for name in names), ratio])
    return Table(f"Microseconds of a call, {case}, fp16", ["M", *names, f"{AUTO} / {BLAS}"], rows)


def slow_choices(times: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Where an algorithm is faster than what the library chose, by more than a twentieth."""
    lines = []
    for M, row in times.items():
        named_ones = {name: row[name] for name in ALGORITHMS if name in row}
        best = min(named_ones, key=lambda name: named_ones[name], default="")
        if AUTO in row and best and row[AUTO] > 1.05 * row[best]:
            lines.append(f"M={M}: {best} is faster than the choice, {row[AUTO] / row[best]:.2f} times")
    return lines
