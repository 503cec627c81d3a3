"""The pass that makes one gptq_gemm_multi of products of the same x: what it takes together, what it leaves alone."""

from __future__ import annotations

import operator
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from compile.blocks import FUSED, FUSED_AOT, Block, K, Recorder, ops, run_pass
from conformance.weights import DTYPES, Case, build, build_parts
from exllama_ops import backends, set_cpu_matmul_precision
from exllama_ops.compile import FuseSharedInput, shared_input

gemm = torch.ops.exllama.gptq_gemm
CASE = Case(4, K, 64, 32, "perm")
A, B, C = (part.args for part in build_parts(CASE, (64, 32, 96)))
# They have one order of rows, which is one tensor in the graphs.
B, C = (*B[:3], A[3], *B[4:]), (*C[:3], A[3], *C[4:])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def fused(function: Callable[..., Any], *args: Any) -> Counter[str]:
    """Our ops in a function's graph after the pass; its results are those of the function."""
    recorder = Recorder()
    results = torch.compile(function, backend=recorder, fullgraph=True)(*(arg.clone() for arg in args))
    expected = function(*(arg.clone() for arg in args))
    for result, want in zip(results, expected, strict=True):
        assert torch.equal(result, want)
        assert result.stride() == want.stride()
    (count,) = recorder.after
    return count


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [*((dtype, "highest") for dtype in DTYPES), (torch.float32, "high")],
)
@pytest.mark.parametrize("act_order", [False, True])
def test_a_block_has_one_op_for_qkv_and_one_for_gate_and_up(
    act_order: bool, dtype: torch.dtype, precision: str
) -> None:
    """The public op in the graph of Dynamo, the private one after AOTAutograd; the bits of eager."""
    set_cpu_matmul_precision(precision)
    block, recorder = Block(act_order).to(dtype), Recorder()
    compiled = torch.compile(block, backend=recorder, fullgraph=True)
    with torch.no_grad():
        for shape in ((2, 5, K), (1, 1, K)):
            x = torch.randn(shape).to(dtype)
            assert torch.equal(compiled(x), block(x))
    assert recorder.before == 2 * [Counter({"gptq_gemm": 7})]
    assert recorder.after == 2 * [FUSED]
    assert recorder.aot == 2 * [FUSED_AOT]


def test_training_computes_the_gradient_of_eager_with_private_ops() -> None:
    block, recorder = Block(), Recorder()
    compiled = torch.compile(block, backend=recorder, fullgraph=True)
    x, y = (torch.ones(3, K, requires_grad=True) for _ in range(2))
    compiled(x).square().sum().backward()
    block(y).square().sum().backward()
    # Sums of two and three gradients, in another order.
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    assert recorder.aot == [FUSED_AOT, Counter({"gptq_gemm_dx.no_autograd": 7})]


def test_one_graph_serves_every_number_of_tokens_from_two() -> None:
    counter = CompileCounterWithBackend(Recorder())
    compiled = torch.compile(Block(), backend=counter, fullgraph=True)
    with torch.no_grad():
        for M in (2, 3, 8, 33):
            x = torch.randn(M, K)
            torch._dynamo.mark_dynamic(x, 0)
            compiled(x)
    assert counter.frame_count == 1


