"""The measurement of overhead, with few calls and on a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import isa, overhead

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-w3g32-asym-act-v2"


def test_calls_and_compilations_are_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from exllama_ops.backends.cpu import BACKEND

    if BACKEND.library is None:
        pytest.skip("no native library was found at import")
    monkeypatch.setattr("exllama_ops.integrations.demo.demo_checkpoint", lambda say: CHECKPOINT)
    monkeypatch.setattr(
        overhead,
        "compile_seconds",
        lambda path, threads, backend: {"cold": float(len(backend)), "warm": float(path == CHECKPOINT)},
    )
    monkeypatch.setattr(overhead, "WINDOW_SECONDS", 1e-5)
    monkeypatch.setattr(overhead, "ROUNDS", 2)
    monkeypatch.setattr(isa, "hold_to_cores", lambda threads: None)
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    try:
        assert overhead.main(["--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "overhead.json").read_text())
    assert result["compile_seconds"] == {
        "exllama": {"cold": 7.0, "warm": 1.0},
        "inductor": {"cold": 8.0, "warm": 1.0},
    }
    times = result["microseconds"]
    for name, spread in times.items():
        assert name == overhead.ONE_MORE or 0 < spread["least"] <= spread["median"]
    more = times[overhead.MANY]["least"] - times[overhead.ONE]["least"]
    assert times[overhead.ONE_MORE]["least"] == pytest.approx(more / (overhead.CHAIN - 1))
    assert (tmp_path / "overhead.md").read_text() == capsys.readouterr().out
