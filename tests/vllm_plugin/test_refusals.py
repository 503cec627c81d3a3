"""What vLLM refuses is asked of vLLM's own rules, before it makes a model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: .ci/vllm builds an environment that has it")

from exllama_ops.integrations.vllm import refusals, register
from vllm_plugin import cases
from vllm_plugin.cases import Kind

register()


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return config


def reasons(path: Path) -> list[str]:
    return refusals.reasons(config_of(path), SimpleNamespace(_name_or_path=str(path)))


@pytest.mark.parametrize(
    "kind",
    [
        Kind(4, 64, sym=True, checkpoint_format="gptq"),
        Kind(4, 64, format="awq"),
        Kind(4, 64, sym=True, format="auto-round"),
        Kind(4, -1, format="compressed-tensors"),
        # By the kernel of this library, which vLLM chooses where it has none.
        Kind(8, 64, sym=True, format="compressed-tensors"),
        Kind(3, 64, format="compressed-tensors"),
    ],
    ids=str,
)
def test_what_vllm_runs_has_no_reason(kind: Kind, tmp_path: Path) -> None:
    assert reasons(cases.write(kind, tmp_path / "model")) == []


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Kind(4, 64, act_order=True), "desc_act=True"),
        (Kind(4, 64), "bits=4, sym=False"),
        (Kind(8, 64, sym=True), "Marlin does not support weight_bits = uint8b128"),
        (Kind(4, 64, sym=True, head_bits=8), "lm_head: Marlin does not support weight_bits = uint8b128"),
        (Kind(2, 64, sym=True, format="auto-round"), "unsupported config INCLayerConfig"),
        (Kind(4, 64, format="auto-round"), "unsupported config INCLayerConfig"),
        (Kind(4, 64, act_order=True, format="compressed-tensors"), "activation ordering"),
        *(
            (Kind(4, 128, sym=format != "awq", format=format), "the last of its groups of 128 is partial")
            for format in ("gptq", "awq", "auto-round", "compressed-tensors")
        ),
    ],
    ids=str,
)
def test_each_kind_that_vllm_refuses_has_its_reason(kind: Kind, reason: str, tmp_path: Path) -> None:
    found = reasons(cases.write(kind, tmp_path / "model"))
    assert found
    assert all(reason in text for text in found)


def test_what_this_library_cannot_read_either_is_left_to_vllm(tmp_path: Path) -> None:
    path = cases.write(Kind(4, 64, act_order=True), tmp_path / "model")
    assert reasons(path)
    (path / "model.safetensors").write_bytes(b"broken")
    assert reasons(path) == []


def test_any_error_of_vllm_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Config:
        @classmethod
        def from_config(cls, config: dict[str, Any]) -> None:
            raise ImportError("No module named 'humming'")

    monkeypatch.setattr(refusals, "get_quantization_config", lambda name: Config)
    assert refusals.reasons({"quant_method": "gptq"}, None) == ["No module named 'humming'"]


def test_a_hub_id_of_compressed_tensors_is_asked_for_by_its_config_alone(tmp_path: Path) -> None:
    config = config_of(cases.write(Kind(4, 64, act_order=True, format="compressed-tensors"), tmp_path / "model"))
    on_the_hub = SimpleNamespace(_name_or_path="nobody/nothing")
    assert refusals.reasons(config, on_the_hub)
    assert refusals.reasons(config | {"format": "float-quantized"}, on_the_hub) == []


def test_a_model_without_files_is_asked_for_by_its_config_alone(tmp_path: Path) -> None:
    config = config_of(cases.write(Kind(4, 64, act_order=True), tmp_path / "model"))
    assert refusals.reasons(config, None)
    assert refusals.reasons(config | {"desc_act": False, "sym": True}, None) == []


def test_the_config_of_the_files_is_not_changed_by_asking(tmp_path: Path) -> None:
    path = cases.write(Kind(8, 64, sym=True, format="compressed-tensors"), tmp_path / "model")
    config = config_of(path)
    config["config_groups"]["attention"] = {"targets": ["LlamaAttention"], "weights": None}
    given = copy.deepcopy(config)
    refusals.reasons(config, None)
    assert config == given
