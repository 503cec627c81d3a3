"""`CompiledGenerator`: few graphs for prompts and generations of any length, and the tokens of the eager forward."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections import Counter
from typing import Any

import pytest
import torch

from compile.blocks import Recorder

transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')

from exllama_ops.integrations import whole  # noqa: E402 (it needs transformers)
from exllama_ops.integrations.generation import (  # noqa: E402 (it needs transformers)
    MODES,
    CompiledGenerator,
    CompilerUnavailableError,
)
from exllama_ops.integrations.sampling import Sampler  # noqa: E402
from exllama_ops.nn import convert, quantize  # noqa: E402

PROMPT_LENGTHS = [7, 12, 3, 33, 2]
# Tracing is what these tests are about; one test at the end pays for Inductor.
TRACE_ONLY = "eager"


def prompt(length: int, vocabulary: int = 100) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, vocabulary, (length,), generator=generator).tolist()


def greedy(model: Any, tokens: list[int], new: int) -> list[int]:
    """The tokens of the plain eager forward: no cache, the whole sequence each time."""
    sequence = list(tokens)
    with torch.inference_mode():
        for _ in range(new):
            sequence.append(int(model(torch.tensor([sequence])).logits[0, -1].argmax()))
    return sequence[len(tokens) :]


def random_model(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 200}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **heads, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return quantized_llama(2)


def quantized_llama(layers: int) -> Any:
    """A random Llama, its decoder quantized to 4 bits."""
    dense = random_model("Llama", num_hidden_layers=layers)
    names = [name for name, module in dense.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name]
    convert(dense, {name: quantize(dense.get_submodule(name).weight, 4, 32) for name in names})
    return dense


@pytest.fixture(scope="module", params=MODES)
def traced(request: pytest.FixtureRequest, model: Any) -> CompiledGenerator:
    return CompiledGenerator(model, mode=request.param, backend=TRACE_ONLY)


def graphs_of(generator: CompiledGenerator) -> int:
    """As many as a model has whose layers are all of one kind."""
    return {"whole": 2, "layers": 3}[str(generator.mode)]


@pytest.mark.parametrize("length", [*PROMPT_LENGTHS, 1, 63, 64, 65])
def test_the_graphs_give_the_tokens_of_the_eager_forward(model: Any, traced: CompiledGenerator, length: int) -> None:
    tokens = prompt(length)
    assert list(traced.generate(tokens, 4, stop=())) == greedy(model, tokens, 4)
    assert traced.graphs <= graphs_of(traced)
    assert traced.recompiles == 0


def test_a_longer_generation_moves_to_a_larger_cache_without_a_graph(model: Any, traced: CompiledGenerator) -> None:
    traced.warm_up()
    lengths = []
    for new in (10, 60, 100, 10):
        list(traced.generate(prompt(7), new, stop=()))
        lengths.append(traced.cache_length)
    assert lengths == [64, 128, 128, 64]
    assert (traced.graphs, traced.recompiles) == (graphs_of(traced), 0)


def test_graphs_hold_every_quantized_layer(model: Any, traced: CompiledGenerator) -> None:
    traced.warm_up()
    layers = sum(type(module).__name__ == "ExllamaLinear" for module in model.modules())
    assert layers > 0
    assert traced.op_calls == {"prefill": layers, "decode": layers}


def test_prompts_of_any_length_need_no_graph_after_one_prefill_and_one_decode(model: Any) -> None:
    """Under the pass of the backend "exllama", which takes q, k, v and gate, up together in every layer."""
    recorder = Recorder()
    generator = CompiledGenerator(model, mode="whole", backend=recorder)
    generator.warm_up()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (*PROMPT_LENGTHS, 63, 64, 1):
            assert list(generator.generate(prompt(length), 4, stop=())) == greedy(model, prompt(length), 4)
    layers = model.config.num_hidden_layers
    expected = Counter({"gptq_gemm_multi/3": layers, "gptq_gemm_multi/2": layers, "gptq_gemm": 2 * layers})
    assert recorder.after == 2 * [expected]


@pytest.mark.pinned
def test_each_layer_costs_the_same_guards_and_ours_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are checked in each step: what grew with the square of the layers, or was added to one, would show."""
    kept: list[tuple[str, str]] = []

    def keep(guards: Any) -> list[bool]:
        choice = without_registry(guards)
        kept[:] = [(guard.guard_type, guard.name) for guard, chosen in zip(guards, choice, strict=True) if chosen]
        return choice

    without_registry = whole._without_registry
    monkeypatch.setattr(whole, "_without_registry", keep)
    of_models, of_projections = [], {}
    for layers in (1, 2, 3):
        CompiledGenerator(quantized_llama(layers), mode="whole", backend=TRACE_ONLY).prefill([0], 2)
        of_models.append(Counter(kind for kind, _ in kept))
        for kind, name in set(kept):
            if found := re.search(r"\['layers'\]\._modules\['(\d)'\].*\['(\w+_proj)'\]", name):
                of_projections.setdefault((layers, *found.groups()), Counter())[kind] += 1
    one, two, three = of_models
    assert one <= two <= three
    assert three - two == two - one
    assert len(of_projections) == 7 * (1 + 2 + 3)
    for projection in of_projections.values():
        # The first layer has these: its forward and helpers are the functions that were traced.
        del projection["CLOSURE_MATCH"]
        assert projection == {
            "TENSOR_MATCH": 4,  # qweight, qzeros, scales, perm
            "CONSTANT_MATCH": 6,  # no bias, in_features and the options, the dtype of the scales
            "EQUALS_MATCH": 3,
            "TYPE_MATCH": 3,
            "NOT_PRESENT_IN_GENERIC_DICT": 1,
            "EMPTY_NN_MODULE_HOOKS_DICT": 6,
        }


