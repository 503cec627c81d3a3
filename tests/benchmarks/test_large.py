"""The benchmark of a large model, on a tiny one: what it writes loads, and what it prints is what it measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from benchmarks import large
from exllama_ops import open_checkpoint

pytest.importorskip("transformers")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny = {"HIDDEN": 64, "INTERMEDIATE": 96, "HEADS": 4, "VOCABULARY": 128, "GROUP_SIZE": 32, "LAYERS_OF_FILE": 1}
    for name, value in tiny.items():
        monkeypatch.setattr(large, name, value)
    large.write_checkpoint(tmp_path / "model", layers=2)
    return tmp_path / "model"


def test_projections_of_one_input_share_its_order(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    orders = {
        name.removeprefix("model.layers.1."): opened.read(name).g_idx for name in opened.quantized if ".1." in name
    }
    assert len(orders) == 7
    query = orders["self_attn.q_proj"]
    assert query is not None
    assert query.tolist() == orders["self_attn.v_proj"].tolist()  # type: ignore[union-attr]
    assert query.tolist() != orders["self_attn.o_proj"].tolist()  # type: ignore[union-attr]


def test_a_token_reads_all_weights_but_the_embedding(checkpoint: Path) -> None:
    result = large.measure(checkpoint, threads=1, ways=[large.EAGER], rounds=1)
    words = 2 * (4 * 64 * 64 + 3 * 64 * 96) // 2
    assert words + 2 * 64 * 128 < result["bytes_of_token"] < 2 * words + 2 * 64 * 128
    samples = result["samples"][large.EAGER]
    assert len(samples["prompt_s"]) == 1
    assert len(samples["token_s"]) == len(samples["percent"]) == large.TURN_TOKENS
    page = large.table({"command": "python -m benchmarks.large", **json.loads(json.dumps(result))})
    median_ms = 1e3 * statistics.median(samples["token_s"])
    assert f"| {median_ms:.1f} ±" in page
