"""The measurement of whole processes, on a tiny checkpoint and without compiling."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks import first_token, isa
from exllama_ops import load_model

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-w3g32-asym-act-v2"


def test_the_first_layers_are_a_model_of_their_own(tmp_path: Path) -> None:
    whole = load_model(CHECKPOINT, torch.float32)
    cut = load_model(first_token.first_layers(CHECKPOINT, 1, tmp_path / "cut"), torch.float32)
    assert (len(whole.model.layers), len(cut.model.layers)) == (2, 1)
    whole.model.layers = whole.model.layers[:1]
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(cut(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


def test_a_model_without_so_many_layers_is_itself(tmp_path: Path) -> None:
    assert first_token.first_layers(CHECKPOINT, 2, tmp_path / "cut") == CHECKPOINT


def test_the_usage_of_a_process_has_that_of_its_children_and_not_of_its_parent(tmp_path: Path) -> None:
    burn = "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); print('{{}}')"
    measured = first_token.run_once([sys.executable, "-c", starts], tmp_path, {"PATH": "/bin"})
    assert measured["cpu_seconds"] >= 0.5
    with pytest.raises(RuntimeError, match="status"):
        first_token.run_once([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, {})


def test_processes_take_turns_and_what_they_say_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "model"
    shutil.copytree(CHECKPOINT, checkpoint)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(checkpoint)
    monkeypatch.setattr("exllama_ops.integrations.demo.demo_checkpoint", lambda say: checkpoint)
    monkeypatch.setattr(
        first_token, "MODES", {"eager": ("--no-compile",), "half": ("--no-compile", "--dtype=bfloat16")}
    )
    monkeypatch.setattr(isa, "hold_to_cores", lambda threads: None)
    flags = ["--layers", "1", "2", "--modes", "eager", "half", "--warm-rounds", "1", "--threads", "1"]
    assert first_token.main([*flags, "--out", str(tmp_path)]) == 0
    processes = json.loads((tmp_path / "first-token-1-2layers-1thread.json").read_text())["processes"]
    assert [(row["layers"], row["mode"], row["caches"]) for row in processes] == [
        (layers, mode, caches) for layers in (1, 2) for mode in ("eager", "half") for caches in ("cold", "warm")
    ]
    for row in processes:
        (one,) = row["runs"]
        assert one["cpu_seconds"] >= one["cpu_phases"]["first_token"] > 0
        assert set(one["phases"]) == {*first_token.PHASES, "first_token"}
    assert (tmp_path / "first-token-1-2layers-1thread.md").read_text() == capsys.readouterr().out
