"""register: PEFT adapts quantized layers as it adapts dense ones, and refuses by name what packed weights cannot do."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from exllama_ops import CompiledGenerator, ExllamaLinear, convert, quantize
from exllama_ops.integrations import transformers as transformers_integration
from exllama_ops.integrations.peft import ExllamaLoraLinear, register
from exllama_ops.nn import linear_sizes

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-w4g64-lmhead"
TOKENS = torch.arange(24).reshape(2, 12)
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with register():
        yield


def quantized(model: nn.Module) -> nn.Module:
    names = [name for name, module in model.named_modules() if linear_sizes(module) and name != "lm_head"]
    weights = {}
    for name in names:
        weight, *bias = model.get_submodule(name).parameters()
        rows = weight if isinstance(model.get_submodule(name), nn.Linear) else weight.t()
        weights[name] = quantize(rows.detach(), 4, 32, bias=bias[0].detach() if bias else None)
    convert(model, weights)
    return model.eval()


@pytest.fixture(scope="module")
def base_model() -> nn.Module:
    torch.manual_seed(0)
    return quantized(LlamaForCausalLM(CONFIG))


@pytest.fixture
def model(base_model: nn.Module) -> nn.Module:
    return copy.deepcopy(base_model)


@pytest.fixture
def dense(model: nn.Module) -> nn.Module:
    """The model with the weights that its quantized layers stand for, as nn.Linear layers."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, ExllamaLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
            wide = ExllamaLinear.from_packed(layer.to_packed())
            wide.scales = wide.scales.float()
            linear.weight.data = wide.dequantize().contiguous()
            model.set_submodule(name, linear)
    return model


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=TOKENS, **options).logits
    return result


def trained(model: Any, steps: int = 2) -> Any:
    optimizer = torch.optim.Adam([tensor for tensor in model.parameters() if tensor.requires_grad], 0.02)
    model.train()
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "modules_to_save": ["lm_head"]}, {"use_dora": True}],
    ids=["LoRA", "rsLoRA and a head trained whole", "DoRA"],
)
def test_adapters_learn_are_saved_and_load_bit_for_bit_and_over_a_dense_model_too(
    options: dict[str, Any], model: nn.Module, dense: nn.Module, tmp_path: Path
) -> None:
    before = logits(model)
    config = LoraConfig(target_modules="all-linear", r=4, **options)
    adapted = trained(get_peft_model(copy.deepcopy(model), config))
    layers = [module for module in adapted.modules() if isinstance(module, ExllamaLoraLinear)]
    assert len(layers) == 7
    learnt = logits(adapted)
    assert not torch.equal(learnt, before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=True)), learnt)
    over_dense = logits(PeftModel.from_pretrained(dense, tmp_path))
    torch.testing.assert_close(learnt, over_dense, rtol=0, atol=2e-3)


def test_all_linear_leaves_a_quantized_head_out(model: nn.Module) -> None:
    convert(model, {"lm_head": quantize(model.get_submodule("lm_head").weight.detach(), 4, 32)})
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4))
    assert isinstance(adapted.get_output_embeddings(), ExllamaLinear)
    assert isinstance(adapted.get_submodule("base_model.model.model.layers.0.mlp.up_proj"), ExllamaLoraLinear)


def test_a_model_of_conv1d_layers_is_adapted_as_one_of_linear_layers() -> None:
    torch.manual_seed(0)
    gpt2 = quantized(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=2)))
    before = logits(gpt2)
    adapted = get_peft_model(gpt2, LoraConfig(r=4, fan_in_fan_out=True, use_dora=True))
    torch.testing.assert_close(logits(adapted), before, rtol=0, atol=1e-3)
    assert not torch.equal(logits(trained(adapted)), before)


def test_several_adapters_are_switched_mixed_and_removed(model: nn.Module, tmp_path: Path) -> None:
    before = logits(model)
    adapted = trained(get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4)))
    adapted.save_pretrained(tmp_path)
    first = logits(adapted)
    adapted.add_adapter("second", LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    adapted.load_adapter(tmp_path, "copy")
    adapted.set_adapter("copy")
    assert torch.equal(logits(adapted), first)
    adapted.set_adapter("second")
    second = logits(adapted)
    assert not torch.equal(second, first)
    mixed = logits(adapted, adapter_names=["default", "second"])
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]), rtol=0, atol=1e-4)
    adapted.delete_adapter("second")
    assert torch.equal(logits(adapted.unload()), before)


