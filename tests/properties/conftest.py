"""Figures of a run: how many calls of which op on which backend and instruction set were computed or refused."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from exllama_ops import backends

# What a test records by record_property, so that it comes from the workers of pytest-xdist too.
FIGURES = "figures"


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN and the largest integers, so that a read of unwritten memory shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_thread_and_no_isa() -> Iterator[None]:
    """What the ops are compared with is computed on one thread; a call has threads and an ISA of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if backends.cpu.BACKEND.library is not None:
        backends.cpu.BACKEND.library.use_isa(os.environ.get("EXLLAMA_OPS_CPU_ISA", ""))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        (report.duration, dict(report.user_properties)[FIGURES])
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if FIGURES in dict(getattr(report, "user_properties", []))
    ]
    if not reports:
        return
    counts: Counter[tuple[str, ...]] = Counter()
    for _, figures in reports:
        for *key, count in figures["counts"]:
            counts[tuple(key)] += count
    terminalreporter.section("calls of the ops held to the reference")
    terminalreporter.line(f"{'backend':12} {'ISA':12} {'op':16} {'computed':>9} {'refused':>9}")
    for backend, isa, op in sorted({key[:3] for key in counts}):
        computed, refused = (counts[backend, isa, op, outcome] for outcome in ("computed", "refused"))
        terminalreporter.line(f"{backend:12} {isa:12} {op:16} {computed:9} {refused:9}")
    cases, seconds = sum(figures["cases"] for _, figures in reports), sum(duration for duration, _ in reports)
    terminalreporter.line(f"{cases} random cases, {sum(counts.values())} calls, in {seconds:.0f} s of tests")
