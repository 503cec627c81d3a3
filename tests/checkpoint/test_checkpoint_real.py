"""Checkpoints made by GPTQModel 7.7.0, against what its own kernel computed (tests/data/README.md)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from checkpoint.builder import DATA, decode, unpack, words_to_v1
from exllama_ops.checkpoint import open_gptq, read_gptq

NAMES = ("smol1-w2g32-asym-act", "tiny-w3g32-asym-act-v2", "tiny-w4g64-lmhead")


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_computes_what_the_other_tool_computed(name):
    reference = load_file(DATA / name / "ref" / "reference.safetensors")
    weights = read_gptq(DATA / name, progress=False)
    recorded = {key[:-2] for key in reference if key.endswith(".y")}
    assert set(weights) == recorded
    for layer, weight in weights.items():
        W = decode(weight)
        y = reference[f"{layer}.x"].double() @ W
        if weight.bias is not None:
            y += weight.bias.double()
        want = reference[f"{layer}.y"].double()
        error = ((y - want).norm() / want.norm()).item()
        assert error < 5e-4, (layer, error)
        dequantized = reference.get(f"{layer}.w_dequant")
        if dequantized is not None:
            # One rounding to float16, subnormals included.
            assert ((dequantized.double() - W).abs() <= W.abs() * 2.0**-11 + 2.0**-25).all(), layer


def test_2_bit_zeros_decode_only_by_the_whole_word_rule():
    """The checkpoint has zero points of 0; adding 1 field by field, wrapped or not, gives other weights."""
    checkpoint = open_gptq(DATA / "smol1-w2g32-asym-act")
    differing = 0
    for name in checkpoint.quantized:
        weight = checkpoint.read(name)
        stored = checkpoint.read_tensor(f"{name}.qzeros")
        assert torch.equal(words_to_v1(weight.qzeros, 2), stored)
        fields = unpack(weight.qzeros.t(), 2)
        differing += int((fields != (unpack(stored.t(), 2) + 1) % 4).sum())
    assert differing > 0


def test_the_tools_own_dynamic_rule_gives_lm_head_its_width():
    checkpoint = open_gptq(DATA / "tiny-w4g64-lmhead")
    assert checkpoint.config.lm_head
    head, layer = checkpoint.read("lm_head"), checkpoint.read("model.layers.0.mlp.up_proj")
    assert (head.bits, head.group_size, layer.bits, layer.group_size) == (8, 32, 4, 64)
    assert head.g_idx is None
    assert layer.g_idx is None


def test_act_order_is_kept_as_stored():
    checkpoint = open_gptq(DATA / "tiny-w3g32-asym-act-v2")
    for name in checkpoint.quantized:
        assert torch.equal(checkpoint.read(name).g_idx, checkpoint.read_tensor(f"{name}.g_idx"))


def test_tied_embeddings_are_one_dense_tensor():
    checkpoint = open_gptq(DATA / "smol1-w2g32-asym-act")
    assert set(checkpoint.dense) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }


@pytest.mark.parametrize("name", NAMES)
def test_weight_bytes_is_the_size_of_all_tensors(name):
    checkpoint = open_gptq(DATA / name)
    tensors = load_file(DATA / name / "model.safetensors")
    assert checkpoint.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    prefixes = tuple(f"{module}." for module in checkpoint.quantized)
    assert set(checkpoint.dense) == {tensor for tensor in tensors if not tensor.startswith(prefixes)}
