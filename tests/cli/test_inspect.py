"""`exllama-ops inspect`: what it says of a checkpoint, without reading a weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from checkpoint.builder import DATA, module, write
from exllama_ops.checkpoint import CheckpointError, open_checkpoint
from exllama_ops.checkpoint.files import TensorFiles
from exllama_ops.cli import main
from exllama_ops.cli.table import told

pytest.importorskip("transformers", reason='needs the extra "hf"')


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    assert main(["inspect", *map(str, arguments), "--json"]) == code
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorFiles, "read", lambda *_: pytest.fail("a weight was read"))


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A checkpoint of another tool with a tokenizer, by its name."""
    path = tmp_path / "model"
    shutil.copytree(DATA / "tiny-w4g64-lmhead", path)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.mark.usefixtures("unread")
def test_it_says_what_the_headers_have(real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = inspected(capsys, real)
    assert (result["path"], result["format"], result["written_by"]) == (str(real), "gptq", "gptqmodel:7.7.0")
    assert (result["model_type"], result["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert (result["bits"], result["quantized_modules"], result["refused"]) == ([4, 8], 15, [])
    data_bytes = (real / "model.safetensors").stat().st_size
    header = 8 + int.from_bytes((real / "model.safetensors").read_bytes()[:8], "little")
    assert result["weight_bytes"] == data_bytes - header == result["quantized_bytes"] + result["dense_bytes"]
    assert result["quantized_bytes"] == sum(entry["num_bytes"] for entry in result["layers"])
    heads = [entry for entry in result["layers"] if entry["modules"] == "lm_head"]
    # qweight, qzeros, scales and g_idx of 256 x 1024 values of 8 bits in groups of 32
    assert heads == [
        {
            "modules": "lm_head", "count": 1, "in_features": 256, "out_features": 1024, "bits": 8, "group_size": 32,
            "num_groups": 8, "sym": True, "act_order": False, "zero_format": "gptq", "bias": False,
            "num_bytes": 256 * 1024 + 8 * 1024 + 8 * 1024 * 2 + 256 * 4,
        }
    ]  # fmt: skip
    assert [(entry["modules"], entry["count"]) for entry in result["layers"][:2]] == [
        ("model.layers.0-1.self_attn.q_proj", 2),
        ("model.layers.0-1.self_attn.k_proj", 2),
    ]
    assert {"tensors": "model.norm.weight", "count": 1, "shape": [256], "dtype": "float16"} in result["dense"]


def test_people_get_a_table(real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(real)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "format:    gptq, written by gptqmodel:7.7.0" in lines
    assert "refused:   nothing" in lines
    assert "lm_head                                1  256  1024     8     32  yes  no     gptq   no    0.29" in lines


def test_what_the_files_do_not_say_is_told_from_shapes_and_may_be_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, module(sym=False, bits=3), bits=..., group_size=...)
    assert main(["inspect", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "refused:   " in captured.out
    assert "pass --bits 3 --group-size 32" in captured.err.splitlines()[-1]
    flags = ("--bits", "3", "--group-size", "32", "--asym", "--checkpoint-format", "gptq_v2")
    result = inspected(capsys, tmp_path, *flags, code=2)
    assert (result["bits"], result["layers"][0]["sym"], result["layers"][0]["zero_format"]) == ([3], False, "gptq_v2")


def test_all_that_run_would_refuse_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, module())  # its model_type is "test", and there is no tokenizer
    reasons = inspected(capsys, tmp_path, code=2)["refused"]
    assert len(reasons) == 2
    assert "knows no model_type 'test'" in reasons[0]
    assert "there is no tokenizer" in reasons[1]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "code.Config"}}))
    reasons = inspected(capsys, tmp_path, code=2)["refused"]
    assert "needs code of its own repository (auto_map of config.json: code.Config)" in reasons[0]


def test_every_module_and_every_field_that_is_refused_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {**module("a"), **module("b"), **module("c")}
    del broken["a.scales"], broken["c.scales"]
    write(tmp_path, broken)
    reasons = inspected(capsys, tmp_path, code=2)["refused"]
    assert [reason.rpartition(": ")[2] for reason in reasons] == [f"tensor {name}.scales is missing" for name in "ac"]
    assert main(["inspect", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert [line for line in captured.out.splitlines() if "is missing" in line] == [f"refused:   {r}" for r in reasons]
    with pytest.raises(
        CheckpointError, match=r"a\.scales is missing \(and 1 more, which `exllama-ops inspect` lists\)$"
    ):
        open_checkpoint(tmp_path)
    write(tmp_path, module(), bits=5, sym="maybe", dynamic={"a": {"bits": 6}, "b": {"group_size": 0}})
    [reason] = inspected(capsys, tmp_path, code=2)["refused"]
    for part in ("bits must be one of (2, 3, 4, 8); got 5", "sym must be", "'a': bits must be", "'b': group_size must"):
        assert part in reason


def hub(monkeypatch: pytest.MonkeyPatch, source: Path, configs: Path) -> list[str]:
    """A hub that has one model and gives away its JSON files and headers alone."""
    asked = []

    class Api:
        def list_repo_files(self, name: str, *, revision: str | None) -> list[str]:
            asked.append(f"{name}@{revision}")
            return [*(file.name for file in source.iterdir()), "original/consolidated.safetensors"]

        def parse_safetensors_file_metadata(self, name: str, file: str, *, revision: str | None) -> SimpleNamespace:
            content = (source / file).read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            header.pop("__metadata__", None)
            return SimpleNamespace(tensors={key: SimpleNamespace(**entry) for key, entry in header.items()})

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert list(allow_patterns) == ["*.json"]
        for file in source.glob("*.json"):
            shutil.copy(file, configs)
        return str(configs)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_of_a_hub_id_only_json_files_and_headers_are_fetched(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    want = inspected(capsys, real)
    configs = tmp_path / "configs"
    configs.mkdir()
    asked = hub(monkeypatch, real, configs)
    result = inspected(capsys, "owner/name", "--revision", "a-branch")
    assert asked == ["owner/name@a-branch"]
    assert result == {**want, "path": "owner/name"}


def test_a_hub_that_cannot_be_asked_is_the_cache_or_one_line(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = tmp_path / "configs"
    configs.mkdir()
    hub(monkeypatch, real, configs)

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    assert main(["inspect", "owner/name"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "exllama-ops: error: owner/name: its headers could not be fetched from the hub: no network"
    shutil.copy(real / "model.safetensors", configs)
    assert inspected(capsys, "owner/name")["path"] == str(configs)


def test_names_that_differ_in_numbers_are_told_as_one() -> None:
    assert told(["model.layers.7.up_proj"]) == "model.layers.7.up_proj"
    names = [f"h.{layer}.experts.{expert}.w1" for layer in (0, 1, 2, 5) for expert in (0, 1)]
    assert told(names) == "h.0-2,5.experts.0-1.w1"
