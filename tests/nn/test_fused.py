"""FusedProjection: the product is shared by x, of which nothing is kept and on which nothing is left."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.utils.checkpoint import checkpoint

from exllama_ops import ExllamaLinear, quantize
from exllama_ops.nn.fused import fuse

K = 64


def linear(seed: int) -> ExllamaLinear:
    generator = torch.Generator().manual_seed(seed)
    return ExllamaLinear.from_weight(quantize(torch.randn(32, K, generator=generator), 4, 32))


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q: nn.Module = linear(1)
        self.k: nn.Module = linear(2)
        self.v: nn.Module = linear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) * self.v(x)


@pytest.fixture
def unfrozen() -> Projections:
    return Projections()


@pytest.fixture
def model(unfrozen: Projections) -> Projections:
    frozen = Projections()
    frozen.q, frozen.k, frozen.v = fuse([unfrozen.q, unfrozen.k, unfrozen.v])
    return frozen


def first_alone(model: Projections, x: Tensor) -> None:
    model.q(x)


def two_of_three(model: Projections, x: Tensor) -> None:
    model.q(x)
    model.k(x)


def all_of_them(model: Projections, x: Tensor) -> None:
    model(x)


def one_that_raises(model: Projections, x: Tensor) -> None:
    def refuse(module: nn.Module, args: object) -> None:
        raise RuntimeError("refused")

    handle = model.k.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="refused"):
        model(x)
    handle.remove()


def compiled(called: Callable[[Projections, Tensor], None]) -> Callable[[Projections, Tensor], None]:
    def call(model: Projections, x: Tensor) -> None:
        torch._dynamo.reset()
        torch.compile(called, backend="eager", fullgraph=True)(model, x)

    return call


CALLS = {
    "first alone": first_alone,
    "two of three": two_of_three,
    "all": all_of_them,
    "one raises": one_that_raises,
    "first alone, compiled": compiled(first_alone),
    "all, compiled": compiled(all_of_them),
}


def saved(x: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_left_on_x(model: Projections, call: str, requires_grad: bool) -> None:
    x = torch.randn(3, K, requires_grad=requires_grad)
    before = pickle.dumps(x), saved(x)
    CALLS[call](model, x)
    assert x.__dict__ == {}
    assert (pickle.dumps(x), saved(x)) == before
    assert copy.deepcopy(x).__dict__ == {}


@pytest.mark.parametrize("kind", ["constant", "leaf", "made"])
@pytest.mark.parametrize("call", CALLS)
def test_x_is_freed_when_nobody_holds_it(model: Projections, call: str, kind: str) -> None:
    leaf = torch.randn(3, K, requires_grad=kind != "constant")
    x = leaf * 2 if kind == "made" else leaf
    del leaf
    CALLS[call](model, x)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_columns_go_with_x(model: Projections) -> None:
    x = torch.randn(3, K)
    model.q(x)
    (columns,) = [each for each in gc.get_objects() if type(each).__name__ == "_Left"]
    gone = weakref.ref(columns)
    del columns, x
    assert gone() is None


def test_a_leaf_that_requires_a_gradient_gets_the_same_results_and_gradient(model: Projections) -> None:
    """Whole numbers, whose sums are exact however they are made."""
    model.q.fused.scales.fill_(1)
    leaf, made_from = (torch.ones(3, K).requires_grad_() for _ in range(2))
    made = made_from * 1
    for projection in (model.q, model.k, model.v):
        assert torch.equal(projection(leaf), projection(made))
    for x in (leaf, made):
        (model.q(x) + model.k(x) + model.v(x)).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.any()
    assert torch.equal(leaf.grad, made_from.grad)  # type: ignore[arg-type]


def test_columns_of_another_mode_are_not_taken(model: Projections) -> None:
    x = torch.randn(3, K)
    made = x.clone().requires_grad_() * 1
    with torch.no_grad():
        model.q(made)
    assert model.k(made).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        model.q(x)
    assert model.k(x).dtype == torch.float32


def test_columns_of_former_weights_are_not_taken(model: Projections) -> None:
    x = torch.randn(3, K)
    model.q(x)
    model.k.fused.scales *= 2
    assert torch.equal(model.k(x), model.k(x.clone()))
    model.q(x)
    scales = {"fused.scales": model.k.fused.scales * 2}
    assert torch.equal(torch.func.functional_call(model.k, scales, x), 2 * model.k(x.clone()))


@pytest.mark.parametrize("grad", [False, True])
def test_results_of_one_row_may_be_written_to(model: Projections, unfrozen: Projections, grad: bool) -> None:
    x = torch.randn(1, K).requires_grad_(grad) * 1

    def scaled(model: Projections) -> Tensor:
        return model.q(x).mul_(2) + model.k(x).mul_(3) + model.v(x).mul_(4)

    assert torch.equal(scaled(model), scaled(unfrozen))


def products(model: Callable[[Tensor], Tensor], x: Tensor) -> int:
    torch._dynamo.reset()
    backend = EagerAndRecordGraphs()
    expected = model(x)
    assert torch.equal(torch.compile(model, backend=backend, fullgraph=True)(x), expected)
    graphs = [
        module for graph in backend.graphs for module in graph.modules() if isinstance(module, torch.fx.GraphModule)
    ]
    return sum(node.target is torch.ops.exllama.gptq_gemm for graph in graphs for node in graph.graph.nodes)


@pytest.mark.parametrize("shape", [(3, K), (2, 3, K), (1, K)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiled_an_argument_of_the_graph_has_one_product(
    model: Projections, shape: tuple[int, ...], requires_grad: bool
) -> None:
    assert products(model, torch.randn(shape, requires_grad=requires_grad)) == 1


def test_compiled_a_region_that_is_checkpointed_has_one_product(model: Projections) -> None:
    """x is an argument of the region, on which a side effect is refused."""
    x = torch.randn(3, K, requires_grad=True)
    assert products(lambda x: checkpoint(model, x, use_reentrant=False), x) == 1
    assert products(lambda x: torch.cond(x.sum() > 0, model, lambda x: model(x) + 1, (x,)), x.detach()) == 2


def test_compiled_a_write_to_x_makes_another_product(model: Projections) -> None:
    def written(x: Tensor) -> Tensor:
        x = x.clone()
        q = model.q(x)
        x.view(-1).mul_(2)
        return q + model.k(x) + model.v(x)

    assert products(written, torch.randn(3, K)) == 2


def test_compiled_another_mode_makes_another_product(model: Projections) -> None:
    def without_gradient(x: Tensor) -> Tensor:
        with torch.no_grad():
            q = model.q(x)
        return q + model.k(x)

    def in_bfloat16(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            q = model.q(x)
        return q + model.k(x)

    x = torch.randn(3, K, requires_grad=True)
    assert products(without_gradient, x) == products(in_bfloat16, x) == 2


def test_a_jagged_x_is_multiplied_and_differentiated(model: Projections) -> None:
    """torch's split of a nested tensor has a backward that crashes the process."""
    components = [torch.randn(3, K), torch.randn(5, K)]
    leaves = [component.clone().requires_grad_() for component in components]
    result = model(torch.nested.as_nested_tensor(leaves, layout=torch.jagged)).values()
    result.square().sum().backward()
    dense = torch.cat(components).requires_grad_() * 1
    dense.retain_grad()
    expected = model(dense)
    expected.square().sum().backward()
    assert torch.equal(result, expected)
    assert torch.equal(torch.cat([leaf.grad for leaf in leaves]), dense.grad)  # type: ignore[misc,arg-type]
