"""What only a GPU can show: streams, graphs, no syncs. The conformance matrix runs there too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from conformance.weights import DTYPES, Case, build, build_experts, build_parts, experts_args, multi_args
from cuda import bounds
from cuda.test_emulated import ALGORITHMS, can
from exllama_ops import ExllamaLinear, quantize
from exllama_ops.backends import cuda as cuda_backend
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.testing.bounds import assert_within_bound, error_bound, gamma

pytestmark = pytest.mark.gpu

CASES = [
    Case(bits, 256, 128, 64, order, shuffled)
    for bits in SUPPORTED_BITS
    for order, shuffled in [("sorted", True), ("perm", True), ("raw", False)]
]


@pytest.fixture(autouse=True)
def sync_debug_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def use_algorithm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Names an algorithm to the library, which reads the variable when it is loaded and when it is asked to."""
    library = cuda_backend.BACKEND.library
    assert library is not None

    def use(algorithm: str) -> None:
        monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
        library.read_environment()

    yield use
    monkeypatch.undo()
    library.read_environment()


def can_here(algorithm: str, case: Case, dtype: torch.dtype) -> bool:
    major, minor = torch.cuda.get_device_capability()
    return can(algorithm, 10 * major + minor, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_op_syncs_with_the_host(case: Case, dtype: torch.dtype, use_algorithm: Callable[[str], None]) -> None:
    weight, other = (part.to("cuda") for part in build_parts(case, [128, 64]))
    x, grad = torch.randn(5, 256, dtype=dtype).cuda(), torch.randn(5, 128, dtype=dtype).cuda()
    perm = weight.row_order if case.shuffled else torch.empty(0, dtype=torch.int32, device="cuda")
    of_experts = experts_args([expert.to("cuda") for expert in build_experts(case, 3)], (1, 2, 2, 4))
    torch.cuda.set_sync_debug_mode("error")
    for algorithm in ALGORITHMS:
        if can_here(algorithm, case, dtype):
            use_algorithm(algorithm)
            torch.ops.exllama.gptq_gemm(x, *weight.args)
            torch.ops.exllama.gptq_gemm_multi(x, *multi_args([weight, other]))
            if algorithm != "dense":
                torch.ops.exllama.gptq_moe_gemm(x, *of_experts)
    torch.ops.exllama.gptq_moe_gemm_dx(grad, *of_experts)
    torch.ops.exllama.gptq_gemm_dx(grad, *weight.args)
    torch.ops.exllama.gptq_dequantize(*weight.args)
    torch.ops.exllama.gptq_unshuffle(weight.qweight, perm, case.bits)
    torch.ops.exllama.gptq_shuffle(weight.qweight, perm, case.bits)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_algorithm_is_within_its_bound(case: Case, algorithm: str, use_algorithm: Callable[[str], None]) -> None:
    use_algorithm(algorithm)
    weight = build(case)
    on_device = weight.to("cuda")
    for dtype in DTYPES:
        if not can_here(algorithm, case, dtype):
            continue
        for M in (1, 7, 17, 300):
            x = torch.randn(M, case.K, generator=torch.Generator().manual_seed(M)).to(dtype)
            out = torch.ops.exllama.gptq_gemm(x.cuda(), *on_device.args)
            assert_within_bound(out, x, weight.dense, bounds.gemm_error(algorithm, weight, dtype))
            assert torch.equal(out, torch.ops.exllama.gptq_gemm(x.cuda(), *on_device.args))


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_tensor_cores_honour_subnormal_activations(bits: int, use_algorithm: Callable[[str], None]) -> None:
    """Multiples of the least float16, as the results are. (Of the weight only integers are multiplied.)"""
    case = Case(bits, 256, 128, 128)
    if not can_here("mma", case, torch.float16):
        pytest.skip("needs tensor cores of sm_75 or later")
    use_algorithm("mma")
    weight = build(case)
    weight.scales.fill_(1.0)
    steps = torch.randint(-1, 2, (5, 256), generator=torch.Generator().manual_seed(0)) * (torch.arange(256) % 64 == 0)
    x = (steps * 2.0**-24).half()
    out = torch.ops.exllama.gptq_gemm(x.cuda(), *weight.to("cuda").args).cpu()
    assert out.any()
    assert torch.equal(out.double(), x.double() @ weight.dense)


@pytest.mark.parametrize("algorithm", [algorithm for algorithm in ALGORITHMS if algorithm != "dense"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_captured_graph_replays_with_other_rows_of_each_expert(
    case: Case, algorithm: str, use_algorithm: Callable[[str], None]
) -> None:
    if not can_here(algorithm, case, torch.float16):
        pytest.skip(f"{algorithm} cannot compute {case} here")
    use_algorithm(algorithm)
    args = experts_args([expert.to("cuda") for expert in build_experts(case, 5)], (0,) * 6)
    offsets = args[4]
    x, grad = (torch.randn(200, size, dtype=torch.float16, device="cuda") for size in (case.K, case.N))

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.exllama.gptq_moe_gemm(x, *args), torch.ops.exllama.gptq_moe_gemm_dx(grad, *args)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both()
    for now in ((0, 0, 1, 1, 200, 200), (7, 40, 80, 81, 82, 190), (200,) * 6):
        offsets.copy_(torch.tensor(now, dtype=torch.int32))
        graph.replay()
        for result, expected in zip(results, both(), strict=True):
            assert torch.equal(result, expected)
            assert not result[: now[0]].any()
            assert not result[now[-1] :].any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_captured_graph_replays_with_new_data(
    case: Case, algorithm: str, use_algorithm: Callable[[str], None]
) -> None:
    if not can_here(algorithm, case, torch.float16):
        pytest.skip(f"{algorithm} cannot compute {case} here")
    use_algorithm(algorithm)
    parts = [part.to("cuda") for part in build_parts(case, [128, 64])]
    weight = parts[0]
    perm = weight.row_order if case.shuffled else torch.empty(0, dtype=torch.int32, device="cuda")
    x = torch.randn(5, 256, dtype=torch.float16, device="cuda")
    grad = torch.randn(5, 128, dtype=torch.float16, device="cuda")

    def every_op() -> tuple[torch.Tensor, ...]:
        words = weight.qweight.clone()
        torch.ops.exllama.gptq_shuffle(words, perm, case.bits)
        return (
            torch.ops.exllama.gptq_gemm(x, *weight.args),
            torch.ops.exllama.gptq_gemm_multi(x, *multi_args(parts)),
            torch.ops.exllama.gptq_gemm_dx(grad, *weight.args),
            torch.ops.exllama.gptq_dequantize(*weight.args),
            torch.ops.exllama.gptq_unshuffle(weight.qweight, perm, case.bits),
            words,
        )

    every_op()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = every_op()
    for seed in range(3):
        for part, other in zip(parts, build_parts(replace(case, seed=seed + 1), [128, 64]), strict=True):
            for name in ("qweight", "qzeros", "scales", "row_order"):
                getattr(part, name).copy_(getattr(other, name))
        x.copy_(torch.randn(5, 256, generator=torch.Generator().manual_seed(seed)))
        grad.copy_(torch.randn(5, 128, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for result, expected in zip(results, every_op(), strict=True):
            assert torch.equal(result, expected)


def test_the_current_stream_is_used() -> None:
    """The result waits for what runs before it on the side stream, and not for the default stream."""
    weight = build(CASES[0]).to("cuda")
    x = torch.zeros(5, 256, device="cuda")
    data = torch.randn(5, 256, device="cuda")
    expected = torch.ops.exllama.gptq_gemm(data, *weight.args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.copy_(data)
        out = torch.ops.exllama.gptq_gemm(x, *weight.args)
    side.synchronize()
    assert torch.equal(out, expected)


def test_the_example_of_the_documents_captures_a_graph() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compile.md").read_text()
    (example,) = re.findall(r"```python not-run\n(model\(static_x\).*?CUDAGraph.*?)```", page, re.DOTALL)
    model = ExllamaLinear.from_weight(quantize(torch.randn(128, 256), 4, 64)).cuda()
    names: dict[str, Any] = {"torch": torch, "model": model, "static_x": torch.randn(1, 256).half().cuda()}
    with torch.inference_mode():
        exec(example, names)
        assert torch.equal(names["out"], model(names["static_x"]))


def test_reduce_overhead_replays_cuda_graphs() -> None:
    model = nn.Sequential(
        ExllamaLinear.from_weight(quantize(torch.randn(128, 256), 4, 64)),
        nn.SiLU(),
        ExllamaLinear.from_weight(quantize(torch.randn(256, 128), 3, 64)),
    ).cuda()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    counters.clear()
    with torch.inference_mode():
        for seed in range(5):
            x = torch.randn(1, 256, generator=torch.Generator().manual_seed(seed)).half().cuda()
            torch.compiler.cudagraph_mark_step_begin()
            # Both take SiLU in float32, whose exp may differ by some units in the last place. That may tip the
            # rounding of SiLU. Then each rounds the product, as in tests/ops/test_compile.py.
            eps = torch.finfo(torch.float16).eps
            hidden, out = nn.functional.silu(model[0](x)).double().abs(), model(x).double()
            weights = model[2].dequantize().t().double().abs()
            bound = (eps + 4 * torch.finfo(torch.float32).eps) * (hidden @ weights) + 4 * eps * (out.abs() + 1)
            assert ((compiled(x).double() - out).abs() <= bound).all()
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_results_on_gpu_and_cpu_agree_to_the_bounds_of_both() -> None:
    weight = build(CASES[1])
    x = torch.randn(9, 256)
    cpu = torch.ops.exllama.gptq_gemm(x, *weight.args)
    cuda = torch.ops.exllama.gptq_gemm(x.cuda(), *weight.to("cuda").args).cpu()
    of_cuda = max(bounds.gemm_error(algorithm, weight, torch.float32) for algorithm in ("scalar", "tiled"))
    of_cpu = gamma(64 + 4 + 2)  # a group, the groups, two factors: with the precision that tests set
    allowed = error_bound(x, weight.dense, of_cuda) + error_bound(x, weight.dense, of_cpu)
    assert ((cuda.double() - cpu.double()).abs() <= allowed).all()
