"""Layers with equal orders of rows share one tensor, and no layer sees what happens to another."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from exllama_ops import ExllamaLinear, convert, open_gptq, prepare, quantize, save_gptq
from exllama_ops.layout.interning import intern

K = 96


def order(seed: int) -> torch.Tensor:
    return (torch.arange(K) // 32)[torch.randperm(K, generator=torch.Generator().manual_seed(seed))]


def weight(order_seed: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return quantize(torch.randn(64, K, generator=generator), 4, 32, g_idx=order(order_seed))


def pair(first: int = 0, second: int = 0) -> nn.Sequential:
    return nn.Sequential(*(ExllamaLinear.from_weight(weight(seed)) for seed in (first, second)))


def shares(model: nn.Sequential) -> bool:
    return model[0].perm is model[1].perm


def test_equal_permutations_are_one_tensor_and_others_are_not() -> None:
    assert prepare(weight(0)).perm is prepare(weight(0, seed=1)).perm
    assert prepare(weight(0)).perm is not prepare(weight(1)).perm
    assert shares(pair())
    assert not shares(pair(0, 1))


def test_the_order_of_a_filled_weight_is_shared_too() -> None:
    raw = torch.randint(0, 3, (K,), generator=torch.Generator().manual_seed(0))
    layers = [ExllamaLinear.from_weight(quantize(torch.randn(64, K), 4, 32, g_idx=raw)) for _ in range(2)]
    assert layers[0].source_group_size == 32
    assert layers[0].perm is layers[1].perm


def test_converted_layers_share_theirs() -> None:
    model = nn.Sequential(*(nn.Linear(K, 64, bias=False, dtype=torch.float16) for _ in range(2)))
    convert(model, {"0": weight(0), "1": weight(0, seed=1)})
    assert shares(model)


def test_they_are_shared_after_a_move_and_a_copy() -> None:
    model = pair()
    # As a move to another device: every tensor is a new one.
    model._apply(torch.clone)
    assert shares(model)
    copied = copy.deepcopy(model)
    assert shares(copied)
    assert copied[0].perm is not model[0].perm


def test_values_that_a_move_does_not_bring_are_not_taken_for_an_order() -> None:
    """As to_empty: what was allocated may be equal by chance, and is written to afterwards."""
    model = nn.Sequential(ExllamaLinear(K, 64, 4, 32, act_order=True), ExllamaLinear(K, 64, 4, 32, act_order=True))
    model._apply(torch.zeros_like)
    assert not shares(model)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_a_layer_leaves_the_others_alone(assign: bool) -> None:
    model, x = pair(), torch.randn(3, K)
    before = model[0](x)
    other = ExllamaLinear.from_weight(weight(1))
    model[1].load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert torch.equal(model[0](x), before)
    assert torch.equal(model[1](x), other(x))
    assert not shares(model)


def test_layers_that_load_equal_orders_share_them_and_keep_their_address() -> None:
    model = nn.Sequential(*(ExllamaLinear(K, 64, 4, 32, bias=False, act_order=True) for _ in range(2)))
    source = pair()
    model.load_state_dict(source.state_dict())
    assert shares(model)
    loaded = model[0].perm
    model.load_state_dict(copy.deepcopy(source.state_dict()))
    assert model[0].perm is loaded


def test_a_state_dict_shares_nothing(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason='needs the extra "hf"')
    model, loaded = pair(), pair(1, 2)
    state = model.state_dict()
    assert state["0.perm"].data_ptr() != state["1.perm"].data_ptr()
    safetensors.save_file(state, tmp_path / "state.safetensors")
    loaded.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    x = torch.randn(3, K)
    assert torch.equal(loaded[1](x), model[1](x))
    assert shares(loaded)


def test_a_checkpoint_of_layers_that_share_is_written_and_read(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason='needs the extra "hf"')
    model = pair()
    weights = {f"layer.{name}": layer.to_weight() for name, layer in model.named_children()}
    save_gptq(tmp_path, weights, sym=False, desc_act=True)
    read = {name: ExllamaLinear.from_weight(loaded) for name, loaded in open_gptq(tmp_path).weights().items()}
    assert read["layer.0"].perm is read["layer.1"].perm is model[0].perm


def test_what_has_no_values_to_read_is_left_as_it_is() -> None:
    for tensor in (torch.empty(0, dtype=torch.int32), torch.empty(K, dtype=torch.int32, device="meta")):
        assert intern(tensor) is tensor
        assert intern(tensor.clone()) is not tensor


def test_an_order_that_somebody_wrote_to_is_not_handed_out() -> None:
    first = torch.randperm(K).int()
    values = first.clone()
    assert intern(first) is first
    first.add_(1)
    assert intern(values) is values


def test_a_model_that_trains_gets_no_inference_tensor() -> None:
    """Autograd refuses to save one for backward."""
    with torch.inference_mode():
        inference = pair(5, 5)
    model, x = pair(5, 5), torch.randn(3, K, requires_grad=True)
    assert inference[0].perm.is_inference()
    model[0](x).sum().backward()
    assert x.grad is not None


def test_orders_that_nobody_holds_are_forgotten() -> None:
    kept = pair(7, 7)
    values = kept[0].perm.clone()
    address = kept[0].perm.data_ptr()
    del kept
    again = intern(values)
    assert again is values
    assert again.data_ptr() != address
