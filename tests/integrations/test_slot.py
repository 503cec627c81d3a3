"""`GptqSlot`: whatever way a loader fills it, it becomes the layer that the checkpoint's own reader gives."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoint.builder import DATA, module, write
from exllama_ops import ExllamaLinear, GptqModule, GptqSlot, open_gptq
from exllama_ops.layout import SUPPORTED_BITS

CHECKPOINTS = tuple(sorted(path.parent.name for path in DATA.glob("*/quantize_config.json")))
NAME = "m.q"


def tensors_of(path: Path, name: str) -> dict[str, Tensor]:
    """What the file has, by the names within the module."""
    tensors = load_file(path / "model.safetensors")
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def assert_same(layer: nn.Module, other: ExllamaLinear) -> None:
    assert type(layer) is ExllamaLinear
    state, expected = layer.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    assert (layer.bits, layer.group_size, layer.shuffled) == (other.bits, other.group_size, other.shuffled)
    assert vars(layer).keys() == vars(other).keys()
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(layer(x), other(x))


# --- the ways in which loaders fill a module --------------------------------------------------------------------------


def by_state_dict(described: GptqModule, tensors: dict[str, Tensor]) -> GptqSlot:
    slot = GptqSlot(described)
    slot.load_state_dict(tensors, strict=True)
    return slot


def by_assigning_a_state_dict(described: GptqModule, tensors: dict[str, Tensor]) -> GptqSlot:
    slot = GptqSlot(described, device="meta")
    slot.load_state_dict(tensors, strict=True, assign=True)
    return slot


def by_copy(described: GptqModule, tensors: dict[str, Tensor]) -> GptqSlot:
    slot = GptqSlot(described, device="cpu")
    for name, buffer in slot.named_buffers():
        buffer.copy_(tensors[name])
    return slot


def by_assigning_attributes(described: GptqModule, tensors: dict[str, Tensor]) -> GptqSlot:
    slot = GptqSlot(described, device="meta")
    for name in described.tensors:
        setattr(slot, name, tensors[name])
    return slot


def by_parameters_over_its_memory(described: GptqModule, tensors: dict[str, Tensor]) -> GptqSlot:
    """As vLLM does: the layer has parameters, each with a loader, and the slot is a part of the layer."""
    layer = nn.Module()
    layer.slot = GptqSlot(described)
    for name in described.tensors:
        parameter = nn.Parameter(getattr(layer.slot, name), requires_grad=False)
        parameter.weight_loader = lambda param, loaded: param.data.copy_(loaded)
        layer.register_parameter(name, parameter)
    assert set(dict(layer.named_parameters())) == set(described.tensors)
    for name, parameter in layer.named_parameters():
        parameter.weight_loader(parameter, tensors[name])
    for name in described.tensors:
        delattr(layer, name)
    return layer.slot


def by_parameters_of_its_own(described: GptqModule, tensors: dict[str, Tensor]) -> GptqSlot:
    slot = GptqSlot(described, device="meta")
    for name in described.tensors:
        delattr(slot, name)
        slot.register_parameter(name, nn.Parameter(tensors[name], requires_grad=False))
    return slot


FILLS = (
    by_state_dict, by_assigning_a_state_dict, by_copy, by_assigning_attributes, by_parameters_over_its_memory,
    by_parameters_of_its_own,
)  # fmt: skip
Fill = Callable[[GptqModule, dict[str, Tensor]], GptqSlot]


@pytest.mark.parametrize("path", CHECKPOINTS)
@pytest.mark.parametrize("fill", FILLS, ids=lambda fill: fill.__name__)
def test_a_filled_slot_becomes_the_layer_of_the_checkpoint_in_place(fill: Fill, path: str) -> None:
    checkpoint = open_gptq(DATA / path)
    for name in checkpoint.quantized:
        tensors = tensors_of(DATA / path, name)
        before = copy.deepcopy(tensors)
        slot = fill(checkpoint.module(name), tensors)
        layer = slot.finish()
        assert layer is slot
        assert_same(layer, ExllamaLinear.from_weight(checkpoint.read(name)))
        assert all(torch.equal(tensors[key], before[key]) for key in before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_every_width_and_both_zero_offsets(tmp_path: Path, bits: int, fmt: str, act: bool, bias: bool) -> None:
    tensors = module(NAME, K=96, N=32, bits=bits, group_size=32, sym=False, act=act, bias=bias, fmt=fmt)
    write(tmp_path, tensors, bits=bits, sym=False, desc_act=act, checkpoint_format=fmt)
    checkpoint = open_gptq(tmp_path)
    assert checkpoint.module(NAME).zero_offset == (1 if fmt == "gptq" else 0)
    layer = by_state_dict(checkpoint.module(NAME), tensors_of(tmp_path, NAME)).finish()
    assert layer.act_order == act
    assert_same(layer, ExllamaLinear.from_weight(checkpoint.read(NAME)))


def test_a_module_said_by_hand_needs_no_checkpoint(tmp_path: Path) -> None:
    tensors = module(NAME, K=64, N=32, bits=4, group_size=16, sym=False, act=True)
    checkpoint = open_gptq(write(tmp_path, tensors, group_size=16, sym=False, desc_act=True))
    described = GptqModule(64, 32, bits=4, group_size=16, zero_offset=1)
    assert described == checkpoint.module(NAME)
    layer = by_copy(described, tensors_of(tmp_path, NAME)).finish()
    assert_same(layer, ExllamaLinear.from_weight(checkpoint.read(NAME)))


def test_a_symmetric_module_needs_no_qzeros_and_no_g_idx(tmp_path: Path) -> None:
    tensors = module(NAME)
    del tensors[f"{NAME}.qzeros"], tensors[f"{NAME}.g_idx"]
    checkpoint = open_gptq(write(tmp_path, tensors))
    assert checkpoint.module(NAME).tensors == ("qweight", "scales")
    layer = by_copy(checkpoint.module(NAME), tensors_of(tmp_path, NAME)).finish()
    assert_same(layer, ExllamaLinear.from_weight(checkpoint.read(NAME)))


@pytest.mark.parametrize("declared", ["gptq", "gptq_v2"])
def test_symmetric_zero_points_of_the_other_zero_offset_are_recognised(tmp_path: Path, declared: str) -> None:
    stored = "gptq_v2" if declared == "gptq" else "gptq"
    checkpoint = open_gptq(write(tmp_path, module(NAME, fmt=stored), checkpoint_format=declared))
    slot = by_copy(checkpoint.module(NAME), tensors_of(tmp_path, NAME))
    with pytest.warns(UserWarning, match=r"^GptqSlot: zero_offset=\d is declared, but .*; they are read so$") as seen:
        layer = slot.finish()
    assert [warning.filename for warning in seen] == [__file__]
    with pytest.warns(UserWarning, match="is declared, but symmetric zero points"):
        assert_same(layer, ExllamaLinear.from_weight(checkpoint.read(NAME)))


def test_a_row_shard_may_hold_the_scales_of_all_groups(tmp_path: Path) -> None:
    whole = module(NAME, K=64, N=32, group_size=16, sym=False, act=True)
    weight = open_gptq(write(tmp_path, whole, group_size=16, sym=False, desc_act=True)).read(NAME)
    for rank in range(2):
        described = GptqModule(32, 32, bits=4, group_size=16, num_groups=4)
        tensors = tensors_of(tmp_path, NAME)
        tensors["qweight"] = tensors["qweight"].chunk(2)[rank]
        tensors["g_idx"] = tensors["g_idx"].chunk(2)[rank]
        layer = by_copy(described, tensors).finish()
        shard = weight.shard(range(rank * 32, rank * 32 + 32))
        assert torch.equal(layer.dequantize(), ExllamaLinear.from_weight(shard).dequantize())


def test_zeros_in_the_g_idx_of_a_row_shard_are_group_zero(tmp_path: Path) -> None:
    """Where the scales are those of other rows too, zeros are no g_idx that was never filled in."""
    tensors = module(NAME, K=64, N=32, bits=4, group_size=16, sym=False)
    weight = open_gptq(write(tmp_path, tensors, group_size=16, sym=False)).read(NAME)
    described = GptqModule(16, 32, bits=4, group_size=8, num_groups=4)
    part = tensors_of(tmp_path, NAME)
    part["qweight"], part["g_idx"] = part["qweight"][:2], torch.zeros(16, dtype=torch.int32)
    layer = by_copy(described, part).finish()
    assert torch.equal(layer.dequantize(), ExllamaLinear.from_weight(weight.shard(range(16))).dequantize())


def test_a_model_on_the_meta_device_is_filled_and_finished_like_any_other(tmp_path: Path) -> None:
    path = DATA / "tiny-w3g32-asym-act-v2"
    checkpoint = open_gptq(path)
    names = checkpoint.quantized[:3]
    model = nn.Module()
    for name in names:
        model.register_module(name.replace(".", "-"), GptqSlot(checkpoint.module(name), device="meta"))
    assert all(tensor.is_meta for tensor in model.state_dict().values())  # transformers asks for it
    model = copy.deepcopy(model)
    state = {
        f"{name.replace('.', '-')}.{key}": tensor for name in names for key, tensor in tensors_of(path, name).items()
    }
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state, assign=True)
    held = [weakref.ref(tensor) for tensor in model.buffers()]
    del state
    slots = dict(model.named_children())
    for slot in slots.values():
        slot.finish()
    gc.collect()
    assert not any(ref() is not None for ref in held), "the tensors of the file are let go"
    assert dict(model.named_children()) == slots
    for name in names:
        layer = model.get_submodule(name.replace(".", "-"))
        assert_same(layer, ExllamaLinear.from_weight(checkpoint.read(name)))


def test_a_bound_forward_and_hooks_outlive_the_change_of_class() -> None:
    """accelerate keeps the forward that a module had when it got its hooks."""
    checkpoint = open_gptq(DATA / "tiny-w3g32-asym-act-v2")
    name = checkpoint.quantized[0]
    slot = by_copy(checkpoint.module(name), tensors_of(DATA / "tiny-w3g32-asym-act-v2", name))
    forward, seen = slot.forward, []
    slot.register_forward_hook(lambda module, args, y: seen.append(y))
    layer = slot.finish()
    x = torch.randn(2, layer.in_features)
    assert torch.equal(forward(x), layer(x))
    assert len(seen) == 1


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quantizer() -> Iterator[None]:
    """The hooks of transformers that a loader of GPTQ checkpoints takes, without optimum and gptqmodel."""
    pytest.importorskip("transformers", reason='needs the extra "hf"')
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer

    class Quantizer(HfQuantizer):
        requires_calibration = True
        is_trainable = is_serializable = True

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            pass

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            checkpoint = open_gptq(model.config._name_or_path)
            for name in checkpoint.quantized:
                model.set_submodule(name, GptqSlot(checkpoint.module(name), device="meta"))

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
            for slot in [part for part in model.modules() if isinstance(part, GptqSlot)]:
                slot.finish()

    former = AUTO_QUANTIZER_MAPPING["gptq"]
    AUTO_QUANTIZER_MAPPING["gptq"] = Quantizer
    yield
    AUTO_QUANTIZER_MAPPING["gptq"] = former


@pytest.mark.usefixtures("quantizer")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_from_pretrained_fills_slots_and_gives_the_logits_of_load_model(name: str) -> None:
    from transformers import AutoModelForCausalLM

    from exllama_ops import load_model

    ids = torch.arange(8).unsqueeze(0)
    model = AutoModelForCausalLM.from_pretrained(DATA / name, dtype=torch.bfloat16).eval()
    ours = load_model(DATA / name, torch.bfloat16, progress=False)
    assert sum(isinstance(module, ExllamaLinear) for module in model.modules()) > 6
    assert torch.equal(model(ids).logits, ours(ids).logits)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def slot() -> GptqSlot:
    return GptqSlot(GptqModule(64, 32, bits=4, group_size=16, sym=False, tensors=(*GptqModule.tensors, "bias")))


def filled(slot: GptqSlot) -> GptqSlot:
    for name, tensor in module("m", K=64, N=32, bits=4, group_size=16, sym=False, act=True, bias=True).items():
        setattr(slot, name.removeprefix("m."), tensor)
    return slot


def assert_refused(slot: GptqSlot, text: str) -> None:
    before = dict(slot.named_buffers())
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        slot.finish()
    assert type(slot) is GptqSlot
    assert dict(slot.named_buffers()) == before


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales", "g_idx", "bias"])
def test_a_tensor_that_was_never_filled_is_named(slot: GptqSlot, name: str) -> None:
    empty = copy.deepcopy(getattr(slot, name))
    setattr(filled(slot), name, empty)
    assert_refused(slot, f"GptqSlot: {name} was never filled")
    setattr(slot, name, empty.to("meta"))
    assert_refused(slot, f"GptqSlot: {name} was never filled: it is on the meta device still")


@pytest.mark.parametrize(
    ("name", "part"), [("qweight", (slice(None), -1)), ("qweight", (0,)), ("qzeros", (slice(None), 1)), ("g_idx", (5,))]
)
def test_a_tensor_that_was_filled_in_part_is_named(slot: GptqSlot, name: str, part: tuple[Any, ...]) -> None:
    empty = copy.deepcopy(getattr(slot, name))
    getattr(filled(slot), name)[part] = empty[part]
    assert_refused(slot, f"GptqSlot: {name} was filled in part alone")


def test_one_word_that_is_as_an_unfilled_one_is_a_weight(slot: GptqSlot) -> None:
    word = int(slot.qweight[0, 0])
    filled(slot).qweight[0, 0] = word
    assert int(slot.finish().to_weight().qweight[0, 0]) == word


WRONG = [
    ("scales", lambda t: t.bfloat16(), "must have dtype torch.float16, as in the file, and is not cast; got torch.bfl"),
    ("g_idx", lambda t: t.long(), "must have dtype torch.int32, as in the file, and is not cast; got torch.int64"),
    (
        "qweight",
        lambda t: t[:4],
        "must have shape (K*bits/32, N) = (8, 32) for K=64, N=32, bits=4, group_size=16; got ",
    ),
    ("bias", lambda t: t.long(), "must have dtype torch.float16, as in the file, and is not cast; got torch.int64"),
]


@pytest.mark.parametrize(("name", "change", "rule"), WRONG)
def test_another_dtype_or_shape_is_refused(
    slot: GptqSlot, name: str, change: Callable[[Tensor], Tensor], rule: str
) -> None:
    setattr(filled(slot), name, change(getattr(slot, name)))
    assert_refused(slot, f"GptqSlot: {name} {rule}")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("name", "change", "rule"), WRONG)
def test_a_state_dict_with_another_dtype_or_shape_is_refused(
    slot: GptqSlot, name: str, change: Callable[[Tensor], Tensor], rule: str, assign: bool
) -> None:
    state = copy.deepcopy(filled(copy.deepcopy(slot)).state_dict())
    state[name] = change(state[name])
    with pytest.raises(RuntimeError, match=re.escape(f"{name} {rule}")):
        slot.load_state_dict(state, assign=assign)
    del state[name]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        slot.load_state_dict(state, assign=assign)


def test_a_bias_may_be_cast(slot: GptqSlot) -> None:
    filled(slot)
    slot.bias = slot.bias.bfloat16()
    assert slot.finish().bias.dtype == torch.bfloat16


def test_values_out_of_range_are_refused(slot: GptqSlot) -> None:
    filled(slot).g_idx[3] = 4
    assert_refused(slot, "GptqSlot: g_idx must lie in [0, G) = [0, 4); got values from 0 to 4")
    slot.g_idx[3] = 0
    slot.scales[1, 2] = torch.inf
    assert_refused(slot, "GptqSlot: scales must be finite; got inf at [1, 2]")


def test_a_deleted_tensor_and_an_early_call_are_refused(slot: GptqSlot) -> None:
    with pytest.raises(ValueError, match=r"^GptqSlot: it holds the tensors of a file; call finish\(\) once they are"):
        slot(torch.ones(1, 64))
    filled(slot).qzeros = None
    assert_refused(slot, "GptqSlot: qzeros must be a tensor; got NoneType")


MODULE = GptqModule(64, 32, bits=4, group_size=16)
CHANGES = [
    ({"bits": 5}, "bits must be one of (2, 3, 4, 8); got 5"),
    (
        {"in_features": 60},
        "in_features must be a positive multiple of 8, the 4-bit values that fill whole 32-bit words",
    ),
    ({"out_features": 0}, "out_features must be a positive multiple of 8"),
    ({"group_size": -1}, "group_size must be at least 1; got -1"),
    ({"zero_offset": 2}, "zero_offset must be 1 (gptq, v1) or 0 (gptq_v2); got 2"),
    ({"scales_dtype": torch.float64}, "scales_dtype must be one of torch.float16, torch.bfloat16, torch.float32"),
    ({"tensors": ("qweight", "scales")}, "tensors must be of ('qweight', 'qzeros', 'scales', 'g_idx', 'bias'), with"),
    ({"tensors": ("qweight", "qzeros", "scales", "perm")}, "tensors must be of"),
    ({"num_groups": 0}, "num_groups must be at least 1, and needs a g_idx"),
    ({"tensors": ("qweight", "qzeros", "scales"), "num_groups": 4}, "num_groups must be at least 1, and needs a g_idx"),
]


@pytest.mark.parametrize(("change", "text"), CHANGES)
def test_a_module_that_cannot_be_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^GptqModule: {re.escape(text)}"):
        replace(MODULE, **change)


def test_the_repr_says_what_the_file_has() -> None:
    assert repr(GptqSlot(MODULE)) == (
        "GptqSlot(in_features=64, out_features=32, bits=4, group_size=16, zero_offset=1, "
        "tensors=['qweight', 'qzeros', 'scales', 'g_idx'])"
    )
