"""vLLM with the plugin gives the tokens of transformers, for checkpoints that vLLM itself refuses.

It needs an environment with vLLM, which ``.ci/vllm`` builds.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("vllm", reason="needs vLLM: .ci/vllm builds an environment that has it")

from exllama_ops.integrations.demo import demo_checkpoint
from vllm_plugin import cases, reference

NEW = 12
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints of `cases`, and those of other tools in tests/data."""
    folder = tmp_path_factory.mktemp("kinds")
    written = {name: cases.write(kind, folder / name) for name, kind in cases.KINDS.items()}
    given = {
        name: cases.DATA / name for name in ("tiny-w3g32-asym-act-v2", "tiny-w4g64-lmhead", "smol1-w2g32-asym-act")
    }
    return written | given


def serve(path: Path, folder: Path, *, environment: dict[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
    """What vLLM generates, in a process of its own."""
    arguments = {
        "model": str(path),
        "dtype": "float16",
        "enforce_eager": True,
        "new": NEW,
        "prompts": cases.PROMPTS,
    } | arguments
    (folder / "arguments.json").write_text(json.dumps(arguments))
    result = subprocess.run(
        [sys.executable, HERE / "generate.py", folder / "arguments.json"],
        capture_output=True, text=True, timeout=600, env=os.environ | (environment or {}),
    )  # fmt: skip
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, result.stdout[-3000:] + result.stderr[-3000:]
    answer: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    answer["log"] = result.stdout + result.stderr
    return answer


def assert_tokens_are_those_of_transformers(
    path: Path,
    tokens: list[list[int]],
    dtype: torch.dtype = torch.float16,
    prompts: list[list[int]] = cases.PROMPTS,
) -> None:
    model = reference.model(path, dtype)
    sure = 0
    for prompt, got in zip(prompts, tokens, strict=True):
        expected = reference.expected(model, prompt, NEW)
        assert got[: len(expected)] == expected
        sure += len(expected)
    assert sure >= 6  # else the comparison says little


@pytest.mark.parametrize("name", [*cases.KINDS, "tiny-w3g32-asym-act-v2", "tiny-w4g64-lmhead", "smol1-w2g32-asym-act"])
def test_what_vllm_refuses_gives_the_tokens_of_transformers(name: str, kinds: dict[str, Path], tmp_path: Path) -> None:
    answer = serve(kinds[name], tmp_path)
    assert answer["quantization"] == "exllama_ops"
    assert "exllama_ops runs this checkpoint, since vLLM refuses it" in answer["log"]
    assert_tokens_are_those_of_transformers(kinds[name], answer["tokens"])


@pytest.mark.parametrize("name", ["3bit-act-v1", "4bit-sym-partial", "8bit-act-v1", "4bit-head-of-8"])
def test_two_processes_share_each_layer(name: str, kinds: dict[str, Path], tmp_path: Path) -> None:
    answer = serve(kinds[name], tmp_path, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert_tokens_are_those_of_transformers(kinds[name], answer["tokens"])


def test_two_processes_share_the_layers(kinds: dict[str, Path], tmp_path: Path) -> None:
    # vLLM 0.32 on a CPU fails with pipeline parallelism in an eager forward, whatever the weights are.
    pipeline: dict[str, Any] = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    answer = serve(kinds["8bit-act-v1"], tmp_path, enforce_eager=False, **pipeline)
    assert_tokens_are_those_of_transformers(kinds["8bit-act-v1"], answer["tokens"])


def test_a_compiled_model_gives_the_same_tokens(kinds: dict[str, Path], tmp_path: Path) -> None:
    answer = serve(kinds["4bit-asym-act-v1"], tmp_path, enforce_eager=False)
    assert_tokens_are_those_of_transformers(kinds["4bit-asym-act-v1"], answer["tokens"])


@pytest.mark.parametrize("processes", [1, 2])
def test_experts_give_the_tokens_of_transformers(processes: int, tmp_path: Path) -> None:
    path = cases.write_experts(tmp_path / "experts")
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"} if processes == 2 else {}
    assert_tokens_are_those_of_transformers(path, serve(path, tmp_path, **parallel)["tokens"])


@pytest.mark.parametrize(("processes", "dtype"), [(1, "float16"), (1, "bfloat16"), (2, "float16")])
def test_a_whole_model_gives_the_tokens_of_transformers(processes: int, dtype: str, tmp_path: Path) -> None:
    """The demo: 30 layers, 9 heads and 3 for keys, which two processes cannot share, so they share the layers."""
    pytest.importorskip("gguf", reason="the demo is made of a GGUF file")
    path = demo_checkpoint()
    arguments: dict[str, Any] = {"dtype": dtype}
    if processes == 2:
        arguments |= {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp", "enforce_eager": False}
    # Texts that go on in one way alone: random tokens leave a model unsure of the next.
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = ["1, 2, 3, 4, 5, 6, 7,", "Monday, Tuesday, Wednesday, Thursday,", "a b c d e f g"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    tokens = serve(path, tmp_path, prompts=prompts, **arguments)["tokens"]
    assert_tokens_are_those_of_transformers(path, tokens, getattr(torch, dtype), prompts)


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_what_vllm_runs_is_left_to_it_unless_asked_for(format: str, tmp_path: Path) -> None:
    kind = cases.Kind(4, 64, sym=format == "gptq", checkpoint_format="gptq", format=format)
    path = cases.write(kind, tmp_path / "plain")
    assert serve(path, tmp_path)["quantization"] != "exllama_ops"
    answer = serve(path, tmp_path, quantization="exllama_ops")
    assert answer["quantization"] == "exllama_ops"
    assert_tokens_are_those_of_transformers(path, answer["tokens"])


# The kernels of vLLM that run 4 bits on a CPU. No other width has one there, so that ours is what vLLM finds.
OF_VLLM = "CPUWNA16LinearKernel,Dynamic4bitLinearKernel,ZentorchWNA16LinearKernel"


@pytest.mark.parametrize(
    ("kind", "disabled"),
    [
        (cases.Kind(4, 64, sym=True, checkpoint_format="gptq"), OF_VLLM),
        (cases.Kind(4, 64, format="awq"), OF_VLLM),
        (cases.Kind(4, 64, format="compressed-tensors"), OF_VLLM),
        (cases.Kind(8, -1, sym=True, format="compressed-tensors"), ""),
        (cases.Kind(8, 32, format="compressed-tensors"), ""),
    ],
    ids=["gptq", "awq", "compressed-4bit", "compressed-8bit-channel", "compressed-8bit-asym"],
)
def test_a_config_of_vllm_can_choose_the_kernel(kind: cases.Kind, disabled: str, tmp_path: Path) -> None:
    path = cases.write(kind, tmp_path / "plain")
    answer = serve(path, tmp_path, environment={"VLLM_DISABLED_KERNELS": disabled})
    assert answer["quantization"] != "exllama_ops"
    assert "Using ExllamaOpsLinearKernel" in answer["log"]
    assert_tokens_are_those_of_transformers(path, answer["tokens"])


def test_without_the_plugin_vllm_refuses_as_it_did(kinds: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="desc_act"):
        serve(kinds["3bit-act-v1"], tmp_path, environment={"VLLM_PLUGINS": ""})


def test_a_server_answers_an_openai_request(kinds: dict[str, Path], tmp_path: Path) -> None:
    path = kinds["8bit-act-v1"]
    log = (tmp_path / "log").open("w")
    options = ["--skip-tokenizer-init", "--enforce-eager", "--dtype", "float16", "--max-model-len", "128"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path, *options]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path)
    try:
        body = {"model": str(path), "prompt": cases.PROMPTS[0], "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        body |= {"detokenize": False, "return_token_ids": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        for _ in range(180):
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    choice = json.load(response)["choices"][0]
                break
            except (ConnectionError, urllib.error.URLError):
                time.sleep(1)
        expected = reference.expected(reference.model(path, torch.float16), cases.PROMPTS[0], NEW)
        assert expected
        assert choice["token_ids"][: len(expected)] == expected
    finally:
        server.terminate()
        server.wait(60)
