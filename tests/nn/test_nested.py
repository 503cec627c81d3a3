"""Nested tensors through ExllamaLinear: what nn.Linear makes of their components, or an error that says why not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from exllama_ops import ExllamaLinear, quantize

K = 64


def layer() -> ExllamaLinear:
    torch.manual_seed(0)
    return ExllamaLinear.from_weight(quantize(torch.randn(K, K), 4, 32, bias=torch.randn(K)))


def jagged(*components: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor(list(components), layout=torch.jagged)


def with_holes() -> Tensor:
    lengths = torch.tensor([3, 0, 4])
    return torch.nested.narrow(torch.randn(3, 9, K), 1, torch.tensor([0, 1, 5]), lengths, layout=torch.jagged)


KINDS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: jagged(torch.randn(3, K), torch.randn(5, K)),
    "an empty component": lambda: jagged(torch.randn(0, K), torch.randn(5, K)),
    "3-d components": lambda: jagged(torch.randn(3, 2, K), torch.randn(1, 2, K)),
    "transposed": lambda: jagged(torch.randn(3, 2, K), torch.randn(1, 2, K)).transpose(1, 2),
    "with holes": with_holes,
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_component_is_multiplied_and_the_offsets_stay(kind: str) -> None:
    linear, x = layer(), KINDS[kind]()
    y = linear(x)
    for result, component in zip(y.unbind(), x.unbind(), strict=True):
        assert torch.equal(result, linear(component))
    assert y.shape == x.shape  # which holds the offsets' own size
    assert y._max_seqlen == x._max_seqlen


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_components(kind: str) -> None:
    linear, x = layer(), KINDS[kind]().detach().requires_grad_()
    torch.cat([result.square().flatten() for result in linear(x).unbind()]).sum().backward()
    assert x.grad is not None
    for grad, component in zip(x.grad.unbind(), x.detach().unbind(), strict=True):
        component = component.requires_grad_()
        linear(component).square().sum().backward()
        torch.testing.assert_close(grad, component.grad)


def test_a_residual_and_a_compiled_layer_take_a_jagged_x() -> None:
    torch._dynamo.reset()
    linear = layer()
    compiled = torch.compile(lambda x: x + linear(x), backend="aot_eager", fullgraph=True)
    for x in (KINDS["rows"](), KINDS["3-d components"]()):
        for result, component in zip(compiled(x).unbind(), x.unbind(), strict=True):
            assert torch.equal(result, component + linear(component))


def test_autocast_casts_a_jagged_x() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert layer()(KINDS["rows"]()).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (lambda: torch.nested.nested_tensor([torch.randn(3, K)]), r"nested x must have layout torch.jagged.*x.unbind"),
        (lambda: jagged(torch.randn(3, K - 1), torch.randn(2, K - 1)), r"x must have shape \(\*, K\) with K=64; got"),
        # As many values as a row has: their layout alone says that they are none.
        (lambda: jagged(torch.randn(30), torch.randn(34)), r"x must have shape \(\*, K\) with K=64; got"),
        (lambda: jagged(torch.randn(30, 5), torch.randn(34, 5)).transpose(1, 2), r"x must have shape .* K=64; got"),
        (lambda: torch.randn(3, K).to_sparse(), "x must be dense, of layout torch.strided; got torch.sparse_coo"),
        (lambda: torch.randn(3, K).to_sparse_csr(), "x must be dense, of layout torch.strided; got torch.sparse_csr"),
        (lambda: torch.randn(3, K).to_mkldnn(), "x must be dense, of layout torch.strided; got torch._mkldnn"),
    ],
)
def test_other_layouts_and_sizes_are_refused_by_name(x: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^ExllamaLinear: .*{message}"):
        layer()(x())
