"""`CompiledGenerator` finds out which cache serves a model: the static one, the model's own, or none."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')

from exllama_ops.integrations import cache_check, static_cache  # noqa: E402 (it needs transformers)
from exllama_ops.integrations.eager import EagerForward  # noqa: E402
from exllama_ops.integrations.generation import CompiledGenerator  # noqa: E402
from exllama_ops.integrations.layered import LayeredForward  # noqa: E402
from integrations.test_generation import TRACE_ONLY, Renamed, greedy, prompt, random_model  # noqa: E402


def told_generator(model: Any, compile: bool = False, **options: Any) -> tuple[CompiledGenerator, list[str]]:
    told: list[str] = []
    return CompiledGenerator(model, compile, notify=lambda step, *counts, **more: told.append(step), **options), told


def made(config: Any, auto: Any = None) -> Any:
    torch.manual_seed(0)
    return (auto or transformers.AutoModelForCausalLM).from_config(config, dtype=torch.float32).eval()


def gpt_neo(positions: int = 1024) -> Any:
    """Its local layers have the window of the real model, and a mask that is cut by how long the keys are."""
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    kinds = [[["global", "local"], 1]]
    config = transformers.GPTNeoConfig(
        **sizes, max_position_embeddings=positions, attention_types=kinds, window_size=256, eos_token_id=None
    )
    return made(config)


def test_gpt_neo_runs_past_its_window_with_its_own_cache() -> None:
    model = gpt_neo()
    generator, told = told_generator(model)
    (line,) = told
    assert line.startswith("GPTNeoForCausalLM runs eagerly with its own cache: its logits with a static cache of 1024")
    assert list(generator.generate(prompt(250), 20)) == greedy(model, prompt(250), 20)


def test_gpt_neo_that_has_no_more_positions_than_its_window_keeps_the_static_cache() -> None:
    generator, told = told_generator(model := gpt_neo(positions=200))
    assert list(generator.generate(prompt(5), 20)) == greedy(model, prompt(5), 20)
    assert told == []


def test_a_cache_that_is_larger_than_the_checked_one_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no name says that there is a window."""
    monkeypatch.setattr(cache_check, "_MOST_TEXTS", 64)
    monkeypatch.setattr(cache_check, "largest_window", lambda config: 0)
    model = gpt_neo()
    generator, told = told_generator(model)
    assert list(generator.generate(prompt(120), 8)) == greedy(model, prompt(120), 8)
    assert told == []
    for length in (260, 250):
        assert list(generator.generate(prompt(length), 10)) == greedy(model, prompt(length), 10)
        assert len(told) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_no_fault_and_a_window_that_is_lost_is_one(dtype: torch.dtype) -> None:
    assert told_generator(random_model("Llama").to(dtype))[1] == []
    assert len(told_generator(gpt_neo().to(dtype))[1]) == 1


