"""torch.fx.symbolic_trace: our layers are leaves, as nn.Linear is."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, symbolic_trace
from torch.fx.passes.shape_prop import ShapeProp

from exllama_ops import ExllamaLinear, freeze, quantize

K, N = 64, 32


def linear(n: int = N, bias: bool = True) -> ExllamaLinear:
    g_idx = (torch.arange(K) // 32)[torch.randperm(K, generator=torch.Generator().manual_seed(0))]
    return ExllamaLinear.from_weight(
        quantize(torch.randn(n, K), 4, 32, g_idx=g_idx, bias=torch.randn(n) if bias else None)
    )


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.c = nn.LayerNorm(K), linear(), linear(bias=False), linear()

    def forward(self, x):  # type: ignore[no-untyped-def]
        x = self.norm(x)
        return self.c(torch.cat([self.a(x), self.b(x=x)], -1))


def modules_called(traced: GraphModule) -> list[Any]:
    return [node.target for node in traced.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_is_traced_without_a_tracer_of_ones_own(frozen: bool) -> None:
    model, x = Model(), torch.randn(2, 3, K)
    if frozen:
        assert freeze(model, (x,)).fused == (("a", "b"),)
    expected = model(x)
    traced = symbolic_trace(model)
    traced.graph.lint()
    assert modules_called(traced) == ["norm", "a", "b", "c"]
    for other in (traced, symbolic_trace(traced), copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(other(x), expected)
    assert torch.equal(Interpreter(traced).run(x), expected)
    assert torch.equal(ShapeProp(traced).propagate(x), expected)


@pytest.mark.parametrize("shape", [(K,), (0, K), (2, 3, K)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_alone_is_traced_into_its_op(bias: bool, shape: tuple[int, ...]) -> None:
    layer, x = linear(bias=bias), torch.randn(shape)
    traced = symbolic_trace(layer)
    assert torch.ops.exllama.gptq_gemm in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(x), layer(x))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        traced(torch.randn(2, K // 2))


def test_a_fused_projection_alone_is_traced_too() -> None:
    model, x = Model(), torch.randn(3, K)
    freeze(model, (x,))
    for projection in (model.a, model.b):
        assert torch.equal(symbolic_trace(projection)(x), projection(x))


def test_forward_hooks_run_once() -> None:
    """They are traced into the graph, where a call of the module would run them again."""
    before, after = nn.Sequential(linear()), nn.Sequential(linear())
    before[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    after[0].register_forward_hook(lambda module, args, out: out * 2)
    for model in (before, after):
        x = torch.randn(3, K)
        assert torch.equal(symbolic_trace(model)(x), model(x))


def test_backward_hooks_run_once() -> None:
    model = nn.Sequential(linear())
    model[0].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    grads = []
    for called in (model, symbolic_trace(model)):
        x = torch.ones(3, K).requires_grad_()
        called(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("x", [None, [[0.0] * K]])
def test_what_is_no_tensor_is_refused_by_name(x: Tensor) -> None:
    with pytest.raises(TypeError, match=f"^ExllamaLinear: x must be a Tensor; got {type(x).__name__}$"):
        linear()(x)
