"""Turns samples into numbers: times, percent of the limits, ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.limits import DRAM, DRAM_PEAK, MATMUL
from benchmarks.peers.peer import Kind
from benchmarks.quiet import Load
from benchmarks.timing import Sample, Spread

OURS = "exllama_ops"
# What a precision of ours is compared with: the peers of a class, or float peers with a smaller error than this.
Rivals = Literal["float", "int8", "exact"]
EXACT_ERROR = 1e-5
_COMPARED: tuple[tuple[str, Rivals], ...] = (
    ("highest", "exact"),
    ("high", "float"),
    ("high", "int8"),
    ("medium", "int8"),
    ("auto", "float"),
    ("triton", "float"),
)


@dataclass(frozen=True)
class Timed:
    """What a kernel did on a weight (K, N) with M tokens.

    Args:
        name: of the kernel.
        kind: how activations enter its products.
        error: relative, in the Frobenius norm, against float64.
        nbytes: of its weight.
        samples: one for each round.
    """

    name: str
    kind: Kind
    error: float
    nbytes: int
    samples: Sequence[Sample]


@dataclass(frozen=True)
class Measurement:
    """All kernels of one op on one weight with M tokens.

    Args:
        op: its name.
        K: rows of the weight.
        N: columns of the weight.
        M: tokens.
        kernels: what they did.
        limit_rule: which limit bounds a kernel.
        load: what others took of the machine.
    """

    op: str
    K: int
    N: int
    M: int
    kernels: Sequence[Timed]
    limit_rule: LimitRule
    load: Load

    @property
    def operations(self) -> int:
        """Two for each product that is added."""
        return 2 * self.M * self.K * self.N

    def limit_of(self, kernel: Timed) -> str:
        """The name of the limit that bounds a kernel."""
        return self.limit_rule(self, kernel)

    def seconds(self, kernel: Timed) -> Spread:
        """The time of a call."""
        return Spread.of([sample.seconds for sample in kernel.samples])

    def percent(self, kernel: Timed) -> Spread:
        """Percent of the limit that was measured around each burst: a spread of ratios, not a ratio of medians."""
        limit = self.limit_of(kernel)
        work = kernel.nbytes if limit == DRAM else self.operations
        return Spread.of([100 * work / (sample.seconds * sample.limits[limit]) for sample in kernel.samples])

    def find(self, name: str) -> Timed | None:
        """A kernel by name."""
        return next((kernel for kernel in self.kernels if kernel.name == name), None)

    def best_peer(self, rivals: Rivals) -> Timed | None:
        """The fastest kernel of others among these."""
        peers = [kernel for kernel in self.kernels if _is_among(kernel, rivals) and not kernel.name.startswith(OURS)]
        return min(peers, key=lambda kernel: self.seconds(kernel).median, default=None)

    def speedup(self, kernel: Timed, over: Timed) -> Spread:
        """How many times faster one kernel is than another, round by round."""
        pairs = zip(kernel.samples, over.samples, strict=True)
        return Spread.of([theirs.seconds / ours.seconds for ours, theirs in pairs])

    def record(self) -> dict[str, Any]:
        """What the JSON file has of it."""
        return {
            "op": self.op,
            "K": self.K,
            "N": self.N,
            "M": self.M,
            "rounds": len(self.kernels[0].samples) if self.kernels else 0,
            "machine_was": self.load.record(),
            "limits_per_s": self._limits(),
            "kernels": [self._record_of(kernel) for kernel in self.kernels],
            "speedups": [comparison.record() for comparison in self.comparisons()],
        }

    def comparisons(self) -> list[Comparison]:
        """Each precision of ours against the best of its rivals."""
        found = []
        for precision, rivals in _COMPARED:
            ours, theirs = self.find(f"{OURS} {precision}"), self.best_peer(rivals)
            if ours is not None and theirs is not None:
                found.append(Comparison(precision, rivals, theirs.name, self.speedup(ours, theirs)))
        return found

    def _limits(self) -> dict[str, Any]:
        samples = [sample for kernel in self.kernels for sample in kernel.samples]
        names: Mapping[str, float] = samples[0].limits if samples else {}
        return {name: asdict(Spread.of([sample.limits[name] for sample in samples])) for name in names}

    def _record_of(self, kernel: Timed) -> dict[str, Any]:
        seconds = self.seconds(kernel)
        peak = kernel.samples[0].limits.get(DRAM_PEAK)
        of_peak = {} if peak is None else {"percent_of_dram_peak": 100 * kernel.nbytes / (seconds.median * peak)}
        return {
            "name": kernel.name,
            "class": kernel.kind,
            "relative_error": kernel.error,
            "weight_bytes": kernel.nbytes,
            "ms": {"median": 1e3 * seconds.median, "iqr": 1e3 * seconds.iqr},
            "gop_per_s": 1e-9 * self.operations / seconds.median,
            "weight_gb_per_s": 1e-9 * kernel.nbytes / seconds.median,
            "limit": self.limit_of(kernel),
            "percent_of_limit": asdict(self.percent(kernel)),
            **of_peak,
        }


def _is_among(kernel: Timed, rivals: Rivals) -> bool:
    if rivals == "exact":
        return kernel.kind == "float" and kernel.error < EXACT_ERROR
    return kernel.kind == rivals


def by_tokens(measurement: Measurement, kernel: Timed) -> str:
    """A single token is bound by reading the weight, more by the peak of the kernel's class."""
    return DRAM if measurement.M == 1 else kernel.kind


def by_roofline(measurement: Measurement, kernel: Timed) -> str:
    """What takes longer: reading the weight, or as many operations by a dense product."""

    def median(limit: str) -> float:
        return Spread.of([sample.limits[limit] for sample in kernel.samples]).median

    reads_longer = kernel.nbytes / median(DRAM) >= measurement.operations / median(MATMUL)
    return DRAM if reads_longer else MATMUL


LimitRule = Callable[[Measurement, Timed], str]


@dataclass(frozen=True)
class Comparison:
    """A precision of ours and the fastest of its rivals."""

    precision: str
    rivals: Rivals
    peer: str
    speedup: Spread

    def record(self) -> dict[str, Any]:
        """What the JSON file has of it."""
        return {"ours": self.precision, "class": self.rivals, "peer": self.peer, "times_faster": asdict(self.speedup)}
