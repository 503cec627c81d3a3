"""`load_model` and ``from_pretrained`` on the families of transformers: kinds of layers, names, experts."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from exllama_ops import quantize
from exllama_ops.checkpoint import CheckpointError
from exllama_ops.layout import pack_columns
from exllama_ops.nn import ExllamaLinear

transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')

from exllama_ops.integrations.generation import CompiledGenerator  # noqa: E402 (as above)
from exllama_ops.integrations.transformers import load_model, register  # noqa: E402 (as above)
from integrations import families  # noqa: E402 (it needs transformers)


def assert_same(model: Any, dense: Any) -> None:
    """Sums of at most 128 float32 products differ by 2**-17 of their size; a misplaced layer differs by all of it."""
    expected = families.logits(dense)
    assert (families.logits(model) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", families.CONFIGS)
def test_a_family_has_the_logits_of_its_dense_model(family: str, tmp_path: Path) -> None:
    dense = families.write(family, tmp_path, names=families.HUB_NAMES.get(family, ()), head=family == "gpt_neox")
    model = load_model(tmp_path, torch.float32, progress=False)
    assert type(model) is type(dense)
    assert_same(model, dense)


@pytest.mark.parametrize("family", families.HUB_NAMES)
def test_the_names_of_transformers_itself_load_too(family: str, tmp_path: Path) -> None:
    """Tools that quantize a model of transformers 5 write the names that it has there."""
    dense = families.write(family, tmp_path)
    assert_same(load_model(tmp_path, torch.float32, progress=False), dense)


@pytest.mark.parametrize("family", families.HUB_NAMES)
def test_save_pretrained_writes_the_names_and_the_tensors_of_the_files(family: str, tmp_path: Path) -> None:
    families.write(family, tmp_path / "a", names=families.HUB_NAMES[family], head=family == "gpt_neox")
    load_model(tmp_path / "a", progress=False).save_pretrained(tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with register():
        model = transformers.AutoModelForCausalLM if family != "qwen2_vl" else transformers.AutoModelForImageTextToText
        again = model.from_pretrained(tmp_path / "b")
    assert torch.equal(families.logits(again), families.logits(load_model(tmp_path / "a", progress=False)))


def test_an_image_is_seen_by_a_model_with_a_vision_tower(tmp_path: Path) -> None:
    dense = families.write("qwen2_vl", tmp_path)
    model = load_model(tmp_path, torch.float32, progress=False)
    grid = torch.tensor([[1, 4, 4]])  # patches of one image: frames, rows, columns
    prompt = torch.tensor([[5, 90, *[92] * 16, 91, 6]])  # as many image tokens as patches
    arguments = {"input_ids": prompt, "image_grid_thw": grid, "mm_token_type_ids": (prompt == 92).int()}
    results = []
    for pixels in (torch.randn(16, 3 * 14 * 14), torch.randn(16, 3 * 14 * 14)):
        with torch.inference_mode():
            got, expected = (each(**arguments, pixel_values=pixels).logits for each in (model, dense))
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
        results.append(got)
    assert not torch.equal(*results)
    tokens = model.generate(**arguments, pixel_values=pixels, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, prompt.shape[1] + 4)


# What files call the projections of GPT-OSS's experts: GPTQModel's name, and what its other releases have for it.
GPT_OSS_NAMES = {
    "former names": ((r"\.(gate_up|down)\.(\d)", r".\1_projs.\2"),),
    "numbers first": ((r"\.down\.(\d)", r".\1.down_proj"),),
    "stacks": ((r"\.(gate_up|down)\.(\d)", r".\1_proj.\2"),),
}


@pytest.mark.parametrize("names", GPT_OSS_NAMES)
def test_gpt_oss_has_its_experts_by_several_names(names: str, tmp_path: Path) -> None:
    dense = families.write("gpt_oss", tmp_path / "a", names=GPT_OSS_NAMES[names], act_order=True)
    if names == "stacks":
        put_in_stacks(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(tmp_path / "a", torch.float32, progress=False)
    assert_same(model, dense)
    model.save_pretrained(tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)
    assert torch.equal(
        families.logits(load_model(tmp_path / "b", torch.float32, progress=False)), families.logits(model)
    )


def put_in_stacks(path: Path) -> None:
    """Make one tensor of those of all experts, as GPTQModel does when it saves GPT-OSS."""
    tensors = load_file(path / "model.safetensors")
    for name in sorted(tensors):
        matched = re.fullmatch(r"(.*\.experts\.\w+)\.0\.(\w+)", name)
        if matched:
            own = [tensors.pop(f"{matched[1]}.{index}.{matched[2]}") for index in range(4)]
            stack = f"{matched[1]}_bias" if matched[2] == "bias" else f"{matched[1]}.{matched[2]}"
            tensors[stack] = torch.stack(own)
    assert not any(re.search(r"experts\.\w+\.\d", name) for name in tensors)
    save_file(tensors, path / "model.safetensors")


def test_gate_and_up_of_gpt_oss_may_be_two_layers(tmp_path: Path) -> None:
    """Outputs that the model wants in turns are made so."""
    dense = families.write("gpt_oss", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".gate_up." in name]:
        tensor = tensors.pop(name)
        experts, index, leaf = re.fullmatch(r"(.*\.experts)\.gate_up\.(\d)\.(\w+)", name).groups()
        if leaf == "qzeros":  # symmetric
            parts = [tensor[:, : tensor.shape[1] // 2]] * 2
        elif leaf == "g_idx":
            parts = [tensor] * 2
        else:
            parts = [tensor[..., 0::2], tensor[..., 1::2]]
        for part, own in zip(("gate_proj", "up_proj"), parts, strict=True):
            tensors[f"{experts}.{index}.{part}.{leaf}"] = own.clone()
    for name in [name for name in tensors if ".down." in name]:
        tensors[re.sub(r"\.down\.(\d)", r".\1.down_proj", name)] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load_model(tmp_path, torch.float32, progress=False), dense)


def test_experts_of_gpt_oss_without_their_biases_are_refused(tmp_path: Path) -> None:
    families.write("gpt_oss", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lacking = {name: tensor for name, tensor in tensors.items() if not re.search(r"experts\..*bias", name)}
    save_file(lacking, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.\w+\.\d has a bias in the model, which the files lack"):
        load_model(tmp_path, torch.float32, progress=False)


def test_dense_experts_are_merged_as_transformers_does(tmp_path: Path) -> None:
    dense = families.write("mixtral", tmp_path, quantizes_experts=False)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if "experts" in name]:
        merged = tensors.pop(name)
        for index, own in enumerate(merged):
            parts = {"w2": own} if "down" in name else dict(zip(("w1", "w3"), own.chunk(2), strict=True))
            for part, tensor in parts.items():
                key = name.rpartition(".")[0].replace(".mlp.", ".block_sparse_moe.")
                tensors[f"{key}.{index}.{part}.weight"] = tensor.clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load_model(tmp_path, torch.float32, progress=False), dense)


def test_a_row_of_experts_has_the_same_bits_whatever_is_beside_it(tmp_path: Path) -> None:
    families.write("qwen3_moe", tmp_path)
    model = load_model(tmp_path, torch.float32, progress=False)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(6, 64)
    choices = torch.tensor([[0, 3], [1, 2], [3, 0], [2, 1], [0, 1], [3, 2]])
    weights = torch.rand(6, 2)
    with torch.inference_mode():
        together = experts(x, choices, weights)
        alone = torch.cat([experts(x[i : i + 1], choices[i : i + 1], weights[i : i + 1]) for i in range(6)])
    assert torch.equal(together, alone)
    assert not experts(x, torch.full_like(choices, 4), weights).any()  # a number past the last expert: no expert


MIXTURES = pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])


@MIXTURES
def test_one_graph_of_a_mixture_serves_every_number_of_tokens(family: str, tmp_path: Path) -> None:
    """Asymmetric, with an order of rows for each expert; the same bits by both ways to load."""
    dense = families.write(family, tmp_path, act_order=True)
    model = load_model(tmp_path, torch.float32, progress=False)
    assert_same(model, dense)
    with register():
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    counter = CompileCounter()
    compiled = torch.compile(lambda ids: model(input_ids=ids, use_cache=False).logits, backend=counter, fullgraph=True)
    with torch.inference_mode():
        for tokens in (2, 3, 17):
            ids = torch.randint(5, 90, (1, tokens))
            torch._dynamo.mark_dynamic(ids, 1)
            logits = model(input_ids=ids, use_cache=False).logits
            assert torch.equal(compiled(ids), logits)
            assert torch.equal(other(input_ids=ids, use_cache=False).logits, logits)
    assert counter.frame_count == 1


@MIXTURES
def test_a_mixture_generates_in_graphs(family: str, tmp_path: Path) -> None:
    families.write(family, tmp_path)
    model = load_model(tmp_path, torch.float32, progress=False)
    generator = CompiledGenerator(model, backend="eager")
    prompt = torch.tensor([[5, 6, 7]])
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(generator.generate(prompt, 5, stop=())) == expected[0, 3:].tolist()
    assert generator.graphs > 0
    assert generator.recompiles == 0


def test_a_layer_that_takes_the_place_of_an_experts_is_called(tmp_path: Path) -> None:
    """As an adapter does."""
    families.write("qwen3_moe", tmp_path)
    experts = load_model(tmp_path, torch.float32, progress=False).model.layers[0].mlp.experts
    x, ids, weights = torch.randn(3, 64), torch.tensor([[0, 1], [1, 2], [3, 0]]), torch.rand(3, 2)
    stacks = {stack.qweight.untyped_storage().data_ptr() for stack in experts.exllama_stacks}
    layers = [layer for layer in experts.modules() if isinstance(layer, ExllamaLinear)]
    assert {layer.qweight.untyped_storage().data_ptr() for layer in layers} == stacks  # each weight is there once
    with torch.inference_mode():
        before = experts(x, ids, weights)
        inner = experts.get_submodule("1").up_proj
        experts.get_submodule("1").up_proj = nn.Sequential(inner, Doubled())
        after = experts(x, ids, weights)
        experts.get_submodule("1").up_proj = inner
        assert torch.equal(experts(x, ids, weights), before)
    assert torch.equal(after[2], before[2])
    assert not torch.equal(after[:2], before[:2])


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_experts_of_several_widths_run_eagerly_and_a_line_says_so(tmp_path: Path) -> None:
    families.write("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.2.gate_proj"
    outputs = tensors[f"{name}.scales"].shape[1]
    weight = quantize(torch.randn(outputs, 64), 8, 32, True)
    tensors |= {f"{name}.qweight": weight.qweight, f"{name}.scales": weight.scales.half()}
    tensors[f"{name}.qzeros"] = pack_columns(torch.full((2, outputs), 128), 8)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {f"+:{re.escape(name)}$": {"bits": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path, torch.float32, progress=False)
    with pytest.warns(UserWarning, match="MixtralForCausalLM runs eagerly, since which of its experts") as seen:
        generator = CompiledGenerator(model)
    assert seen[0].filename == __file__
    prompt = torch.tensor([[5, 6, 7]])
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(generator.generate(prompt, 5, stop=())) == expected[0, 3:].tolist()


def test_experts_train_what_is_before_them(tmp_path: Path) -> None:
    families.write("qwen3_moe", tmp_path)
    model = load_model(tmp_path, torch.float32, progress=False)
    x = torch.randn(3, 64, requires_grad=True)
    model.model.layers[0].mlp.experts(x, torch.tensor([[0, 1]] * 3), torch.rand(3, 2)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("layers.0.mlp.experts.3.up_proj", r"all 4 experts must be quantized, with 3 projections each; .* 11 such"),
        ("layers.1.mlp.experts.2.", r"all 4 experts must be quantized, with 3 projections each; .* 9 such"),
    ],
)
def test_experts_that_are_quantized_in_part_are_refused(missing: str, message: str, tmp_path: Path) -> None:
    families.write("mixtral", tmp_path, skip=lambda name: missing in name)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, progress=False)


def test_a_family_without_text_generation_is_refused_by_its_name(tmp_path: Path) -> None:
    families.write("phi3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "vit", "architectures": None}))
    with pytest.raises(CheckpointError, match=r"generates no text with the family 'vit'$"):
        load_model(tmp_path, progress=False)


def test_a_checkpoint_without_architectures_loads(tmp_path: Path) -> None:
    dense = families.write("phi3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert_same(load_model(tmp_path, torch.float32, progress=False), dense)


def test_code_of_the_checkpoint_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    families.write("phi3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    code = "from transformers import Phi3Config\nclass Config(Phi3Config):\n    model_type = 'own'\n"
    (tmp_path / "own_config.py").write_text(code + f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    own = {**config, "model_type": "own", "auto_map": {"AutoConfig": "own_config.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    with pytest.raises(CheckpointError, match=r"'own' needs code of this checkpoint.*trust_remote_code=True"):
        load_model(tmp_path, progress=False)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError, match="generates no text with the family 'own'"):
        load_model(tmp_path, progress=False, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_quantized_layers_are_of_this_library_in_every_family(tmp_path: Path) -> None:
    dense = families.write("t5", tmp_path)
    model = load_model(tmp_path, progress=False)
    layers = [name for name, module in model.named_modules() if isinstance(module, ExllamaLinear)]
    assert len(layers) == sum(isinstance(module, torch.nn.Linear) for module in dense.modules()) - 1  # the head
