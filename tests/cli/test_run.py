"""`exllama-ops run` on a small checkpoint: what goes to stdout and stderr, and how it fails."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exllama_ops import backends
from exllama_ops.cli import main
from exllama_ops.cli.output import CliError
from exllama_ops.progress import Notify

transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')

from exllama_ops.integrations import generation  # noqa: E402 (it needs transformers)

PROMPT = "the sky is blue"
FIELDS = {
    "model": str, "prompt": str, "text": str, "tokens": list, "prompt_tokens": int, "new_tokens": int, "compiled": bool,
    "compile_seconds": float, "graphs": int, "recompiles": int, "op_calls": dict, "prefill_tokens_per_s": float,
    "decode_tokens_per_s": float, "dtype": str, "device": str, "load_seconds": float, "weight_bytes": int,
    "peak_memory_bytes": int, "interrupted": bool, "temperature": float, "top_p": type(None), "seed": type(None),
    "threads": int, "mode": type(None), "seconds": dict, "cpu_seconds": dict,
}  # fmt: skip
PHASES = {"start", "checkpoint", "build", "load", "compile", "prefill", "first_token"}


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
    assert f"graphs:          3 (layers; prefill: {layers} exllama ops, decode: {layers} exllama ops)" in captured.err
    assert re.search(r"^(compiling the graphs \(3 of 3\)|loading the compiled graphs): \d+\.\d s$", captured.err, re.M)
    assert "recompiles:      0" in captured.err
    for name in ("prefill:", "decode:", "weights:", "peak memory:"):
        assert name in captured.err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (True, None, "exllama")),
        (["--backend", "inductor"], (True, None, "inductor")),
        (["--whole"], (True, "whole", "exllama")),
        (["--no-compile"], (False, None, "exllama")),
    ],
)
def test_how_the_forward_is_compiled(
    options: list[str], expected: tuple[Any, ...], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def generator(
        model: Any, compile: bool, *, mode: str | None, backend: str, notify: Notify
    ) -> generation.CompiledGenerator:
        asked.append((compile, mode, backend))
        return CompiledGenerator(model, compile=False, notify=notify)

    CompiledGenerator = generation.CompiledGenerator
    monkeypatch.setattr(generation, "CompiledGenerator", generator)
    assert run(checkpoint, "--max-new-tokens", "2", *options) == 0
    assert asked == [expected]


def test_python_m_runs_the_same_command(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "exllama_ops", "run", str(checkpoint)]
    options = ["--prompt", PROMPT, "--max-new-tokens", "3", "--dtype", "bfloat16", "--no-compile", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["dtype"] == "bfloat16"
    assert done.stderr.splitlines()[-1].startswith("peak memory:")  # and no library says a word when it ends


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
        ((checkpoint, "--top-p", "0.9"), "--top-p: is for tokens that are drawn"),
        ((checkpoint, "--seed", "1", "--temperature", "0"), "--seed: is for tokens that are drawn"),
        ((checkpoint, "--lm-head-bits", "5"), "lm_head_bits must be None or one of"),
        ((checkpoint, "--prompt", "-", "--prompt", "-"), "stdin can be read once"),
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
    from exllama_ops.cli.text import prompt_tokens

    class Silent:
        chat_template = None

        def __call__(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[])

    with pytest.raises(CliError, match="at least one token"):
        prompt_tokens(Silent(), "")


def test_unexpected_errors_keep_their_traceback(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("exllama_ops.integrations.transformers.load_model", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(checkpoint)


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["nothing"]),
        *(["run", "--max-new-tokens", "0"], ["run", "--dtype", "int8"], ["run", "--backend", "aot"]),
        *(["run", "--threads", "0"], ["run", "--temperature", "-1"], ["chat", "--temperature", "nan"]),
        *(["run", "--top-p", "0"], ["run", "--top-p", "1.1"], ["run", "--seed", "-1"], ["chat", "--json"]),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage: exllama-ops" in capsys.readouterr().err


def test_the_seconds_until_the_first_token_are_those_of_its_phases(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint, "--max-new-tokens", "2", "--no-compile", "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    for name in ("seconds", "cpu_seconds"):
        phases = result[name]
        assert set(phases) == PHASES
        assert min(phases.values()) >= 0
        rounding = len(PHASES) * 0.0005 + 1e-9
        assert sum(phases.values()) == pytest.approx(2 * phases["first_token"], abs=rounding)
    assert result["seconds"]["load"] >= result["load_seconds"] > 0
    assert result["cpu_seconds"]["start"] > 0
    assert re.search(r"^first token: +\d+\.\d s \(start \d+\.\d, .*prefill .*\); \d+\.\d CPU s$", captured.err, re.M)


def test_a_text_ends_with_the_token_that_only_the_tokenizer_names(
    checkpoint: Path, answering: Callable[..., Any]
) -> None:
    generator = answering("one")
    assert run(checkpoint, "--prompt", "a") == 0
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    assert generator.stops == [{vocabulary["</s>"]}]


def test_each_prompt_is_answered_in_turn_with_an_object_of_its_own(
    checkpoint: Path, answering: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from\nstdin\n"))
    generator = answering("one", "two", "three")
    assert run(checkpoint, "--prompt", "a", "--prompt", "-", "--prompt", "c", "--json") == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["prompt"] for result in results] == ["a", "from\nstdin", "c"]
    assert [result["text"] for result in results] == ["one", "two", "three"]
    assert generator.prompts == ["<s>a", "<s>from\nstdin", "<s>c"]

    answering("one", "two")
    assert run(checkpoint, "--prompt", "a", "--prompt", "b") == 0
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\n"
    assert "prompt 2 of 2: b" in captured.err


def test_the_report_has_the_first_token_of_the_first_prompt_and_each_object_its_own_prefill(
    checkpoint: Path, answering: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from exllama_ops.cli.clock import Clock

    laps = iter([0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 5.0])  # checkpoint, load, build, load, compile, and both prefills

    def lap(self: Clock, phase: str) -> None:
        self._phases[phase] = type(self._last)(next(laps), 1.0)

    monkeypatch.setattr(Clock, "lap", lap)
    answering("one", "two")
    assert run(checkpoint, "--prompt", "a", "--prompt", "b", "--json") == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["seconds"]["prefill"] for line in captured.out.splitlines()] == [3, 5]
    assert "prefill 3.0)" in captured.err


def test_a_prompt_that_is_too_long_is_refused_before_any_is_answered(
    checkpoint: Path, answering: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    generator = answering("one", "two")
    assert run(checkpoint, "--prompt", "a", "--prompt", "b" * 100) == 2
    assert generator.prompts == []
    assert "128 positions; got 101 tokens and 64" in capsys.readouterr().err


def test_threads_are_set_before_the_model_is_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from exllama_ops.integrations import transformers as integration

    seen: list[int] = []
    load_model = integration.load_model

    def recorded(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.get_num_threads())
        return load_model(*args, **kwargs)

    monkeypatch.setattr(integration, "load_model", recorded)
    before = torch.get_num_threads()
    try:
        assert run(checkpoint, "--threads", before + 1, "--max-new-tokens", "1", "--no-compile", "--json") == 0
    finally:
        torch.set_num_threads(before)
    assert seen == [before + 1]
    assert json.loads(capsys.readouterr().out)["threads"] == before + 1


def test_options_of_sampling_reach_the_sampler_anew_for_each_prompt(
    checkpoint: Path, answering: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    generator = answering("a", "b")
    options = ("--temperature", "0.7", "--top-p", "0.9", "--seed", "5", "--json")
    assert run(checkpoint, "--prompt", "a", "--prompt", "b", *options) == 0
    first, second = generator.samplers
    assert first is not second
    for sampler in (first, second):
        assert (sampler.temperature, sampler.top_p, sampler.seed) == (0.7, 0.9, 5)
    result = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (result["temperature"], result["top_p"], result["seed"]) == (0.7, 0.9, 5)
    generator = answering("a")
    assert run(checkpoint, "--temperature", "0") == 0
    assert generator.samplers == [None]


def test_a_seed_draws_the_same_text_again(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        options = ("--temperature", "2", "--seed", seed, "--max-new-tokens", "20", "--no-compile", "--json")
        assert run(checkpoint, *options) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1] != texts[2]


def test_the_head_is_quantized_to_as_many_bits_as_asked_for(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight_bytes = []
    for options in ((), ("--lm-head-bits", "8")):
        assert run(checkpoint, "--max-new-tokens", "1", "--no-compile", "--json", *options) == 0
        captured = capsys.readouterr()
        weight_bytes.append(json.loads(captured.out)["weight_bytes"])
        quantized = re.search(r"^quantizing the output head to 8 bits \(1 of 1\): \d+\.\d s$", captured.err, re.M)
        assert bool(quantized) == bool(options)
    assert weight_bytes[1] < weight_bytes[0]


def test_kernels_are_built_as_a_step_before_the_model_is_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from exllama_ops.backends.cpu import BACKEND
    from exllama_ops.integrations import transformers as integration

    order: list[str] = []
    load_model = integration.load_model

    def build(notify: Notify) -> None:
        order.append("build")
        notify("building the kernels", 1, 2, "a file")

    def load(*args: Any, **kwargs: Any) -> Any:
        order.append("load")
        return load_model(*args, **kwargs)

    monkeypatch.setattr(BACKEND, "build", build)
    monkeypatch.setattr(integration, "load_model", load)
    monkeypatch.setattr(backends, "serving", lambda op, key: BACKEND)
    assert run(checkpoint, "--max-new-tokens", "1", "--no-compile") == 0
    assert order == ["build", "load"]
    steps = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("building", "loading"))]
    assert [re.sub(r"\d+ of \d+", "N of N", re.sub(r": \d+\.\d s$", ": T", line)) for line in steps] == [
        *(f"loading {checkpoint}", f"loading {checkpoint}: T"),
        *("building the kernels", "building the kernels (N of N): T"),
        *(f"loading {checkpoint}", f"loading {checkpoint} (N of N): T"),
    ]


def test_without_a_terminal_there_is_no_carriage_return(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(checkpoint, "--max-new-tokens", "2", "--no-compile") == 0
    err = capsys.readouterr().err
    assert "\r" not in err
    assert re.search(r"^prefill of \d+ tokens: \d+\.\d s$", err, re.M)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_ctrl_c_ends_the_text_and_prints_the_figures(
    options: tuple[str, ...], checkpoint: Path, answering: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answering(("begun", KeyboardInterrupt()), "never asked for")
    assert run(checkpoint, "--prompt", "a", "--prompt", "b", *options) == 130
    captured = capsys.readouterr()
    if options:
        result = json.loads(captured.out)
        assert (result["text"], result["new_tokens"], result["interrupted"]) == ("begun", 5, True)
    else:
        assert captured.out == "begun\n"
    assert re.search(r"^decode: +\d+\.\d tokens/s \(5 tokens, interrupted\)$", captured.err, re.M)
    assert "first token:" in captured.err


# Generates three tokens and waits for a signal, which a compiled step would be interrupted by as well.
WAITS = """
import signal, sys
from exllama_ops import backends
from exllama_ops.cli import main
from exllama_ops.integrations.generation import CompiledGenerator
generate = CompiledGenerator.generate
def waiting(*args, **kwargs):
    for number, token in enumerate(generate(*args, **kwargs)):
        if number == 3:
            signal.pause()
        yield token
