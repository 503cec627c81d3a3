"""`exllama-ops run` on a small checkpoint: what goes to stdout and stderr, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from exllama_ops.checkpoint import save_gptq
from exllama_ops.cli import main
from exllama_ops.cli.output import CliError
from exllama_ops.nn import quantize

transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')

from exllama_ops.integrations import generation  # noqa: E402 (it needs transformers)

PROMPT = "the sky is blue"
FIELDS = {
    "model": str, "prompt": str, "text": str, "tokens": list, "prompt_tokens": int, "new_tokens": int, "compiled": bool,
    "compile_seconds": float, "graphs": int, "recompiles": int, "op_calls": dict, "prefill_tokens_per_s": float,
    "decode_tokens_per_s": float, "dtype": str, "device": str, "load_seconds": float, "weight_bytes": int,
    "peak_memory_bytes": int,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    path = tmp_path_factory.mktemp("cli") / "model"
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(letters)}}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": None}
    config = transformers.LlamaConfig(**sizes, **heads, vocab_size=264, dtype="float32")
    model = transformers.LlamaForCausalLM(config)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    weights = {name: quantize(linear.weight, 4, 32) for name, linear in linears.items()}
    tensors = {name: p.detach() for name, p in model.named_parameters() if name.rpartition(".")[0] not in linears}
    save_gptq(path, weights, tensors, config=json.loads(config.to_json_string()), sym=False, desc_act=False)

    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    return path


def run(*arguments: str | Path) -> int:
    return main(["run", *map(str, arguments)])


def test_json_is_one_object_with_every_field(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(checkpoint, "--prompt", PROMPT, "--max-new-tokens", "5", "--no-compile", "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert {name: type(value) for name, value in result.items()} == FIELDS
    assert (result["prompt"], result["model"], result["device"]) == (PROMPT, str(checkpoint), "cpu")
    assert (result["prompt_tokens"], result["new_tokens"], len(result["tokens"])) == (1 + len(PROMPT), 5, 5)
    assert (result["compiled"], result["graphs"], result["dtype"]) == (False, 0, "float32")


def test_compiled_run_streams_the_text_and_reports_on_stderr(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (checkpoint, "--prompt", PROMPT, "--max-new-tokens", "6")
    assert run(*arguments, "--no-compile", "--json") == 0
    expected = json.loads(capsys.readouterr().out)["text"]
    assert run(*arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == expected + "\n"
    layers = 2 * 7
    assert f"graphs compiled: 2 (prefill: {layers} exllama ops, decode: {layers} exllama ops)" in captured.err
    assert "recompiles:      0" in captured.err
    for name in ("prefill:", "decode:", "weights:", "peak memory:"):
        assert name in captured.err


@pytest.mark.parametrize(("options", "expected"), [([], "inductor"), (["--backend", "exllama"], "exllama")])
def test_the_backend_compiles_the_forward(
    options: list[str], expected: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, str]] = []

    def generator(model: Any, compile: bool, backend: str) -> generation.CompiledGenerator:
        asked.append((compile, backend))
        return CompiledGenerator(model, compile=False)

    CompiledGenerator = generation.CompiledGenerator
    monkeypatch.setattr(generation, "CompiledGenerator", generator)
    assert run(checkpoint, "--max-new-tokens", "2", *options) == 0
    assert asked == [(True, expected)]


def test_python_m_runs_the_same_command(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "exllama_ops", "run", str(checkpoint)]
    options = ["--prompt", PROMPT, "--max-new-tokens", "3", "--dtype", "bfloat16", "--no-compile", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["dtype"] == "bfloat16"


def test_chat_template_is_used(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text("[{{ messages[0].content }}]")
    assert run(tmp_path, "--prompt", PROMPT, "--max-new-tokens", "1", "--no-compile", "--json") == 0
    # The template writes the special tokens itself: no <s> here.
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(f"[{PROMPT}]")


def test_expected_errors_are_one_line_and_exit_code_2(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "quantize_config.json", "model.safetensors"):
        (bare / name).symlink_to(checkpoint / name)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((tmp_path / "nowhere",), "nowhere"),
        ((tmp_path,), str(tmp_path)),
        ((bare, "--no-compile"), "must hold a tokenizer"),
        ((checkpoint, "--device", "no-such-device"), "--device no-such-device"),
        ((checkpoint, "--device", "meta"), "--device meta"),
        ((checkpoint, "--max-new-tokens", "1000", "--no-compile"), "128 positions"),
    ]
    for arguments, text in cases:
        assert run(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        last = captured.err.splitlines()[-1]
        assert last.startswith("exllama-ops: error: ")
        assert text in last
        assert "Traceback" not in captured.err


def test_a_prompt_without_tokens_is_refused() -> None:
    from exllama_ops.cli.run import _prompt_tokens

    class Silent:
        chat_template = None

        def __call__(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[])

    with pytest.raises(CliError, match="at least one token"):
        _prompt_tokens(Silent(), "")


def test_unexpected_errors_keep_their_traceback(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("exllama_ops.integrations.transformers.load_model", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(checkpoint)


@pytest.mark.parametrize(
    "arguments",
    [[], ["run", "--max-new-tokens", "0"], ["run", "--dtype", "int8"], ["run", "--backend", "aot"], ["nothing"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage: exllama-ops" in capsys.readouterr().err


def test_text_of_several_tokens_per_character_streams_whole() -> None:
    from exllama_ops.cli.run import _TextStream

    class Utf8:
        """A tokenizer whose tokens are bytes."""

        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return bytes(tokens).decode("utf-8", errors="replace")

    stream = _TextStream(Utf8())
    pieces = [stream.push(byte) for byte in "aé漢".encode()]
    assert pieces == ["a", "", "é", "", "", "漢"]
    stream.push("é".encode()[0])
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert stream.text == "aé漢\N{REPLACEMENT CHARACTER}"