TOGETHER: dict[str, Callable[..., Any]] = {
    "in any order": lambda x: (gemm(x, *C), gemm(x, *A), gemm(x, *B)),
    "among other things": lambda x: (gemm(x, *A) + 1, x.sin(), gemm(x, *B) * x.sum(), gemm(x, *C).float()),
    "where x is made": lambda x: (gemm(x.reshape(-1, K), *A), gemm(x.reshape(-1, K), *B), gemm(x.view(-1, K), *C)),
    "into other dtypes": lambda x: (gemm(x, *A).half(), gemm(x, *B).double(), gemm(x, *C)),
    "by keyword": lambda x: (
        gemm(x, *A[:6], use_v2_format=True, group_size=32),
        gemm(x, *B[:6], True, group_size=32),
        gemm(x, *C[:5], bit=4, use_v2_format=True, group_size=32),
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_products_of_the_same_x_are_one(name: str) -> None:
    count = fused(TOGETHER[name], torch.randn(5, K))
    # A view and a reshape are two nodes of two kinds.
    expected = {"gptq_gemm_multi/2": 1, "gptq_gemm": 1} if name == "where x is made" else {"gptq_gemm_multi/3": 1}
    assert count == Counter(expected)


def test_weights_without_an_order_need_no_node_in_common() -> None:
    parts = [build(Case(4, K, N, 32)).args for N in (64, 32)]
    assert parts[0][3] is not parts[1][3]
    assert fused(lambda x: [gemm(x, *part) for part in parts], torch.randn(5, K)) == Counter({"gptq_gemm_multi/2": 1})


def test_parts_are_contiguous_as_the_results_of_gemm_are() -> None:
    """The result of a product goes into the next without a copy, and can be viewed in any shape."""
    other = build(Case(4, 64, 64, 32)).args
    assert fused(lambda x: (gemm(gemm(x, *A), *other), gemm(x, *B).view(-1)), torch.randn(5, K)) == Counter(
        {"gptq_gemm_multi/2": 1, "gptq_gemm": 1}
    )


def write_to_x(x: torch.Tensor) -> Any:
    first = gemm(x, *A)
    x.add_(1)
    return first, gemm(x, *B)


def write_through_an_operator(x: torch.Tensor) -> Any:
    first = gemm(x, *A)
    x += 1
    return first, gemm(x, *B)


def write_by_index(x: torch.Tensor) -> Any:
    first = gemm(x, *A)
    x[0] = 0
    return first, gemm(x, *B)


def write_in_a_function(x: torch.Tensor) -> Any:
    first = gemm(x, *A)
    nn.functional.relu(x, True)
    return first, gemm(x, *B)


def write_to_an_out_argument(x: torch.Tensor) -> Any:
    first = gemm(x, *A)
    torch.add(x, 1, out=x)
    return first, gemm(x, *B)


def write_to_a_copy(x: torch.Tensor) -> Any:
    one, other = x.half(), x.half()
    one.mul_(2)
    return gemm(one, *A), gemm(other, *B)


def write_to_a_weight(x: torch.Tensor) -> Any:
    words = B[0].clone()
    first = gemm(x, *A)
    torch.ops.exllama.gptq_shuffle(words, torch.empty(0, dtype=torch.int32), 4)
    return first, gemm(x, words, *B[1:])


def compute_a_weight_later(x: torch.Tensor) -> Any:
    first = gemm(x, *A)
    return first, gemm(x, B[0] + (first.sum() > 0).int() * 0, *B[1:])


def read_another_x(x: torch.Tensor) -> Any:
    return gemm(x, *A), gemm(x + 1, *B)


ALONE = [
    write_to_x,
    write_through_an_operator,
    write_by_index,
    write_in_a_function,
    write_to_an_out_argument,
    write_to_a_copy,
    write_to_a_weight,
    compute_a_weight_later,
    read_another_x,
]


@pytest.mark.parametrize("function", ALONE, ids=lambda function: function.__name__)
def test_products_stay_alone_across_a_write_or_on_another_x(function: Callable[..., Any]) -> None:
    assert fused(function, torch.randn(5, K)) == Counter({"gptq_gemm": 2}) + Counter(
        {"gptq_shuffle": function is write_to_a_weight}
    )


@pytest.mark.parametrize(
    "other",
    [
        build(Case(4, K, 64, 40)).args,
        build(Case(8, K, 64, 32)).args,
        build(Case(4, K, 64, 32, v2=False)).args,
        build(Case(4, K, 64, 32, shuffled=False)).args,
        build(Case(4, K, 64, 32, "perm")).args,
    ],
    ids=["group size", "bits", "zero points", "order of words", "order of rows"],
)
def test_weights_of_another_format_stay_alone(other: Any) -> None:
    one = build(Case(4, K, 64, 32)).args
    assert fused(lambda x: (gemm(x, *one), gemm(x, *other)), torch.randn(5, K)) == Counter({"gptq_gemm": 2})


def test_an_equal_order_of_rows_in_another_tensor_is_another_order() -> None:
    """Values are not compared: they may change after the graph was made."""
    other = (*B[:3], B[3].clone(), *B[4:])
    assert fused(lambda x: (gemm(x, *A), gemm(x, *other)), torch.randn(5, K)) == Counter({"gptq_gemm": 2})


def test_a_device_without_the_op_keeps_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyGemm:
        """As gptq_gemm's own backend, which says that it does not serve gptq_gemm_multi."""

        name = "only_gemm"

        def reasons_against(self, op: str, dispatch_key: str) -> list[str]:
            return ["no kernel"] if op == "gptq_gemm_multi" else []

    before = FuseSharedInput().uuid()
    monkeypatch.setitem(backends.PRIORITY, "CPU", (OnlyGemm(), *backends.PRIORITY["CPU"]))
    assert backends.serving("gptq_gemm", "CPU").name == "only_gemm"
    assert backends.serving("gptq_gemm_multi", "CPU").name != "only_gemm"
    count = fused(lambda x: (gemm(x, *A), gemm(x, *B)), torch.randn(5, K))
    assert count == Counter({"gptq_gemm": 2})
    assert FuseSharedInput().uuid() != before


def test_uuid_is_a_key_of_a_cache() -> None:
    uuid = FuseSharedInput().uuid()
    assert uuid == FuseSharedInput().uuid() == pickle.loads(pickle.dumps(uuid))


def test_uuid_changes_with_the_ops_whose_gradients_are_in_cached_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "_linear.py"
    sources = {Path(source).name: source for source in shared_input._SOURCES}
    changed.write_text(Path(sources["_linear.py"]).read_text() + "# another gradient")
    before = FuseSharedInput().uuid()
    monkeypatch.setattr(shared_input, "_SOURCES", tuple({**sources, "_linear.py": str(changed)}.values()))
    assert FuseSharedInput().uuid() != before


def test_a_graph_of_export_holds_its_weights_as_attributes_that_move() -> None:
    block = Block(act_order=True)
    x = torch.randn(2, 5, K)
    graph = torch.export.export(block, (x,)).module()
    assert ops(graph) == Counter({"gptq_gemm": 7})
    run_pass(graph)
    assert ops(graph) == FUSED
    assert torch.equal(graph(x), block(x))


def test_meta_of_the_new_nodes_is_that_of_their_results() -> None:
    """This holds in Dynamo's graphs and in those of export, which keep it under another name."""
    block, x, graphs = Block(), torch.randn(5, K), []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(("example_value", graph))
        return graph

    torch.compile(block, backend=keep, fullgraph=True)(x)
    graphs.append(("val", torch.export.export(block, (x,)).module()))
    for name, graph in graphs:
        run_pass(graph)
        shapes: dict[str, list[Any]] = {}
        for node in graph.graph.nodes:
            value = node.meta.get(name)
            if node.target is torch.split_with_sizes:
                shapes.setdefault("split", []).append([tuple(part.shape) for part in value])
            elif node.target is torch.ops.exllama.gptq_gemm_multi:
                shapes.setdefault("multi", []).append(tuple(value.shape))
            elif node.target is operator.getitem and node.args[0].target is torch.split_with_sizes:
                (part,) = node.users
                shapes.setdefault("parts", []).append((tuple(value.shape), tuple(part.meta[name].shape)))
        sizes = [[K, 32, 32], [64, 64]]
        assert shapes["multi"] == [(5, sum(columns)) for columns in sizes]
        assert shapes["split"] == [[(5, N) for N in columns] for columns in sizes]
        assert shapes["parts"] == [((5, N), (5, N)) for columns in sizes for N in columns]