def one_later(update: Callable[..., Any]) -> Callable[..., Any]:
    def misplaced(layer: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return update(layer, keys.roll(1, 2), values, *args, **kwargs)

    return misplaced


def never_counts(update: Callable[..., Any]) -> Callable[..., Any]:
    def uncounted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        result = update(layer, *args, **kwargs)
        layer.cumulative_length.zero_()
        return result

    return uncounted


def forgets_the_last(update: Callable[..., Any]) -> Callable[..., Any]:
    def forgetting(layer: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = update(layer, keys, values, *args, **kwargs)
        if keys.shape[2] > 1:  # only what comes later sees it
            layer.values = layer.values.clone()
            layer.values[:, :, keys.shape[2] - 2].zero_()
        return result

    return forgetting


@pytest.mark.parametrize("fault", [one_later, never_counts, forgets_the_last])
def test_a_static_cache_with_a_fault_is_not_used(fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_cache._Layer, "update", fault(static_cache._Layer.update))
    model = random_model("Llama")
    generator, told = told_generator(model)
    assert len(told) == 1
    assert "with its own cache: its logits with a static cache" in told[0]
    assert list(generator.generate(prompt(9), 12, stop=())) == greedy(model, prompt(9), 12)


def test_a_library_user_is_warned() -> None:
    with pytest.warns(UserWarning, match="CompiledGenerator: GPTNeoForCausalLM runs eagerly with its own cache"):
        CompiledGenerator(gpt_neo(), compile=False)


def test_a_hybrid_cache_runs_eagerly_and_says_so() -> None:
    model = random_model("Lfm2", layer_types=["conv", "full_attention"])
    generator, told = told_generator(model, compile=True)
    generator.warm_up()
    assert list(generator.generate(prompt(9), 12, stop=())) == greedy(model, prompt(9), 12)
    assert told == [
        "Lfm2ForCausalLM runs eagerly with its own cache: not all of its layers cache keys and values alone "
        "(LinearAttentionLayer)"
    ]
    assert (generator.mode, generator.graphs, generator.recompiles, generator.op_calls) == (None, 0, 0, {})


def test_a_recurrent_model_runs_with_its_own_cache() -> None:
    config = transformers.MambaConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, state_size=8)
    generator, told = told_generator(model := made(config))
    assert list(generator.generate(prompt(9), 12, stop=())) == greedy(model, prompt(9), 12)
    assert len(told) == 1


def test_a_hybrid_whose_first_layer_has_no_keys_is_told_its_positions() -> None:
    """Else it asks its cache, whose first layer does not know."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 16}
    config = transformers.BambaConfig(**sizes, **heads, mamba_d_state=8, mamba_n_groups=1, attn_layer_indices=[1])
    model = made(config)
    for weight in model.parameters():
        if weight.dim() > 1:  # as they come, they are so small that attention looks alike at any position
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    generator, told = told_generator(model)
    assert list(generator.generate(prompt(5), 6, stop=())) == greedy(model, prompt(5), 6)
    assert told[0].startswith("BambaForCausalLM runs eagerly with its own cache: ")


def test_a_model_that_returns_no_cache_computes_the_whole_text() -> None:
    config = transformers.OpenAIGPTConfig(vocab_size=100, n_positions=128, n_embd=64, n_layer=2, n_head=4)
    generator, told = told_generator(model := made(config))
    assert list(generator.generate(prompt(9), 12, stop=())) == greedy(model, prompt(9), 12)
    assert told == ["OpenAIGPTLMHeadModel runs eagerly without a cache, since it returns no cache"]


class Forgetful(Renamed):
    """It returns a cache, and reads none."""

    def forward(self, input_ids: Tensor, state: Any = None, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.model(input_ids=input_ids, use_cache=False).logits, state=[1])


class Failing(Renamed):
    """It fails where it makes a cache."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        if use_cache:
            raise KeyError("no kernel for caches")
        return self.model(input_ids=input_ids, use_cache=False)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Forgetful, "its logits with its own cache are"),
        (Failing, "its forward fails with its own cache: 'no kernel for caches'"),
    ],
)
def test_without_a_cache_that_is_right_there_is_none(kind: type[Renamed], reason: str) -> None:
    model = kind(random_model("Llama")).eval()
    generator, told = told_generator(model)
    assert list(generator.generate(prompt(9), 12, stop=())) == greedy(model, prompt(9), 12)
    assert len(told) == 1
    assert told[0].startswith(f"{kind.__name__} runs eagerly without a cache, since {reason}")


def encoder_decoder_tokens(model: Any, tokens: list[int], start: int, new: int) -> list[int]:
    decoded = [start]
    with torch.inference_mode():
        for _ in range(new):
            ids = {"input_ids": torch.tensor([tokens]), "decoder_input_ids": torch.tensor([decoded])}
            decoded.append(int(model(**ids, use_cache=False).logits[0, -1].argmax()))
    return decoded[1:]


def test_the_prompt_of_an_encoder_decoder_goes_into_its_encoder() -> None:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    config = transformers.T5Config(**sizes, decoder_start_token_id=3)
    model = made(config, transformers.AutoModelForSeq2SeqLM)
    generator, told = told_generator(model)
    for length, new in ((9, 12), (70, 3), (2, 70)):
        expected = encoder_decoder_tokens(model, prompt(length), 3, new)
        assert list(generator.generate(prompt(length), new, stop=())) == expected
    assert told == ["T5ForConditionalGeneration runs eagerly with its own cache: it is an encoder-decoder"]


def test_positions_of_an_encoder_and_of_its_decoder_are_counted_apart() -> None:
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    config = transformers.BartConfig(**sizes, vocab_size=100, max_position_embeddings=40, decoder_start_token_id=2)
    generator, _ = told_generator(model := made(config, transformers.AutoModelForSeq2SeqLM))
    expected = encoder_decoder_tokens(model, prompt(40), 2, 39)
    assert list(generator.generate(prompt(40), 39, stop=())) == expected
    for length, new in ((41, 1), (1, 40)):
        with pytest.raises(ValueError, match="must fit the model's 40 positions"):
            generator.prefill(prompt(length), new)


