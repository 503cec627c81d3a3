"""Experts in stacks compute what a layer for each of them does, bit for bit, whatever is done to the layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from exllama_ops import ExllamaExperts, ExllamaLinear, GptqWeight, quantize
from exllama_ops.nn.experts import sum_of_experts
from exllama_ops.nn.packed_experts import PackedExperts

E, HIDDEN, INNER, K = 5, 64, 96, 2


def weights(inputs: int, outputs: int, act_order: bool = False, bits: int = 4, seed: int = 0) -> Iterator[GptqWeight]:
    for expert in range(E):
        random = torch.Generator().manual_seed(seed + expert)
        W = torch.randn(outputs, inputs, generator=random)
        g_idx = torch.arange(inputs, dtype=torch.int32) // 32
        order = g_idx[torch.randperm(inputs, generator=random)] if act_order else None
        yield quantize(W, bits, 32, g_idx=order)


def experts(act_order: bool = False, gate: bool = True) -> ExllamaExperts:
    return ExllamaExperts(
        weights(HIDDEN, INNER, act_order) if gate else None,
        weights(HIDDEN, INNER, act_order, seed=10),
        weights(INNER, HIDDEN, act_order, seed=20),
    )


def routing(tokens: int, k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, E, generator=random)
    scores[:, 3] = 0  # an expert that nobody takes
    chosen = scores.topk(k)
    return torch.randn(tokens, HIDDEN, generator=random), chosen.indices, chosen.values


def one_by_one(module: ExllamaExperts, x: Tensor, ids: Tensor, chosen: Tensor) -> Tensor:
    """By the layers, of which each is called with its own rows."""

    def expert(index: int, rows: Tensor) -> Tensor:
        up, down = module.up[index], module.down[index]
        inner = up(rows) if module.gate is None else module.activation(module.gate[index](rows)) * up(rows)
        y: Tensor = down(inner if module.gate is not None else module.activation(inner))
        return y

    return sum_of_experts(x, ids, chosen, expert)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_the_sum_has_the_bits_of_a_call_of_each_layer(act_order: bool, gate: bool, dtype: torch.dtype) -> None:
    module = experts(act_order, gate)
    for tokens in (0, 1, 3, 40):
        x, ids, chosen = routing(tokens)
        y = module(x.to(dtype), ids, chosen)
        assert y.dtype == dtype
        assert torch.equal(y, one_by_one(module, x.to(dtype), ids, chosen))


def test_ids_of_no_expert_add_nothing() -> None:
    module = experts()
    x, ids, chosen = routing(7)
    expected = module(x, ids, torch.where(ids == 1, 0, chosen))
    for none in (E, E + 3, -1):
        assert torch.equal(module(x, torch.where(ids == 1, none, ids), chosen), expected)
    assert not module(x, torch.full_like(ids, E), chosen).any()


def test_leading_dimensions_are_kept() -> None:
    module = experts()
    x, ids, chosen = routing(6)
    y = module(x.view(2, 3, HIDDEN), ids.view(2, 3, K), chosen.view(2, 3, K))
    assert torch.equal(y, module(x, ids, chosen).view(2, 3, HIDDEN))


def test_one_graph_serves_every_routing() -> None:
    module = experts(act_order=True)
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for tokens in (2, 3, 17):
        inputs = routing(tokens)
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 0)
        assert torch.equal(compiled(*inputs), module(*inputs))
    assert counter.frame_count == 1


def test_exported_experts_keep_the_op() -> None:
    module, inputs = experts(), routing(3)
    program = torch.export.export(module, inputs, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * 3)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("gptq_moe_gemm" in target for target in targets) == 3
    more = routing(9)
    assert torch.equal(program.module()(*more), module(*more))


def test_gradients_flow_to_x_and_to_the_weights_of_the_router() -> None:
    module = experts()
    x, ids, chosen = routing(4)
    x.requires_grad_(), chosen.requires_grad_()
    grads = torch.autograd.grad(module(x, ids, chosen).square().sum(), (x, chosen))
    expected = torch.autograd.grad(one_by_one(module, x, ids, chosen).square().sum(), (x, chosen))
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want)


def stacks_are_the_layers_memory(module: ExllamaExperts) -> bool:
    names = ("qweight", "qzeros", "scales")
    return all(
        getattr(layer, name).untyped_storage().data_ptr() == getattr(stack, name).untyped_storage().data_ptr()
        for stack, layers in zip(module.stacks, (module.gate, module.up, module.down), strict=True)
        for layer in layers
        for name in names
    )


def test_the_layers_compute_with_views_of_the_stacks() -> None:
    module = experts()
    assert stacks_are_the_layers_memory(module)
    assert not any(name.startswith("stacks") for name in module.state_dict())


@pytest.mark.parametrize("change", ["half", "copy", "load", "load with orders", "load by assigning", "meta and back"])
def test_what_becomes_of_the_layers_becomes_of_the_stacks(change: str) -> None:
    module = experts(act_order=change == "load with orders")
    inputs = routing(5)
    if change == "half":
        module = module.half().float()
    elif change == "copy":
        module = copy.deepcopy(module)
    elif change == "meta and back":
        state = module.state_dict()
        module = module.to("meta").to_empty(device="cpu")
        module.load_state_dict(state)
    else:
        torch.manual_seed(5)
        other = ExllamaExperts(
            weights(HIDDEN, INNER, module.up[0].act_order, seed=30),
            weights(HIDDEN, INNER, module.up[0].act_order, seed=40),
            weights(INNER, HIDDEN, module.up[0].act_order, seed=50),
        )
        expected = other(*inputs)
        module.load_state_dict(other.state_dict(), assign=change == "load by assigning")
        assert torch.equal(module(*inputs), expected)
    assert stacks_are_the_layers_memory(module)
    assert torch.equal(module(*inputs), one_by_one(module, *inputs))


def test_what_one_layer_loads_is_computed_with() -> None:
    module, inputs = experts(act_order=True), routing(5)
    other = ExllamaLinear.from_weight(next(weights(HIDDEN, INNER, act_order=True, seed=60)))
    module.up[1].load_state_dict(other.state_dict())
    assert stacks_are_the_layers_memory(module)
    assert torch.equal(module(*inputs), one_by_one(module, *inputs))


@pytest.mark.parametrize(
    ("replace", "what"),
    [
        (lambda layer: layer.set_packed(layer.to_packed()), "set_packed"),
        (lambda layer: setattr(layer, "scales", layer.scales.clone()), "assigning scales"),
        (lambda layer: setattr(layer, "qweight", layer.qweight.clone()), "assigning qweight"),
    ],
)
def test_a_tensor_in_a_stack_is_not_replaced(replace: Callable[[ExllamaLinear], None], what: str) -> None:
    module = experts()
    with pytest.raises(ValueError, match=f"^ExllamaLinear: {what} would replace a tensor that lies in the stack"):
        replace(module.up[1])
    module.up[1].scales.mul_(2)  # in place it is seen
    inputs = routing(5)
    assert torch.equal(module(*inputs), one_by_one(module, *inputs))
    for stack in module.stacks:
        stack.release()
    replace(module.up[1])


def test_biases_are_those_of_each_rows_expert() -> None:
    layers = [ExllamaLinear.from_weight(weight) for weight in weights(HIDDEN, INNER)]
    for layer in layers:
        layer.bias = torch.randn(INNER)
    stack = PackedExperts.of(layers)
    x, ids = torch.randn(6, HIDDEN), torch.tensor([0, 0, 2, 4, 4, 9])
    y = stack(x, torch.tensor([0, 2, 2, 3, 3, 5], dtype=torch.int32), ids)
    for row, expert in enumerate([0, 0, 2, 4, 4]):
        assert torch.equal(y[row], layers[expert](x[row : row + 1])[0])


def test_autocast_casts_x_and_not_the_scales() -> None:
    module = experts()
    x, ids, _ = routing(3)
    with torch.autocast("cpu", torch.bfloat16):
        inner = module.stacks[0](x, torch.tensor([0, 3, 3, 3, 3, 3], dtype=torch.int32), ids[:, 0])
    assert inner.dtype == torch.bfloat16
    assert module.stacks[0].scales.dtype == module.up[0].scales.dtype


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: quantize(torch.randn(INNER, HIDDEN), 8, 32), "bits 8, not 4"),
        (lambda: quantize(torch.randn(INNER, HIDDEN), 4, 16), "group_size 16, not 32"),
        (lambda: quantize(torch.randn(INNER, 2 * HIDDEN), 4, 32), "in_features 128, not 64"),
    ],
)
def test_an_expert_that_differs_is_refused_with_the_reason(other: Callable[[], GptqWeight], reason: str) -> None:
    layers = [ExllamaLinear.from_weight(weight) for weight in weights(HIDDEN, INNER)]
    layers[2] = ExllamaLinear.from_weight(other())
    with pytest.raises(ValueError, match=f"PackedExperts: all experts must be of one kind; got one with .*{reason}"):
        PackedExperts.of(layers)
    x = torch.randn(1, HIDDEN)
    assert torch.equal(layers[0](x), ExllamaLinear.from_weight(next(weights(HIDDEN, INNER)))(x))  # it still computes


def test_projections_of_different_numbers_of_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"all projections must have as many experts; got \[5, 5, 4\]"):
        ExllamaExperts(
            weights(HIDDEN, INNER), weights(HIDDEN, INNER), [*weights(INNER, HIDDEN)][:4], nn.functional.gelu
        )