def test_merging_is_refused_with_what_to_do_and_changes_nothing(model: nn.Module) -> None:
    adapted = trained(get_peft_model(model, LoraConfig(target_modules=["embed_tokens", "q_proj"], r=4)))
    before = copy.deepcopy(adapted.state_dict())
    layer = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    for merge in (adapted.merge_and_unload, adapted.merge_adapter, layer.merge):
        with pytest.raises(ValueError, match=r"cannot be merged into packed weights.*save_pretrained.*dequantize\(\)"):
            merge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.IA3Config(feedforward_modules=["down_proj"], **TARGETS), "IA3 has no adapter for the quantized layers"),
        (peft.AdaLoraConfig(total_step=9, **TARGETS), "ADALORA has no adapter for .*use peft.LoraConfig"),
        (peft.LoHaConfig(**TARGETS), "LOHA has no adapter"),
        (peft.OFTConfig(**TARGETS), "OFT has no adapter"),
        (LoraConfig(init_lora_weights="pissa", **TARGETS), "init_lora_weights='pissa' writes to the base weights"),
        (LoraConfig(init_lora_weights="olora", target_modules="all-linear"), "'olora' writes to the base weights"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["k_proj"]), r"modules_to_save=\['k_proj'\]"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]), r"modules_to_save=\['mlp'\]"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_what_packed_weights_cannot_do_is_refused_by_name_before_anything_changes(
    config: Any, message: str, model: nn.Module
) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)] == []


def test_methods_that_leave_the_layers_alone_work(model: nn.Module, tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    adapted = trained(get_peft_model(copy.deepcopy(model), config))
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(model, tmp_path)), logits(adapted))


def test_a_compiled_training_step_is_one_graph_with_the_gradients_of_the_eager_one(model: nn.Module) -> None:
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    adapted = get_peft_model(
        nn.Sequential(nn.LayerNorm(64), layer), LoraConfig(target_modules=["1"], r=4, init_lora_weights=False)
    )
    x = torch.randn(5, 64)
    adapted(x).square().sum().backward()
    eager = [tensor.grad.clone() for tensor in adapted.parameters() if tensor.grad is not None]
    adapted.zero_grad()
    torch.compile(adapted, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    compiled = [tensor.grad for tensor in adapted.parameters() if tensor.grad is not None]
    assert len(eager) == 2
    for expected, got in zip(eager, compiled, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_compiled_generator_generates_with_the_adapters(model: nn.Module) -> None:
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)).eval()
    expected = adapted.generate(input_ids=TOKENS[1:], max_new_tokens=4, do_sample=False, pad_token_id=0)
    generator = CompiledGenerator(adapted, mode="whole", backend="eager")
    assert list(generator.generate(TOKENS[1:], max_new_tokens=4)) == expected[0, TOKENS.shape[1] :].tolist()


def test_the_trainer_trains_a_checkpoint_and_its_adapter_loads_bit_for_bit_by_every_way(tmp_path: Path) -> None:
    with transformers_integration.register():

        def load() -> Any:
            return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)

        before = dict(load().named_buffers())
        adapted = get_peft_model(
            peft.prepare_model_for_kbit_training(load()),
            LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"),
        )
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, gradient_checkpointing=True,
            learning_rate=0.02, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in TOKENS]
        trainer = Trainer(model=adapted, args=arguments, train_dataset=rows)
        assert trainer.train().global_step == 2
        trainer.save_model(str(tmp_path / "adapter"))
        learnt = logits(adapted)
        assert not torch.equal(learnt, logits(load()))
        by_transformers = load()
        by_transformers.load_adapter(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")
        of_the_folder = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
        for model in (loaded, by_transformers, of_the_folder):
            assert torch.equal(logits(model), learnt)
    for name, buffer in loaded.get_base_model().named_buffers():
        assert torch.equal(buffer, before[name.replace("base_layer.", "")])


def test_registering_holds_until_the_end_of_the_first_call_and_not_a_moment_before() -> None:
    code = """
import copy, torch, peft
from torch import nn
from exllama_ops import ExllamaLinear, quantize
from exllama_ops.integrations import transformers as transformers_integration
from exllama_ops.integrations.peft import register

layers = nn.Sequential(nn.LayerNorm(32), ExllamaLinear.from_weight(quantize(torch.randn(32, 32), 4, 32)))

def attempt():
    try:
        peft.get_peft_model(copy.deepcopy(layers), peft.LoraConfig(target_modules=["1"], r=4))
        return "works"
    except ValueError as error:
        return "refused" if "ExllamaLinear" in str(error) else str(error)

print(attempt())
with register():
    with register():
        print(attempt())
    print(attempt())
print(attempt())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["refused", "works", "works", "refused"]
