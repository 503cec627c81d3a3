"""A vLLM that lacks what the plugin builds on goes on without it."""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any

import pytest

from exllama_ops.integrations.vllm import register


class Config:
    """That of vLLM 0.29, as far as the plugin asks."""


class NewerConfig:
    def get_checkpoint_weight_mapper(self) -> None: ...


def stub_vllm(monkeypatch: pytest.MonkeyPatch, version: str, config: type) -> None:
    """A vLLM that has nothing but a version and the class of its quantization configs."""
    names = ["vllm"]
    for part in ("model_executor", "layers", "quantization", "base_config"):
        names.append(f"{names[-1]}.{part}")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    for module in modules.values():
        module.__path__ = []
    modules["vllm"].__version__ = version
    modules[names[-1]].QuantizationConfig = config
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("version", "config", "reason"),
    [
        ("0.29.0", Config, "its QuantizationConfig has no get_checkpoint_weight_mapper"),
        ("0.99.0", NewerConfig, "No module named 'vllm."),  # whichever is asked for first
    ],
)
def test_a_vllm_without_a_hook_goes_on_and_a_warning_names_the_versions(
    version: str, config: type, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stub_vllm(monkeypatch, version, config)
    with caplog.at_level(logging.WARNING):
        register()
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("vllm.")]
    start = f"exllama_ops is a plugin for vLLM 0.30 to 0.33. This is vLLM {version}, which goes on without it: "
    assert message.startswith(start + reason)


def test_without_vllm_there_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="vllm"):
        register()
