"""`LayeredForward`: graphs that do not grow with the model, kept in the cache folder, and what refuses to be split."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason='needs the extra "hf"')

from exllama_ops.integrations import layer_graphs
from exllama_ops.integrations.layered import LayeredForward
from exllama_ops.integrations.layers import SplitError, description, split
from exllama_ops.integrations.static_cache import cache_interface
from integrations.test_generation import quantized_llama, random_model

CPU = torch.device("cpu")


def graph_texts(model: Any) -> list[str]:
    """The code of all graphs, as a backend gets it."""
    texts: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        texts.append(graph.code)
        return graph.forward

    LayeredForward(model, backend=backend)
    return texts


def logits_of(forward: LayeredForward, tokens: list[int], capacity: int = 64) -> list[torch.Tensor]:
    """After a prompt of all but the last two tokens, and after each of these."""
    cache = forward.new_cache(capacity)
    with torch.inference_mode():
        results = [forward(torch.tensor([tokens[:-2]]), cache)]
        results += [forward(torch.tensor([[token]]), cache) for token in tokens[-2:]]
    return results


def expected_logits(model: Any, tokens: list[int]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return list(model(torch.tensor([tokens])).logits[0, -3:])


def test_the_graphs_do_not_depend_on_the_number_of_layers() -> None:
    shallow, deep = graph_texts(quantized_llama(1)), graph_texts(quantized_llama(5))
    assert len(shallow) == 3
    assert shallow == deep


def test_each_layer_computes_with_its_own_weights() -> None:
    model = quantized_llama(3)
    tokens = [5, 17, 3, 99, 41, 8]
    results = logits_of(LayeredForward(model, backend="eager"), tokens)
    for result, expected in zip(results, expected_logits(model, tokens), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_what_is_written_into_weights_is_seen() -> None:
    model = quantized_llama(2)
    forward = LayeredForward(model, backend="eager")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(3)
        model.lm_head.weight.add_(1)
    tokens = [5, 17, 3, 99]
    torch.testing.assert_close(logits_of(forward, tokens)[-1], expected_logits(model, tokens)[-1], rtol=1e-4, atol=1e-4)


def test_attention_reads_the_positions_in_use_and_not_the_capacity() -> None:
    seen: set[int] = set()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*tensors: Any) -> Any:
            seen.update(tensor.shape[2] for tensor in tensors if tensor.dim() == 4 and tensor.shape[1] == 2)
            return graph(*tensors)

        return run

    forward = LayeredForward(random_model("Llama", max_position_embeddings=4096), backend=backend)
    logits_of(forward, list(range(40)), capacity=4096)
    assert seen == {64}
    logits_of(forward, list(range(70)), capacity=4096)
    assert seen == {64, 128}


def test_nothing_of_a_sequence_is_left_after_a_reset() -> None:
    """A NaN that attention gives the weight zero would still be a NaN."""
    forward = LayeredForward(quantized_llama(1), backend="eager")
    cache = forward.new_cache(64)
    with torch.inference_mode():
        expected = forward(torch.tensor([[1, 2, 3]]), forward.new_cache(64))
        forward(torch.tensor([[1, 2, 3, 4, 5]]), cache)
        for pair in cache.views(64):
            for memory in pair:
                memory[:, :, :5] = float("nan")
        cache.reset()
        assert torch.equal(forward(torch.tensor([[1, 2, 3]]), cache), expected)


def test_a_full_cache_is_refused_and_left_alone() -> None:
    forward = LayeredForward(quantized_llama(1), backend="eager")
    cache = forward.new_cache(4)
    with torch.inference_mode():
        forward(torch.tensor([[1, 2, 3]]), cache)
        with pytest.raises(ValueError, match="got 2 tokens, and 3 of 4 positions are used"):
            forward(torch.tensor([[4, 5]]), cache)
    assert cache.length == 3


def test_packages_are_found_by_the_next_one_which_traces_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With Inductor: the graphs of a model with other weights and the same shapes are the same ones."""
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(tmp_path))
    model, tokens = quantized_llama(2), [5, 17, 3, 99, 41, 8]
    for result, expected in zip(
        logits_of(LayeredForward(model, backend="exllama"), tokens), expected_logits(model, tokens), strict=True
    ):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)

    def traced(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it traced")

    monkeypatch.setattr(layer_graphs, "trace", traced)
    other = deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(1.25)
    forward = LayeredForward(other, backend="exllama")
    for result, expected in zip(logits_of(forward, tokens), expected_logits(other, tokens), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert forward.op_calls == {"prefill": 14, "decode": 14}
    for another in (quantized_llama(3), random_model("Llama"), quantized_llama(2).to(torch.bfloat16)):
        with pytest.raises(AssertionError, match="it traced"):
            LayeredForward(another.eval(), backend="exllama")
    with pytest.raises(AssertionError, match="it traced"):
        LayeredForward(model, backend="inductor")


class Wrapped(nn.Module):
    """A decoder layer with something around it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Any, **options: Any) -> Any:
        return self.layer(hidden, **options)


class InAList(Wrapped):
    def forward(self, hidden: Any, **options: Any) -> Any:
        return [self.layer(hidden, **options)]


class HoldsATensor(Wrapped):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.factor = torch.ones(1)


def changed(model: Any, kind: type[nn.Module]) -> Any:
    model.model.layers = nn.ModuleList(map(kind, model.model.layers))
    return model


def reason_against(model: Any) -> str:
    with pytest.raises(SplitError) as refused:
        split(model, cache_interface(model, torch.zeros(1, 2, dtype=torch.long)))
    return str(refused.value)


def test_a_model_whose_layers_are_not_one_list_is_refused() -> None:
    model = random_model("Llama")
    model.others = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert reason_against(model) == "it must have one list of 2 layers; it has 2"


def test_layers_with_tensors_that_are_no_weights_are_refused() -> None:
    assert "neither parameters nor buffers: factor" in reason_against(changed(random_model("Llama"), HoldsATensor))


def test_a_layer_that_takes_something_else_than_the_former_gave_is_refused() -> None:
    model = random_model("Llama")
    model.model.layers[1].register_forward_pre_hook(lambda layer, args: (args[0] * 2, *args[1:]))
    LayeredForward(model, backend="eager")  # a hook is a part of its layer
    layers = model.model.layers

    class Doubling(nn.ModuleList):
        def __getitem__(self, index: Any) -> Any:
            return (lambda hidden, _layer=layer, **options: _layer(hidden * 2, **options) for layer in layers)

    model.model.layers = Doubling(layers)
    with pytest.raises(ValueError, match="takes something else than what the one before it returns"):
        LayeredForward(model, backend="eager")


def test_layers_of_one_kind_have_one_description_and_others_another() -> None:
    model = random_model("Gemma2")
    first, second = model.model.layers
    texts = {description(first), description(second)}
    assert len(texts) == 2  # one has a window
    model = quantized_llama(3)
    first, second, third = model.model.layers
    assert description(first) == description(second)
    third.input_layernorm.variance_epsilon *= 2
    assert description(third) != description(first)
    second.mlp.down_proj.scales = second.mlp.down_proj.scales.clone()
    assert description(second) == description(first)
    first.self_attn.k_proj.weight_of = 3.0
    assert description(second) != description(first)


class Held:
    """What a layer may hold beside weights and plain values."""

    def __init__(self, factor: float) -> None:
        self.options = {"factor": factor}


@pytest.mark.parametrize(
    "values",
    [
        (Held(1.0), Held(2.0)),
        (partial(torch.mul, other=1.0), partial(torch.mul, other=2.0)),
        ([torch.ones(2)], [torch.zeros(2)]),
        (torch.relu, torch.sigmoid),
    ],
)
def test_layers_that_hold_other_objects_are_of_another_kind(values: tuple[Any, Any]) -> None:
    first, second, third = quantized_llama(3).model.layers
    first.mlp.held, second.mlp.held = values
    third.mlp.held = deepcopy(values[0])
    assert description(first) == description(third)
    assert description(first) != description(second)


def test_a_layer_with_a_config_of_its_own_is_of_another_kind() -> None:
    first, second = quantized_llama(2).model.layers
    second.self_attn.config = deepcopy(second.self_attn.config)
    second.self_attn.config._name_or_path = "elsewhere"
    assert description(first) == description(second)
    second.self_attn.config.rms_norm_eps *= 2
    assert description(first) != description(second)


class NormByTokens(nn.Module):
    """A last norm that looks at the tokens of the forward, though they change nothing."""

    def __init__(self, norm: nn.Module, model: Any) -> None:
        super().__init__()
        self.norm = norm
        model.embed_tokens.register_forward_hook(lambda module, args, result: setattr(self, "seen", [result]))

    def forward(self, hidden: Any) -> Any:
        return self.norm(hidden) + 0 * self.seen[0].mean()


def test_a_tail_that_depends_on_the_tokens_is_refused() -> None:
    model = random_model("Llama")
    model.model.norm = NormByTokens(model.model.norm, model.model)
    with pytest.raises(ValueError, match="what comes after its layers depends on more than what they give"):
        LayeredForward(model, backend="eager")


def test_the_description_is_text_of_no_process() -> None:
    """Addresses would make each process's key another one."""
    assert " at 0x" not in json.dumps(description(quantized_llama(1)))
