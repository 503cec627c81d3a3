"""``torch.compile(model, backend="exllama")``: Inductor behind it, its caches, its options, what it logs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compile.blocks import Block, K
from conformance.weights import Case, build
from exllama_ops.compile import FuseSharedInput, exllama
from exllama_ops.ops import _library


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


BLOCK = """
import sys, torch, exllama_ops
sys.path.insert(0, sys.argv[1])
from torch._dynamo.utils import counters
from compile.blocks import Block, K
# As in the process of the tests: the other classes round x, which makes more of a difference in its last place.
exllama_ops.set_cpu_matmul_precision("highest")
block, x = Block(), torch.randn(3, K)
compiled = torch.compile(block, backend="exllama", fullgraph=True)
with torch.no_grad():
    out = compiled(x)
    # exp of silu and tanh may differ by some units in the last place.
    torch.testing.assert_close(out, block(x), rtol=1e-5, atol=1e-5)
print({name: counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("hit", "miss", "bypass")})
print({name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")})
"""


def run(code: str, cache: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **variables}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return result


def test_inductor_computes_a_block_caches_it_and_the_log_says_what_was_done(tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    cold = run(BLOCK, tmp_path, tests, TORCH_LOGS="+exllama_ops")
    assert cold.stdout.splitlines() == 2 * ["{'hit': 0, 'miss': 1, 'bypass': 0}"]
    assert re.findall(r"one gptq_gemm_multi of (\[.*?\]) columns takes the place of", cold.stderr) == [
        "[96, 32, 32]",
        "[64, 64]",
    ]
    warm = run(BLOCK, tmp_path, tests)
    assert warm.stdout.splitlines()[0] == "{'hit': 1, 'miss': 0, 'bypass': 0}"
    assert "exllama" not in warm.stderr
    graphs_alone = run(BLOCK, tmp_path, tests, TORCHINDUCTOR_AUTOGRAD_CACHE="0")
    assert graphs_alone.stdout.splitlines()[1] == "{'hit': 1, 'miss': 0, 'bypass': 0}"


def test_torch_finds_the_backend_without_an_import(tmp_path: Path) -> None:
    code = """
import sys, torch
assert "exllama" in torch._dynamo.list_backends() and "exllama_ops" not in sys.modules
compiled = torch.compile(lambda x: x.sin() + 1, backend="exllama", mode="max-autotune-no-cudagraphs")
x = torch.ones(3)
torch.testing.assert_close(compiled(x), x.sin() + 1)
assert "exllama_ops" in sys.modules
"""
    run(code, tmp_path)


@pytest.fixture
def config_of_inductor(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the backend hands to Inductor, which does not run."""
    given: dict[str, Any] = {}

    def compile_fx(graph: Any, inputs: Any, config_patches: dict[str, Any], **kwargs: Any) -> Any:
        given.update(config_patches)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return given


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {}),
        ({"mode": "default"}, {}),
        ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
        (
            {"options": {"epilogue-fusion": False, "max_autotune": True}},
            {"epilogue_fusion": False, "max_autotune": True},
        ),
    ],
)
def test_mode_and_options_go_to_inductor(
    arguments: dict[str, Any], expected: dict[str, Any], config_of_inductor: dict[str, Any]
) -> None:
    torch.compile(lambda x: x + 1, backend="exllama", **arguments)(torch.ones(3))
    assert isinstance(config_of_inductor.pop("pre_grad_custom_pass"), FuseSharedInput)
    assert config_of_inductor == expected


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"mode": "fast"}, r"mode must be one of default, .*reduce-overhead.*; got 'fast'"),
        (
            {"options": {"no_such": 1, "nor.this": 2}},
            r"options must be of torch._inductor.config; got no_such, nor.this",
        ),
        (
            {"options": {"pre_grad_custom_pass": print}},
            r"pre_grad_custom_pass, among the options .*, is its own; .*FuseSharedInput",
        ),
        ({"options": {"max-autotune": "no"}}, r"max_autotune, got str should be bool"),
        ({"options": {"use_pre_grad_passes": False}}, r"needs use_pre_grad_passes, .*; the options switched it off"),
        ({"mode": "lite"}, r"needs use_pre_grad_passes, .*; mode 'lite' switched it off"),
    ],
)
def test_modes_and_options_that_inductor_lacks_or_that_switch_the_pass_off_are_refused(
    arguments: dict[str, Any], rule: str
) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=rule):
        torch.compile(lambda x: x + 1, backend="exllama", **arguments)(torch.ones(3))
    with pytest.raises(ValueError, match=rule):
        exllama(torch.fx.symbolic_trace(lambda x: x + 1), [torch.ones(3)], **arguments)


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"pre_grad_custom_pass": print}, r"pre_grad_custom_pass, .*in torch._inductor.config, is its own"),
        ({"use_pre_grad_passes": False}, r"needs use_pre_grad_passes, .*; the config switched it off"),
    ],
)
def test_a_config_of_inductor_that_the_pass_cannot_run_under_is_refused(setting: dict[str, Any], rule: str) -> None:
    """A pass of the user is not overwritten without a word."""
    with torch._inductor.config.patch(setting), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=rule):
        torch.compile(lambda x: x + 1, backend="exllama")(torch.ones(3))


