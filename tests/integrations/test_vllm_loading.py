"""What vLLM's loaders are not given, and layers that are read again: without vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exllama_ops import ExllamaLinear, GptqWeight, open_checkpoint, quantize, save_gptq
from exllama_ops.checkpoint import Checkpoint
from exllama_ops.integrations.vllm.loading import PackedLayers, hold, refill

K, N = 64, 32
NAMES = ("model.layers.0.a_proj", "model.layers.1.a_proj")
# Dense tensors that are called as those of a quantized layer are, one of them in a layer.
STRAY = ("model.norm.scales", "layers.0.a_proj.scales")


def weight(seed: int, bits: int = 4, group_size: int = 32) -> GptqWeight:
    torch.manual_seed(seed)
    g_idx = (torch.arange(K) // group_size)[torch.randperm(K)].int()
    return quantize(torch.randn(N, K), bits, group_size, g_idx=g_idx)


def written(path: Path, seed: int) -> Checkpoint:
    """Two quantized layers, one dense, and dense tensors that are called as those of a quantized layer are."""
    tensors = {**dict.fromkeys(STRAY, torch.ones(3)), "model.norm.weight": torch.full((K,), float(seed))}
    save_gptq(path, {name: weight(seed + i) for i, name in enumerate(NAMES)}, tensors, sym=False, desc_act=True)
    return open_checkpoint(path)


def tensors_of(checkpoint: Checkpoint) -> list[tuple[str, Tensor]]:
    packed = [f"{name}.{kind}" for name in NAMES for kind in ("qweight", "qzeros", "scales", "g_idx")]
    return [(name, checkpoint.read_tensor(name)) for name in (*packed, *checkpoint.dense)]


class Reader:
    """As the methods of vLLM's layers: reads one layer of the files that it opens."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.layers = PackedLayers()
        self.names: dict[int, str] = {}
        self.read = 0

    def products(self, layer: Any) -> nn.ModuleList:
        self.read += 1
        return nn.ModuleList([ExllamaLinear.from_weight(self.checkpoint.read(self.names[id(layer)]))])

    def load(self, name: str) -> nn.Module:
        layer = nn.Module()
        self.names[id(layer)] = name
        self.layers.add(name, f"language.{name}")
        hold(layer, self.products(layer))
        self.layers.was_read([name], self, layer)
        return layer

    def read_again(self, layer: Any) -> None:
        refill(layer, self.products(layer), self.names[id(layer)])

    def left(self, weights: list[tuple[str, Tensor]], to: Checkpoint | None = None) -> list[str]:
        def reopen() -> Checkpoint:
            self.checkpoint = to or self.checkpoint
            return self.checkpoint

        return [name for name, _ in self.layers.left(weights, self.checkpoint, reopen)]


def test_tensors_of_quantized_layers_alone_are_left_out(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, 0)
    reader = Reader(checkpoint)
    everything = tensors_of(checkpoint)
    assert reader.left(everything) == [name for name, _ in everything]  # none of them was taken
    reader.layers.add(NAMES[0], f"language.{NAMES[0]}")
    second = [name for name, _ in everything if name.startswith(NAMES[1])]
    assert reader.left(everything) == [*second, *checkpoint.dense]
    assert {*STRAY} < {*checkpoint.dense}
    # A loader of a part of the model sees names within it, in vLLM or in the files.
    assert reader.left([("layers.0.a_proj.qweight", torch.ones(1)), ("0.a_proj.bias", torch.ones(1))]) == [
        "0.a_proj.bias"
    ]


def test_a_layer_is_read_again_in_place_when_its_tensors_pass(tmp_path: Path) -> None:
    first, second = written(tmp_path / "first", 0), written(tmp_path / "second", 7)
    reader = Reader(first)
    layers = [reader.load(name) for name in NAMES]
    places = [product.qweight.data_ptr() for layer in layers for product in layer.exllama]
    reader.left([("model.norm.weight", torch.ones(K))], to=second)
    assert reader.read == 2
    reader.left(tensors_of(second), to=second)
    assert reader.read == 4  # once for each layer
    for name, layer in zip(NAMES, layers, strict=True):
        (product,) = layer.exllama
        assert torch.equal(product.dequantize(), ExllamaLinear.from_weight(second.read(name)).dequantize())
    assert places == [product.qweight.data_ptr() for layer in layers for product in layer.exllama]


def test_layers_that_had_one_order_may_get_several(tmp_path: Path) -> None:
    same, other = weight(0), weight(1)
    layers = [nn.Module(), nn.Module()]
    for layer in layers:
        hold(layer, nn.ModuleList([ExllamaLinear.from_weight(same)]))
    refill(layers[0], nn.ModuleList([ExllamaLinear.from_weight(other)]), "name")
    for layer, expected in zip(layers, (other, same), strict=True):
        assert torch.equal(layer.exllama[0].dequantize(), ExllamaLinear.from_weight(expected).dequantize())


def test_tensors_that_vllm_took_out_of_the_modules_are_filled(tmp_path: Path) -> None:
    """vLLM puts the same tensors back when its loaders are done."""
    layer = nn.Module()
    hold(layer, nn.ModuleList([ExllamaLinear.from_weight(weight(0))]))
    product = layer.exllama[0]
    taken = dict(product.named_buffers())
    product._buffers.clear()
    refill(layer, nn.ModuleList([ExllamaLinear.from_weight(weight(1))]), "name")
    for name, tensor in taken.items():
        product.register_buffer(name, tensor)
    assert torch.equal(product.dequantize(), ExllamaLinear.from_weight(weight(1)).dequantize())


@pytest.mark.parametrize(("bits", "group_size"), [(8, 32), (4, 64), (4, 48)])
def test_weights_of_another_form_are_refused(bits: int, group_size: int) -> None:
    """Groups of 48 are as many as those of 32, and the last is partial."""
    layer = nn.Module()
    hold(layer, nn.ModuleList([ExllamaLinear.from_weight(weight(0))]))
    with pytest.raises(ValueError, match=r"a_proj: exllama_ops puts other weights .* start vLLM again"):
        refill(layer, nn.ModuleList([ExllamaLinear.from_weight(weight(0, bits, group_size))]), "a_proj")


def test_weights_that_are_sent_and_not_in_the_files_are_refused(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, 0)
    reader = Reader(checkpoint)
    held = [reader.load(name) for name in NAMES]
    name = f"{NAMES[1]}.scales"
    stored = checkpoint.read_tensor(name)
    assert reader.left([(name, stored)]) == []
    for other in (stored * 2, stored.double(), stored[:1]):
        with pytest.raises(ValueError, match=rf"{name}: exllama_ops reads quantized layers from files, and was given"):
            reader.left([(name, other)])
    with pytest.raises(ValueError, match=r"a_proj.scales: exllama_ops cannot tell which layer is meant"):
        reader.left([("a_proj.scales", stored)])
    assert held


def test_the_plugin_imports_nothing_of_vllm_until_it_is_registered() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "vllm": raise ImportError("no vLLM here")
sys.meta_path.insert(0, Refuse())
from exllama_ops.integrations.vllm import register, loading, parts
try:
    register()
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "no vLLM here\n"
