"""convert: named Linear layers become ExllamaLinear, or nothing changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path

import accelerate.hooks
import pytest
import torch
from torch import nn

from exllama_ops import ExllamaLinear, GptqWeight, convert, quantize


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 32, bias=False)), nn.Linear(32, 8))


def weights(net: nn.Module, *names: str) -> dict[str, GptqWeight]:
    layers = {name: net.get_submodule(name) for name in names}
    return {name: quantize(layer.weight, 8, 32, bias=layer.bias) for name, layer in layers.items()}


def test_named_layers_are_replaced_and_the_others_reported() -> None:
    net = model().eval()
    x = torch.randn(5, 96)
    before = net(x)
    report = convert(net, weights(net, "0", "2.0"))
    assert report.converted == ("0", "2.0")
    assert report.untouched == ("3",)
    assert isinstance(net[0], ExllamaLinear)
    assert isinstance(net[2][0], ExllamaLinear)
    assert not net[0].training
    torch.testing.assert_close(net(x), before, rtol=0, atol=0.02)
    assert str(report) == "converted 2 Linear layers; left as they were: 3"


@pytest.mark.parametrize("name", ["9", "2.1", "1", "2", ""])
def test_a_name_that_is_no_linear_is_refused_and_nothing_is_replaced(name: str) -> None:
    net = model()
    with pytest.raises(ValueError, match="convert: "):
        convert(net, {"0": weights(net, "0")["0"], name: weights(net, "2.0")["2.0"]})
    assert type(net[0]) is nn.Linear


def test_an_error_while_reading_leaves_the_model_as_it_was() -> None:
    net = model()

    class Truncated(Mapping[str, GptqWeight]):
        def __getitem__(self, name: str) -> GptqWeight:
            if name == "2.0":
                raise OSError("truncated file")
            return weights(net, name)[name]

        def __iter__(self) -> Iterator[str]:
            return iter(("0", "2.0"))

        def __len__(self) -> int:
            return 2

    with pytest.raises(OSError, match="truncated file"):
        convert(net, Truncated())
    assert type(net[0]) is nn.Linear


def test_wrong_sizes_and_lost_biases_are_refused() -> None:
    net = model()
    with pytest.raises(ValueError, match=r"'0' must have a weight of \(K, N\) = \(96, 64\); got \(64, 32\)"):
        convert(net, {"0": weights(net, "2.0")["2.0"]})
    with pytest.raises(ValueError, match="'0' has a bias, which its weight lacks"):
        convert(net, {"0": quantize(net[0].weight, 4, 32)})


def test_layers_that_do_more_than_a_linear_are_refused() -> None:
    class Halved(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    net = nn.Sequential(Halved(96, 64), nn.Linear(64, 32))
    with pytest.raises(ValueError, match=r"'0' must be a layer .* that computes x @ W \+ bias.*; Halved does not"):
        convert(net, weights(net, "0"))
    net[1].register_forward_hook(lambda module, args, out: out / 2)
    with pytest.raises(ValueError, match="'1' has hooks"):
        convert(net, weights(net, "1"))
    dispatched = accelerate.hooks.add_hook_to_module(nn.Linear(64, 32), accelerate.hooks.ModelHook())
    with pytest.raises(ValueError, match="'0' has hooks"):
        convert(nn.Sequential(dispatched), {"0": quantize(dispatched.weight, 4, 32, bias=dispatched.bias)})


def test_layers_take_device_and_dtype_of_those_they_replace() -> None:
    net = model().to(torch.bfloat16)
    convert(net, {"0": quantize(net[0].weight, 4, 32, bias=net[0].bias.float())})
    assert net[0].bias.dtype == torch.bfloat16
    on_meta = model().to("meta")
    convert(on_meta, weights(model(), "0"))
    assert on_meta[0].qweight.device.type == "cpu"


def test_a_converted_transformers_model_is_not_saved_as_files_that_load_at_random(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))
    name = "model.layers.0.mlp.up_proj"
    convert(model, {name: quantize(model.get_submodule(name).weight, 4, 32)})
    for saved in (model, deepcopy(model)):
        with pytest.raises(ValueError, match=r"layers that exllama_ops\.convert put in.*save_gptq"):
            saved.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