def test_a_first_prompt_of_one_token_compiles_decode_alone(model: Any) -> None:
    generator = CompiledGenerator(model, mode="whole", backend=TRACE_ONLY)
    assert list(generator.generate(prompt(1), 3, stop=())) == greedy(model, prompt(1), 3)
    assert (generator.graphs, generator.recompiles) == (1, 0)


def test_a_first_prompt_that_fills_its_bucket_but_for_one(model: Any) -> None:
    generator = CompiledGenerator(model, mode="whole", backend=TRACE_ONLY)
    for length in (63, 7, 100):
        assert list(generator.generate(prompt(length), 1, stop=())) == greedy(model, prompt(length), 1)
    list(generator.generate(prompt(5), 2, stop=()))
    assert (generator.graphs, generator.recompiles) == (2, 0)


@pytest.mark.parametrize(
    ("mode", "kind", "graphs"),
    # Gemma2 has layers with a window and layers without.
    [("whole", "Mistral", 2), ("whole", "Gemma2", 2), ("layers", "Mistral", 3), ("layers", "Gemma2", 5)],
)
def test_sliding_windows_and_other_models_in_the_same_process(mode: str, kind: str, graphs: int) -> None:
    model = random_model(kind, sliding_window=8)
    generator = CompiledGenerator(model, mode=mode, backend=TRACE_ONLY)
    for length in (20, 3, 33, 1):
        assert list(generator.generate(prompt(length), 12, stop=())) == greedy(model, prompt(length), 12)
    assert (generator.graphs, generator.recompiles) == (graphs, 0)


def test_a_model_of_a_new_class_in_the_process_costs_no_recompile(model: Any) -> None:
    generator = CompiledGenerator(model, mode="whole", backend=TRACE_ONLY)
    generator.warm_up()
    random_model("Qwen2")
    generator.warm_up()
    assert (generator.graphs, generator.recompiles) == (2, 0)


def test_a_new_generation_forgets_the_former(model: Any) -> None:
    generator = CompiledGenerator(model, compile=False)
    first = generator.prefill(prompt(9), 4)
    generator.prefill(prompt(30), 4)
    assert torch.equal(generator.prefill(prompt(9), 4), first)


def test_two_generations_at_a_time_are_refused(model: Any) -> None:
    """They would share the one cache."""
    generator = CompiledGenerator(model, compile=False)
    first = generator.generate(prompt(7), 4, stop=())
    next(first)
    next(generator.generate(prompt(3), 4, stop=()))
    with pytest.raises(ValueError, match="one generation at a time"):
        next(first)


def test_generation_ends_with_a_stop_token(model: Any) -> None:
    generator = CompiledGenerator(model, compile=False)
    tokens = list(generator.generate(prompt(7), 8, stop=()))
    stop = tokens[2]
    assert list(generator.generate(prompt(7), 8, stop={stop})) == tokens[: tokens.index(stop) + 1]


def test_the_caller_is_not_left_in_inference_mode(model: Any) -> None:
    for _ in CompiledGenerator(model, compile=False).generate(prompt(3), 2):
        assert not torch.is_inference_mode_enabled()


def test_prompts_may_be_tensors_of_any_mode(model: Any, traced: CompiledGenerator) -> None:
    traced.warm_up()
    expected = traced.prefill(prompt(6)).clone()
    with torch.inference_mode():
        inside = torch.tensor(prompt(6))
    for tokens in (inside, torch.tensor(prompt(6)), torch.tensor(prompt(6), dtype=torch.int32)):
        assert torch.equal(traced.prefill(tokens), expected)
    assert (traced.graphs, traced.recompiles) == (graphs_of(traced), 0)


def test_a_model_whose_prompt_is_no_text_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "main_input_name", "input_features")
    with pytest.raises(ValueError, match=r"must take tokens as its prompt; .* takes input_features"):
        CompiledGenerator(model)