def test_the_backend_takes_the_place_of_its_own_pass_in_the_config(config_of_inductor: dict[str, Any]) -> None:
    with torch._inductor.config.patch(pre_grad_custom_pass=FuseSharedInput()):
        torch.compile(lambda x: x + 1, backend="exllama")(torch.ones(3))
    assert isinstance(config_of_inductor["pre_grad_custom_pass"], FuseSharedInput)


def test_cuda_graphs_get_what_inductor_does_about_the_profiler(
    monkeypatch: pytest.MonkeyPatch, config_of_inductor: dict[str, Any]
) -> None:
    """Graphs and a profiler that is torn down between them end in an error inside of CUDA."""
    monkeypatch.delenv("TEARDOWN_CUPTI", raising=False)
    monkeypatch.setattr(torch, "profiler_allow_cudagraph_cupti_lazy_reinit_cuda12", lambda: False)
    torch.compile(lambda x: x + 1, backend="exllama", mode="reduce-overhead")(torch.ones(3))
    assert os.environ["TEARDOWN_CUPTI"] == "0"


def two_products(x: torch.Tensor, first: list[Any], second: list[Any]) -> list[torch.Tensor]:
    return [torch.ops.exllama.gptq_gemm(x, *weight) for weight in (first, second)]


def test_threads_compile_and_call_at_once() -> None:
    cases = (Case(4, 64, 96, 32), Case(8, 96, 32, 16))
    arguments = [(torch.randn(3, case.K), list(build(case).args), list(build(case).args)) for case in cases]
    expected = [two_products(*given) for given in arguments]
    wrong: list[object] = []
    compiled = threading.Event()

    def check(index: int, call: Callable[..., list[torch.Tensor]]) -> None:
        try:
            if not all(map(torch.equal, call(*arguments[index]), expected[index])):
                wrong.append(index)
        except Exception as error:
            wrong.append(error)

    def call_all_the_time(index: int) -> None:
        while not compiled.wait(1e-3):
            check(index, two_products)

    # The backend by itself, not by its name: torch loads what a name stands for in both threads, and refuses one.
    compilers = [
        threading.Thread(target=check, args=(index, torch.compile(two_products, backend=backend, fullgraph=True)))
        for index in range(2)
        for backend in (exllama, "inductor")
    ]
    callers = [threading.Thread(target=call_all_the_time, args=(index,)) for index in range(2)]
    for thread in (*callers, *compilers):
        thread.start()
    for thread in compilers:
        thread.join()
    compiled.set()
    for thread in callers:
        thread.join()
    assert not wrong


def test_the_pass_serves_inductor_on_its_own(caplog: pytest.LogCaptureFixture) -> None:
    block, x = Block(), torch.randn(1, K)
    with (
        torch._inductor.config.patch(pre_grad_custom_pass=FuseSharedInput(), force_disable_caches=True),
        caplog.at_level("DEBUG", logger="exllama_ops.compile"),
        torch.no_grad(),
    ):
        out = torch.compile(block, fullgraph=True)(x)
    torch.testing.assert_close(out, block(x), rtol=1e-5, atol=1e-5)
    assert sum("gptq_gemm_multi" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize("name", sorted(_library.schemas()))
def test_no_op_keeps_a_graph_from_being_captured(name: str) -> None:
    """As far as that shows without a GPU: Inductor would split a CUDA graph at an op with one of these tags."""
    unsafe = {torch.Tag.cudagraph_unsafe, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    assert not unsafe & set(_library.overload(name).tags)


@pytest.mark.gpu
def test_reduce_overhead_replays_cuda_graphs_of_a_block() -> None:
    """To the bit what the same kernels compute without a graph."""
    block = Block(act_order=True).half().cuda()
    graphs = torch.compile(block, backend="exllama", mode="reduce-overhead", fullgraph=True)
    kernels = torch.compile(block, backend="exllama", fullgraph=True)
    with torch.inference_mode():
        for seed in range(5):
            x = torch.randn(1, K, generator=torch.Generator().manual_seed(seed)).half().cuda()
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(graphs(x).clone(), kernels(x))
