"""Compiled models after what users do to them: new weights, other devices, regions, checkpointing, autocast, shards."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from compile.blocks import FUSED, Block, K, Recorder
from exllama_ops import ExllamaLinear


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def blocks(number: int, act_order: bool = True) -> nn.Sequential:
    return nn.Sequential(*(Block(act_order, seed) for seed in range(number)))


@pytest.mark.parametrize("act_order", [False, True])
def test_new_weights_are_used_by_the_same_graph(act_order: bool) -> None:
    """Nothing of a weight is in the graph. A state_dict of another order of rows takes the old one's place."""
    model, recorder = Block(act_order), Recorder()
    compiled, x = torch.compile(model, backend=recorder, fullgraph=True), torch.randn(3, K)
    with torch.no_grad():
        compiled(x)
        before = model(x)
        model.load_state_dict(Block(act_order, seed=1).state_dict())
        assert torch.equal(compiled(x), Block(act_order, seed=1)(x))
        assert not torch.equal(compiled(x), before)
        model.q.scales.mul_(2)
        model.k.qweight.copy_(model.v.qweight)
        assert torch.equal(compiled(x), model(x))
        assert len(recorder.before) == 1


def test_orders_that_differ_after_loading_are_no_longer_taken_together() -> None:
    model, other, recorder = Block(act_order=True), Block(act_order=True, seed=1), Recorder()
    compiled, x = torch.compile(model, backend=recorder, fullgraph=True), torch.randn(3, K)
    with torch.no_grad():
        compiled(x)
        model.k.load_state_dict(other.k.state_dict())
        assert torch.equal(compiled(x), model(x))
    assert recorder.after == [FUSED, Counter({"gptq_gemm_multi/2": 2, "gptq_gemm": 3})]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_model_that_was_moved_or_copied_is_taken_together_again(dtype: torch.dtype) -> None:
    recorder = Recorder()
    model = copy.deepcopy(Block(act_order=True)).to(dtype).share_memory()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    compiled, x = torch.compile(model, backend=recorder, fullgraph=True), torch.randn(3, K, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    assert recorder.after == [FUSED]


def test_a_dtype_after_compiling_gives_right_numbers() -> None:
    model, recorder = Block(act_order=True), Recorder()
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    with torch.no_grad():
        compiled(torch.randn(3, K))
        model.half()
        x = torch.randn(3, K).half()
        assert torch.equal(compiled(x), model(x))
    assert recorder.after == [FUSED, FUSED]


@pytest.mark.parametrize("act_order", [False, True])
def test_compiled_regions_share_one_graph(act_order: bool) -> None:
    """What transformers and others do: compile a block, not the model."""
    model, recorder = blocks(3, act_order), Recorder()
    x = torch.randn(3, K)
    with torch.no_grad():
        expected = model(x)
        for block in model:
            block.compile(backend=recorder, fullgraph=True)
        assert torch.equal(model(x), expected)
    assert recorder.after == [FUSED]


def test_a_nested_region_is_in_the_graph_once() -> None:
    model, recorder = blocks(3), Recorder()

    @torch.compiler.nested_compile_region
    def region(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return block(x)

    def forward(x: torch.Tensor) -> torch.Tensor:
        for block in model:
            x = region(block, x)
        return x

    x = torch.randn(3, K)
    with torch.no_grad():
        result = torch.compile(forward, backend=recorder, fullgraph=True)(x)
        assert torch.equal(result, model(x))
    assert recorder.after == [FUSED]


def test_activation_checkpointing_computes_the_same_gradient() -> None:
    block, recorder = Block(), Recorder()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=False)

    x, y = (torch.ones(3, K, requires_grad=True) for _ in range(2))
    torch.compile(forward, backend=recorder, fullgraph=True)(x).square().sum().backward()
    block(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    assert recorder.after == [FUSED]
    # Which overloads a checkpointed region has depends on torch; those of a policy are in tests/ops/test_names.py.
    forward_ops, backward_ops = (
        Counter(name.removesuffix(".no_autograd") for name in graph.elements()) for graph in recorder.aot
    )
    assert forward_ops == FUSED
    # Recomputed for the nonlinear functions: all but the last product.
    assert backward_ops == FUSED - Counter({"gptq_gemm": 1}) + Counter({"gptq_gemm_dx": 7})


def test_autocast_casts_x_once_for_all() -> None:
    block, recorder = Block(), Recorder()
    compiled, x = torch.compile(block, backend=recorder, fullgraph=True), torch.randn(3, K)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), block(x))
    assert recorder.after == [FUSED]


def test_a_shared_order_costs_no_guard() -> None:
    """One that says that it is shared stands for the one of each tensor that it saves."""

    def guards(act_order: bool) -> Counter[str]:
        torch._dynamo.reset()
        explained = torch._dynamo.explain(Block(act_order))(torch.randn(3, K))
        return Counter(guard.create_fn_name() for guard in explained.out_guards)

    plain, shared = guards(act_order=False), guards(act_order=True)
    # q, k, v and gate, up: two tensors in the place of five.
    assert shared - plain == Counter({"DUPLICATE_INPUT": 3})
    assert plain - shared == Counter({"TENSOR_MATCH": 3})


@pytest.fixture
def one_process() -> Iterator[Any]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_fsdp2_shards_what_is_trained_and_leaves_the_buffers(compiled: bool, one_process: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.adapter = Block(act_order=True), nn.Linear(K, K, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.adapter(x)

    model, x, recorder = Adapted(), torch.randn(3, K), Recorder()
    expected = model(x)
    fully_shard(model, mesh=one_process)
    # FSDP's hooks are not compiled: they break the graph before and after ours.
    run = torch.compile(model, backend=recorder) if compiled else model
    result = run(x)
    assert torch.equal(result, expected)
    assert recorder.after == ([FUSED] if compiled else [])
    result.sum().backward()
    assert model.adapter.weight.grad is not None
    assert all(type(buffer) is torch.Tensor for buffer in model.buffers())


def test_a_dtensor_is_refused_by_name(one_process: Any) -> None:
    """No rule says how the words of a weight are sharded; a shard of a checkpoint is a weight of its own."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    layer = ExllamaLinear.from_weight(Block().q.to_weight())
    for name, buffer in list(layer.named_buffers()):
        setattr(layer, name, distribute_tensor(buffer, one_process, [Replicate()]))
    x = distribute_tensor(torch.randn(3, K), one_process, [Replicate()])
    rule = "exllama.gptq_gemm.no_autograd does not have a sharding strategy registered"
    with pytest.raises(NotImplementedError, match=rule):
        layer(x)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=rule):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
