"""Parts of the plugin in vLLM's own classes, without a model that is served."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("vllm", reason="needs vLLM: .ci/vllm builds an environment that has it")

from vllm.config import LoRAConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, pad_vocab_size
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from exllama_ops import ExllamaLinear, quantize
from exllama_ops.integrations.vllm import experts, refusals
from exllama_ops.integrations.vllm.config import ExllamaConfig
from exllama_ops.integrations.vllm.linear import ExllamaLinearMethod
from vllm_plugin import cases


def head_of(vocabulary: int, rank: int, size: int, K: int) -> Any:
    """An output head of vLLM as a process of ``size`` has it."""
    head = ParallelLMHead.__new__(ParallelLMHead)
    nn.Module.__init__(head)
    head.tp_rank, head.tp_size = rank, size
    padded = pad_vocab_size(vocabulary)
    head.shard_indices = ParallelLMHead._get_indices(padded, padded, vocabulary, vocabulary, rank, size)
    head.parts = padded // size
    head.embedding_dim = K
    return head


@pytest.mark.parametrize(("bits", "vocabulary", "size"), [(4, 72, 2), (4, 40, 4), (3, 32, 2), (8, 516, 4), (2, 128, 2)])
def test_the_parts_of_a_padded_head_are_its_outputs_and_zeros(bits: int, vocabulary: int, size: int) -> None:
    """Of 72 outputs the second process has 8; of 40 the last of four has none."""
    torch.manual_seed(0)
    K = 64
    weight = quantize(torch.randn(vocabulary, K), bits, 32)
    config: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(read=lambda name: weight), layers=SimpleNamespace(was_read=lambda *_: None)
    )
    method = ExllamaLinearMethod(config, ["lm_head"])
    x = torch.randn(3, K)
    outputs = []
    for rank in range(size):
        head = head_of(vocabulary, rank, size, K)
        method.create_weights(head, K, [head.parts], K, head.parts * size, torch.float32)
        method.process_weights_after_loading(head)
        again = dict(head.named_buffers())
        method.process_weights_after_loading(head)
        assert all(tensor is again[name] for name, tensor in head.named_buffers())
        assert (head.weight.dtype, head.weight.device) == (torch.float32, x.device)  # what adapters of vLLM ask for
        outputs.append(method.apply(head, x, torch.ones(head.parts)) - 1)
        assert outputs[-1].shape == (3, head.parts)
    out = torch.cat(outputs, -1)
    expected = ExllamaLinear.from_weight(weight)(x)
    torch.testing.assert_close(out[:, :vocabulary], expected, rtol=0, atol=1e-5)
    assert not out[:, vocabulary:].any()


class Model(nn.Module):
    """As models of vLLM are: the parts have names, and the whole has a config."""

    def __init__(self, config: ExllamaConfig, names: list[str]) -> None:
        super().__init__()
        self.quant_config = config
        self.kept: list[str] = []
        config.take(names)

    def load_weights(self, weights: Any) -> None:
        """Note what a loader of vLLM is given; each tensor is renamed as models ask for it."""
        mapper = WeightsMapper(orig_to_new_prefix={"model.": "language."})
        loader = AutoWeightsLoader(self)
        loader._load_module = lambda _, __, rest: [self.kept.append(name) or name for name, _ in rest]  # type: ignore[method-assign]
        loader.load_weights(weights, mapper=mapper)


def opened(path: Path) -> tuple[ExllamaConfig, dict[str, torch.Tensor]]:
    """The config of a checkpoint, and what is in its files."""
    config = ExllamaConfig({})
    config.maybe_update_config(str(path))
    return config, load_file(path / "model.safetensors")


def test_vllm_gets_every_tensor_that_is_not_read_here(tmp_path: Path) -> None:
    path = cases.write(cases.Kind(4, 64, act_order=True), tmp_path / "model", num_hidden_layers=1)
    tensors = load_file(path / "model.safetensors")
    stray = {name: torch.ones(2) for name in ("model.extra.scales", "model.layers.0.mlp.up_proj.weight_scale")}
    save_file(tensors | stray, path / "model.safetensors")
    config, tensors = opened(path)
    untaken = "model.layers.0.mlp.down_proj"
    model = Model(config, [name for name in config.checkpoint.quantized if name != untaken])
    model.load_weights(tensors.items())
    given = {name for name in tensors if name in config.checkpoint.dense or name.startswith(untaken)}
    assert set(stray) <= given
    assert sorted(model.kept) == sorted(name.replace("model.", "language.", 1) for name in given)


def test_a_config_that_is_sent_to_a_process_opens_the_files_there(tmp_path: Path) -> None:
    config, tensors = opened(cases.write(cases.Kind(4, 64), tmp_path / "model", num_hidden_layers=1))
    Model(config, list(config.checkpoint.quantized))
    config.layers.was_read(config.checkpoint.quantized, SimpleNamespace(), nn.Module())
    sent = pickle.loads(pickle.dumps(config))
    assert not vars(sent).keys() & {"checkpoint", "layers"}
    model = Model(sent, list(sent.checkpoint.quantized))
    model.load_weights(tensors.items())
    assert len(model.kept) == len(config.checkpoint.dense)


def test_a_line_in_the_log_says_which_files_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    path = cases.write(cases.Kind(4, 64, sym=True), tmp_path / "model", num_hidden_layers=1)
    (path / "model.safetensors").write_bytes(b"no tensors")
    config = SimpleNamespace(_name_or_path=str(path))
    raw = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
    with caplog.at_level(logging.INFO):
        assert refusals.reasons(raw, config) == []
        assert refusals.reasons(raw, SimpleNamespace(_name_or_path="no-owner/no-name")) == []
    assert f"exllama_ops leaves this checkpoint to vLLM: {path}" in caplog.text
    assert "exllama_ops asks vLLM of the config of this checkpoint alone: no-owner/no-name" in caplog.text


@pytest.mark.parametrize(("targets", "refused"), [(None, True), (["q_proj", "experts"], True), (["q_proj"], False)])
def test_adapters_of_experts_are_refused_by_name(
    targets: list[str] | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = SimpleNamespace(lora_config=LoRAConfig(target_modules=targets))
    monkeypatch.setattr(experts, "get_current_vllm_config_or_none", lambda: current)
    if refused:
        with pytest.raises(ValueError, match=r"mlp.experts: exllama_ops runs no adapters on quantized experts"):
            experts._check_adapters("mlp.experts")
    else:
        experts._check_adapters("mlp.experts")


def test_experts_that_differ_are_called_one_by_one_and_a_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def of_bits(bits: int) -> list[ExllamaLinear]:
        return [ExllamaLinear.from_weight(quantize(torch.randn(64, 64), bits, 32)) for _ in range(3)]

    alike = experts.Stacks(2)
    alike.put(of_bits(4))
    alike.put(of_bits(4))
    assert alike.all is not None
    assert len(alike.all) == 3
    first, mixed = of_bits(4), experts.Stacks(2)
    mixed.put(first)
    with caplog.at_level(logging.WARNING):
        mixed.put(of_bits(8))
    assert mixed.all is None
    assert "exllama_ops calls experts one by one, which is slow, and on a GPU needs --enforce-eager: all" in caplog.text
    assert "bits 8, not 4" in caplog.text
    first[0].scales = first[0].scales.clone()  # no stack has it any more