def test_errors_name_the_numbers(model: Any) -> None:
    generator = CompiledGenerator(model, compile=False)
    with pytest.raises(ValueError, match=r"at least 1 token.*got 0 and 1"):
        generator.prefill([])
    with pytest.raises(ValueError, match=rf"{generator.max_length} positions; got 3 \+ {generator.max_length}"):
        generator.prefill([1, 2, 3], generator.max_length)
    with pytest.raises(ValueError, match="room for a token"):
        generator.decode(0)
    with pytest.raises(ValueError, match="eval mode"):
        CompiledGenerator(random_model("Mistral").train())


class Renamed(torch.nn.Module):
    """A model whose forward takes its cache under a name of its choice, or in its keyword arguments alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config, self.generation_config = model.config, model.generation_config
        self.get_input_embeddings = model.get_input_embeddings
        (self.argument,) = {"cache", "past_key_values"} & set(inspect.signature(model.forward).parameters)


class TakesCache(Renamed):
    def forward(self, input_ids: Any, cache: Any = None, **options: Any) -> Any:
        assert "past_key_values" not in options
        return self.model(input_ids=input_ids, **{self.argument: cache}, **options)


class TakesPastKeyValues(Renamed):
    def forward(self, input_ids: Any, past_key_values: Any = None, **options: Any) -> Any:
        assert "cache" not in options
        return self.model(input_ids=input_ids, **{self.argument: past_key_values}, **options)


class TakesKeywords(Renamed):
    def forward(self, *args: Any, **options: Any) -> Any:
        assert set(options) <= {"input_ids", "use_cache", "logits_to_keep", self.argument}
        return self.model(*args, **options)


@pytest.mark.parametrize("kind", [TakesCache, TakesPastKeyValues, TakesKeywords])
def test_the_cache_is_passed_by_the_name_that_the_forward_has(model: Any, kind: type[Renamed]) -> None:
    """A forward with keyword arguments takes any other name in silence, and computes without what was cached."""
    generator = CompiledGenerator(kind(model).eval(), compile=False)
    assert list(generator.generate(prompt(7), 4, stop=())) == greedy(model, prompt(7), 4)


def test_nothing_is_used_that_transformers_warns_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so once in a process, and names the version that goes without."""
    told: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda logger, text, *args: told.append(text))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(CompiledGenerator(model, compile=False).generate(prompt(7), 4))
    assert told == []


def test_a_sampler_draws_the_tokens(model: Any) -> None:
    generator = CompiledGenerator(model, compile=False)
    drawn = [list(generator.generate(prompt(7), 8, stop=(), sampler=Sampler(3.0, seed=seed))) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_logits_that_are_not_finite_are_refused_by_a_sampler() -> None:
    model = random_model("Llama")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits must be finite"):
        list(CompiledGenerator(model, compile=False).generate(prompt(3), 2, stop=(), sampler=Sampler()))


class CountsItsLayers(torch.nn.Module):
    """A layer whose result depends on its number, as some families have it."""

    def __init__(self, layer: Any, index: int) -> None:
        super().__init__()
        self.layer, self.layer_idx = layer, index

    def forward(self, hidden: Any, **options: Any) -> Any:
        return self.layer(hidden, **options) * (1.0 + self.layer_idx)


def test_a_model_that_cannot_be_split_is_compiled_whole_and_says_why() -> None:
    model = random_model("Llama")
    model.model.layers = torch.nn.ModuleList(map(CountsItsLayers, model.model.layers, range(2)))
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be compiled layer by layer: a layer computes with"):
        CompiledGenerator(model, mode="layers", backend=TRACE_ONLY).warm_up()
    told: list[str] = []
    generator = CompiledGenerator(model, backend=TRACE_ONLY, notify=lambda step, *counts, **more: told.append(step))
    assert list(generator.generate(prompt(7), 4, stop=())) == greedy(model, prompt(7), 4)
    assert (generator.mode, generator.graphs) == ("whole", 2)
    assert any("computes with its number; its whole forward is compiled" in step for step in told)


def test_an_unknown_mode_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="mode must be one of layers, whole, or None; got 'regions'"):
        CompiledGenerator(model, mode="regions")


def test_without_a_compiler_the_error_says_what_to_do(model: Any) -> None:
    class InvalidCxxCompiler(RuntimeError):
        """As Inductor's of this name, whose module moved between versions."""

    def backend(graph: Any, inputs: Any) -> Any:
        raise InvalidCxxCompiler("No working C++ compiler found in ['no-such-compiler']")

    generator = CompiledGenerator(model, mode="whole", backend=backend)
    with pytest.raises(CompilerUnavailableError, match=r"No working C\+\+ compiler found.*--no-compile"):
        generator.prefill([1, 2, 3])


def test_the_backend_exllama_compiles_two_graphs_and_no_third(model: Any) -> None:
    """With Inductor behind it, which the tests above do without."""
    generator = CompiledGenerator(model, mode="whole", backend="exllama")
    generator.warm_up()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, new in ((7, 3), (2, 3), (33, 3), (1, 3), (60, 8)):
            assert list(generator.generate(prompt(length), new, stop=())) == greedy(model, prompt(length), new)
    assert (generator.graphs, generator.recompiles) == (2, 0)