def test_a_text_that_reaches_the_turning_point_of_its_positions_is_computed_anew() -> None:
    """As transformers' own generation does it: keys that are cached before have the positions of short texts."""
    factors = {"long_factor": [4.0] * 8, "short_factor": [1.0] * 8, "factor": 8.0}
    rotary = {"rope_type": "longrope", "rope_theta": 1e4, **factors, "original_max_position_embeddings": 16}
    model = random_model("Phi3", rope_parameters=rotary, original_max_position_embeddings=16, pad_token_id=0)
    generator, told = told_generator(model)
    for length in (10, 16, 17):
        assert list(generator.generate(prompt(length), 12, stop=())) == greedy(model, prompt(length), 12)
    assert told == []


def negated(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    return lambda *args: [-result if result.is_floating_point() else result for result in graph(*args)]


def test_graphs_that_compute_something_else_are_not_used() -> None:
    model = random_model("Llama")
    generator, told = told_generator(model, compile=True, mode="whole", backend=negated)
    generator.warm_up()
    assert any("with its own cache: its logits with its graphs are 200.0% away" in line for line in told)
    assert list(generator.generate(prompt(9), 12, stop=())) == greedy(model, prompt(9), 12)


def test_a_forward_that_cannot_run_eagerly_refuses_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = "GPTNeoForCausalLM cannot be compiled layer by layer: its logits with a static cache of"
    with pytest.raises(ValueError, match=f"{refused} 1024 positions are"):
        LayeredForward(gpt_neo(), backend=TRACE_ONLY)
    monkeypatch.setattr(cache_check, "_MOST_TEXTS", 64)
    forward = LayeredForward(random_model("Llama"), backend=TRACE_ONLY)
    forward.new_cache(100)
    monkeypatch.setattr(static_cache._Layer, "update", never_counts(static_cache._Layer.update))
    forward.new_cache(100)
    with pytest.raises(ValueError, match="its logits with a static cache of 101 positions are"):
        forward.new_cache(101)


def test_layers_that_share_keys_and_values_have_an_empty_place_in_the_cache() -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_kv_shared_layers": 2}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 100}
    more = {"vocab_size_per_layer_input": 100, "hidden_size_per_layer_input": 16, "laurel_rank": 8}
    config = transformers.Gemma3nTextConfig(
        **sizes, **heads, **more, sliding_window=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    generator, told = told_generator(model := made(config))
    assert list(generator.generate(prompt(9), 12, stop=())) == greedy(model, prompt(9), 12)
    assert told == []


class ReadsItsNumbers(torch.nn.Module):
    """A layer whose Python code depends on the values of a tensor, which no whole graph can do."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Any, **options: Any) -> Any:
        return self.layer(hidden, **options) * (2.0 if float(hidden.abs().max()) < 1e9 else 1.0)


def test_a_model_that_cannot_be_traced_runs_eagerly_and_says_so() -> None:
    model = random_model("Llama")
    model.model.layers = torch.nn.ModuleList(map(ReadsItsNumbers, model.model.layers))
    generator, told = told_generator(model, compile=True, backend=TRACE_ONLY)
    assert list(generator.generate(prompt(7), 8, stop=())) == greedy(model, prompt(7), 8)
    assert generator.mode is None
    assert sum("LlamaForCausalLM runs eagerly, since Dynamo cannot trace it" in line for line in told) == 1


def test_an_eager_step_passes_no_cache_but_the_one_that_was_returned() -> None:
    model = random_model("Llama")
    uncached, cached = EagerForward(model, cached=False), EagerForward(model)
    ids = torch.tensor([prompt(9)])
    with torch.inference_mode():
        expected = model(ids).logits[0, -1]
        for forward in (uncached, cached):
            text = forward.new_cache(0)
            forward(ids[:, :4], text)
            torch.testing.assert_close(forward(ids[:, 4:], text), expected, rtol=0, atol=1e-5)
            assert (text.cache is None) == (forward is uncached)


def test_a_shift_of_all_logits_is_no_difference() -> None:
    expected = torch.tensor([1.0, 2.0, 4.0, -torch.inf], dtype=torch.float64)
    assert cache_check._difference(expected + 3, expected) < 1e-12
    assert cache_check._difference(expected[[1, 0, 2, 3]], expected) > 0.1
    for wrong in (torch.nan, torch.inf):
        assert cache_check._difference(torch.full_like(expected, wrong), expected) == torch.inf
