"""The comparison of decoding speeds, on a tiny checkpoint and without compiling."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import demo, isa
from exllama_ops import ExllamaLinear, freeze, load_model
from exllama_ops.integrations import generation

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-w3g32-asym-act-v2"


def test_the_dense_model_has_the_same_weights_and_none_of_our_layers() -> None:
    ours, dense = load_model(CHECKPOINT, torch.float32), demo.dense(load_model(CHECKPOINT, torch.float32))
    assert not any(isinstance(module, ExllamaLinear) for module in dense.modules())
    assert dense.dtype == torch.float32
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.inference_mode():
        expected, found = dense(ids).logits, ours(ids).logits
    assert float((expected - found).norm() / expected.norm()) < 1e-3


def test_all_models_decode_in_turns_and_the_ratios_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("exllama_ops.integrations.demo.demo_checkpoint", lambda say: CHECKPOINT)
    monkeypatch.setattr(generation, "CompiledGenerator", partial(generation.CompiledGenerator, compile=False))
    monkeypatch.setattr(isa, "hold_to_cores", lambda threads: None)
    threads = torch.get_num_threads()
    try:
        assert demo.main(["--seconds", "0", "--dtype", "float32", "bfloat16", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    models = json.loads((tmp_path / "demo-1thread.json").read_text())["models"]
    assert [(model["dtype"], model["turns"]) for model in models] == [("float32", 1), ("bfloat16", 1)]
    for model in models:
        ms = {kind: spread["median"] for kind, spread in model["ms_per_token"].items()}
        for other in (demo.INDUCTOR, demo.DENSE):
            assert model["times_faster_than"][other]["median"] == pytest.approx(ms[other] / ms[demo.OURS])
    assert (tmp_path / "demo-1thread.md").read_text() == capsys.readouterr().out


def test_a_model_with_an_order_decodes_frozen_and_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exllama_ops.integrations.demo.demo_checkpoint", lambda say: CHECKPOINT)
    monkeypatch.setattr(generation, "CompiledGenerator", partial(generation.CompiledGenerator, compile=False))
    monkeypatch.setattr(isa, "hold_to_cores", lambda threads: None)
    threads = torch.get_num_threads()
    try:
        assert demo.main(["--freeze", "--seconds", "0", "--dtype", "float32", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    (model,) = json.loads((tmp_path / "demo-freeze-1thread.json").read_text())["models"]
    ms = {kind: spread["median"] for kind, spread in model["ms_per_token"].items()}
    assert model["times_faster_than"] == {
        demo.UNFROZEN: {"median": pytest.approx(ms["unfrozen"] / ms["frozen"]), "iqr": 0}
    }


def test_a_model_gets_an_order_that_freeze_folds_and_fuses() -> None:
    model = demo.with_order(load_model(CHECKPOINT, torch.float32))
    layers = [module for module in model.modules() if isinstance(module, ExllamaLinear)]
    assert all(layer.act_order for layer in layers)
    ids = torch.arange(1, 9).unsqueeze(0)
    report = freeze(model, {"input_ids": ids, "use_cache": False})
    blocks = len(model.model.layers)
    assert [len(group) for group in report.fused] == [3, 2] * blocks
    assert len(report.folded) == blocks
