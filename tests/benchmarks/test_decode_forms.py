"""The measurement of forms of attention, small and without compiling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason='needs the extra "hf"')

from benchmarks import decode_forms, isa


def test_each_form_has_its_time_and_its_error_in_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(isa, "hold_to_cores", lambda threads: None)
    monkeypatch.setattr(decode_forms, "_package", lambda folder, function, inputs, cut=False: function)
    for name, value in {"ATTENTION": ((6, 2, 8),), "LENGTHS": (8, 24), "PROMPTS": (5,), "SECONDS": 0.0}.items():
        monkeypatch.setattr(decode_forms, name, value)
    monkeypatch.setattr(decode_forms, "OUTPUT_LAYERS", ((16, 40),))
    threads = torch.get_num_threads()
    assert decode_forms.main(["--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    rows = json.loads((tmp_path / "decode-forms.json").read_text())["rows"]
    assert len(rows) == 2 * (2 + 1 + 2)
    for row in rows:
        bound = 5e-3 if "bfloat16" in row["what"] else 6e-4
        assert all(0 < row["errors"][form] < bound for form in ("theirs", "ours")), row
        assert all(row["microseconds"][form]["median"] > 0 for form in ("theirs", "ours"))
    written = (tmp_path / "decode-forms.md").read_text()
    assert capsys.readouterr().out == written
    assert "| attention, 5 tokens, 6 heads in 2 groups x 8 | 2 |" in written
