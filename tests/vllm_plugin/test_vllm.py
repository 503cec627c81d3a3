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
TWO: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
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
    adapter: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> None:
    model = reference.model(path, dtype)
    reference.adapt(model, adapter or {})
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
    answer = serve(kinds[name], tmp_path, **TWO)
    assert_tokens_are_those_of_transformers(kinds[name], answer["tokens"])


def test_two_processes_share_the_layers(kinds: dict[str, Path], tmp_path: Path) -> None:
    # vLLM 0.32 on a CPU fails with pipeline parallelism in an eager forward, whatever the weights are.
    pipeline: dict[str, Any] = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    answer = serve(kinds["8bit-act-v1"], tmp_path, enforce_eager=False, **pipeline)
    assert_tokens_are_those_of_transformers(kinds["8bit-act-v1"], answer["tokens"])


def test_a_compiled_model_gives_the_same_tokens(kinds: dict[str, Path], tmp_path: Path) -> None:
    answer = serve(kinds["4bit-asym-act-v1"], tmp_path, enforce_eager=False)
    assert_tokens_are_those_of_transformers(kinds["4bit-asym-act-v1"], answer["tokens"])


@pytest.mark.parametrize("parallel", [{}, TWO, TWO | {"enable_expert_parallel": True}], ids=["one", "cut", "shared"])
def test_experts_give_the_tokens_of_transformers(parallel: dict[str, Any], tmp_path: Path) -> None:
    path = cases.write_experts(tmp_path / "experts")
    answer = serve(path, tmp_path, **parallel)
    assert ("Local/global number of experts: 2/4" in answer["log"]) == ("enable_expert_parallel" in parallel)
    assert_tokens_are_those_of_transformers(path, answer["tokens"])


def test_biases_are_added_once_and_a_small_vocabulary_lies_in_one_process(tmp_path: Path) -> None:
    """Of 64 outputs of the padded head, the second process has 32, and none of them is a token."""
    kind = cases.Kind(4, 64, act_order=True, head_bits=4)
    path = cases.write(kind, tmp_path / "model", vocab_size=32, attention_bias=True, mlp_bias=True)
    prompts = [[token % 32 for token in prompt] for prompt in cases.PROMPTS]
    answer = serve(path, tmp_path, prompts=prompts, **TWO)
    assert_tokens_are_those_of_transformers(path, answer["tokens"], prompts=prompts)


@pytest.mark.parametrize(("name", "parallel"), [("4bit-asym-act-v1", {}), ("3bit-act-v1", TWO)], ids=["one", "two"])
def test_an_adapter_gives_the_tokens_of_its_dense_sum(
    name: str, parallel: dict[str, Any], kinds: dict[str, Path], tmp_path: Path
) -> None:
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    adapter = cases.write_adapter(kinds[name], tmp_path / "adapter", layers)
    answer = serve(kinds[name], tmp_path, adapter=str(tmp_path / "adapter"), then=[[]], **parallel)
    assert_tokens_are_those_of_transformers(kinds[name], answer["tokens"], adapter=adapter)
    assert_tokens_are_those_of_transformers(kinds[name], answer["after"][0])
    assert answer["tokens"] != answer["after"][0]


def test_an_adapter_may_leave_a_quantized_head_and_experts_alone(kinds: dict[str, Path], tmp_path: Path) -> None:
    experts = cases.write_experts(tmp_path / "experts")
    for path, arguments in ((kinds["4bit-head-of-8"], {}), (experts, {"lora_target_modules": ["q_proj", "v_proj"]})):
        folder = tmp_path / f"adapter-{path.name}"
        adapter = cases.write_adapter(path, folder, ("q_proj", "v_proj"))
        answer = serve(path, tmp_path, adapter=str(folder), **arguments)
        assert_tokens_are_those_of_transformers(path, answer["tokens"], adapter=adapter)


def test_weights_that_are_loaded_again_are_those_of_the_files(tmp_path: Path) -> None:
    kind = cases.KINDS["3bit-act-v1"]
    first, second = (cases.write(kind, tmp_path / str(seed), seed, attention_bias=True) for seed in range(2))

    def reload(**keywords: Any) -> list[Any]:
        rpc = {"method": "reload_weights", "kwargs": keywords}
        return [("collective_rpc", rpc), ("reset_prefix_cache", {})]

    sleep: list[Any] = [("sleep", {"level": 1}), ("wake_up", {})]  # vLLM does nothing then on a CPU
    answer = serve(first, tmp_path, then=[sleep + reload(), reload(weights_path=str(second))], **TWO)
    assert answer["tokens"] == answer["after"][0] != answer["after"][1]
    assert_tokens_are_those_of_transformers(first, answer["tokens"])
    assert_tokens_are_those_of_transformers(second, answer["after"][1])


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
