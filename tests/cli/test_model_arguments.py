"""The flags that name a model reach what opens and loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exllama_ops.checkpoint import CheckpointError
from exllama_ops.cli import main

pytest.importorskip("transformers", reason='needs the extra "hf"')

FLAGS = ("--bits", "3", "--group-size", "-1", "--asym", "--desc-act", "--checkpoint-format", "gptq_v2")
SAID = {"bits": 3, "group_size": -1, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"}


@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_revision_and_what_the_files_do_not_say_reach_the_opening(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Any, ...]] = []

    def open_checkpoint(model: str, *, revision: str | None, quantization_config: dict[str, Any] | None) -> None:
        seen.append((model, revision, quantization_config))
        raise CheckpointError("enough")

    monkeypatch.setattr("exllama_ops.checkpoint.open_checkpoint", open_checkpoint)
    assert main([command, "owner/name", "--revision", "a-branch", *FLAGS]) == 2
    assert main([command, "owner/name", "--sym"]) == 2
    assert main([command, "owner/name"]) == 2
    assert seen == [("owner/name", "a-branch", SAID), ("owner/name", None, {"sym": True}), ("owner/name", None, None)]
    capsys.readouterr()


def test_trust_and_what_the_files_do_not_say_reach_the_loader(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Any, ...]] = []

    def load_model(place: Any, dtype: Any, device: Any, **options: Any) -> None:
        seen.append((Path(place), dtype, options["quantization_config"], options["trust_remote_code"]))
        raise CheckpointError("enough")

    monkeypatch.setattr("exllama_ops.integrations.transformers.load_model", load_model)
    file = checkpoint / "model.safetensors"
    assert main(["run", str(file), "--bits", "4", "--trust-remote-code"]) == 2
    assert main(["run", str(checkpoint), "--dtype", "auto"]) == 2
    assert seen == [(file, None, {"bits": 4}, True), (checkpoint, None, None, False)]
    capsys.readouterr()