CompiledGenerator.generate = waiting
sys.exit(main(sys.argv[1:]))
"""


def test_the_signal_ends_a_process_that_generates_with_its_figures(checkpoint: Path) -> None:
    command = [sys.executable, "-c", WAITS, "run", str(checkpoint), "--no-compile"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    begun = os.read(process.stdout.fileno(), 1)
    while process.poll() is None:  # a signal between the token and the wait for it would be early
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
    out, err = begun + process.stdout.read(), process.stderr.read().decode()
    process.stdout.close()
    process.stderr.close()
    assert process.returncode == 130, err
    assert out.endswith(b"\n")
    assert "interrupted)" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("becomes", [None, RuntimeError("g++ failed"), ValueError("g++ failed")])
def test_ctrl_c_in_another_step_is_quiet_whatever_a_library_makes_of_it(
    becomes: Exception | None,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise becomes or KeyboardInterrupt from None

    monkeypatch.setattr("exllama_ops.integrations.transformers.load_model", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert run(checkpoint) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"loading .*\nloading .*: stopped after \d+\.\d s\n", captured.err)


def test_nobody_who_reads_is_no_traceback(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "exllama_ops", "run", str(checkpoint), "--no-compile"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert "Error" not in err


def test_text_of_several_tokens_per_character_streams_whole() -> None:
    from exllama_ops.cli.text import TextStream

    class Utf8:
        """A tokenizer whose tokens are bytes."""

        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return bytes(tokens).decode("utf-8", errors="replace")

    stream = TextStream(Utf8())
    pieces = [stream.push(byte) for byte in "aé漢".encode()]
    assert pieces == ["a", "", "é", "", "", "漢"]
    stream.push("é".encode()[0])
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert stream.text == "aé漢\N{REPLACEMENT CHARACTER}"
