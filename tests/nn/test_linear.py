"""ExllamaLinear: what it computes, and that it is a well-behaved nn.Module."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from conformance.weights import DTYPES
from exllama_ops import ExllamaLinear, GptqWeight, PackedWeight, quantize
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.testing.bounds import error_bound, gamma, half_ulp

K, N = 96, 64


def weight(bits: int = 4, order: str = "sorted", bias: bool = True) -> GptqWeight:
    torch.manual_seed(0)
    g_idx = None
    if order == "perm":
        g_idx = (torch.arange(K) // 40)[torch.randperm(K)]
    elif order == "unequal":
        g_idx = torch.randint(0, 3, (K,))
    return quantize(torch.randn(N, K), bits, 40, g_idx=g_idx, bias=torch.randn(N) if bias else None)


@pytest.fixture(params=["sorted", "perm", "unequal", "raw"])
def layer(request: pytest.FixtureRequest) -> ExllamaLinear:
    if request.param != "raw":
        return ExllamaLinear.from_weight(weight(order=request.param))
    # prepare makes none like it, but who has one packed may keep its raw g_idx.
    w = weight(order="unequal")
    none = torch.empty(0, dtype=torch.int32)
    assert w.g_idx is not None
    return ExllamaLinear.from_packed(PackedWeight(w.qweight, w.qzeros, w.scales, none, w.g_idx, False, 4, 40, w.bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["sorted", "perm", "unequal"])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_forward_is_x_times_W_plus_bias(bits: int, order: str, dtype: torch.dtype) -> None:
    layer = ExllamaLinear.from_weight(weight(bits, order)).to(dtype)
    x = torch.randn(2, 3, K).to(dtype)
    # The scales are float16 and q - z has 9 bits: the float32 product, had it been kept, is W exactly.
    exact_layer = ExllamaLinear.from_weight(weight(bits, order))
    exact_layer.scales = exact_layer.scales.float()
    W = exact_layer.dequantize().double().t()
    assert layer.bias is not None
    expected = x.double() @ W + layer.bias.double()
    bound = error_bound(x.reshape(-1, K), W, gamma(K + 3)).reshape(expected.shape)
    error = (layer(x).double() - expected).abs()
    assert (error <= bound + half_ulp(expected.abs() + bound, dtype)).all()


@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 0, K), (2, 3, 5, K)])
def test_leading_sizes_are_kept(layer: ExllamaLinear, shape: tuple[int, ...]) -> None:
    assert layer(torch.randn(shape)).shape == (*shape[:-1], N)


def test_strided_x_is_accepted(layer: ExllamaLinear) -> None:
    x = torch.randn(K, 5).t()
    assert torch.equal(layer(x), layer(x.contiguous()))
    x = torch.randn(3, 5, 2 * K)[..., ::2]
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("shape", [(2, K // 2), (K // 2, 2), (4, 2 * K), ()])
def test_x_that_would_only_reshape_to_K_is_refused(layer: ExllamaLinear, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(\*, K\) with K=96; got"):
        layer(torch.randn(shape))


def test_state_dict_round_trip(layer: ExllamaLinear) -> None:
    options = {"act_order": layer.act_order, "shuffled": layer.shuffled}
    if layer.source_group_size is not None:
        options |= {"rows": layer.qweight.shape[0] * 8, "source_group_size": 40}
    size = layer.group_size
    fresh = ExllamaLinear(K, N, 4, size, **options)
    fresh.load_state_dict(layer.state_dict())
    on_meta = ExllamaLinear(K, N, 4, size, **options, device="meta")
    on_meta.load_state_dict(layer.state_dict(), assign=True)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    from_file = ExllamaLinear(K, N, 4, size, **options)
    from_file.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(3, K)
    for other in (fresh, on_meta, from_file):
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.to_weight().qweight, layer.to_weight().qweight)


def test_copies_are_equal_and_independent(layer: ExllamaLinear) -> None:
    x = torch.randn(3, K)
    before = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), before)
        other.qweight.zero_()
        assert torch.equal(layer(x), before)


def type_float16(module: nn.Module) -> nn.Module:
    """Casts integers too."""
    return module.type(torch.float16)


CASTS = [nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double, type_float16]


@pytest.mark.parametrize("cast", CASTS)
def test_a_dtype_cast_rounds_the_bias_and_never_the_scales(layer: ExllamaLinear, cast: object) -> None:
    scales, qweight = layer.scales.clone(), layer.qweight.clone()
    cast(layer)  # type: ignore[operator]
    assert layer.bias is not None
    assert layer.bias.dtype == cast(nn.Linear(1, 1)).bias.dtype  # type: ignore[operator]
    assert layer.scales.dtype == torch.float16
    assert torch.equal(layer.scales, scales)
    assert torch.equal(layer.qweight, qweight)


def test_to_moves_every_buffer(layer: ExllamaLinear) -> None:
    assert {buffer.device.type for buffer in layer.to("meta", torch.bfloat16).buffers()} == {"meta"}
    assert layer.scales.dtype == torch.float16
    assert layer.to_empty(device="cpu").qweight.device.type == "cpu"


def test_forward_works_on_the_meta_device(layer: ExllamaLinear) -> None:
    out = layer.to("meta")(torch.randn(2, 3, K, device="meta"))
    assert (out.shape, out.device.type) == ((2, 3, N), "meta")


def test_only_buffers_hold_state(layer: ExllamaLinear) -> None:
    assert list(layer.parameters()) == []
    of_rows = {"perm" if layer.shuffled else "g_idx"} | ({"source_groups"} if layer.source_group_size else set())
    assert set(layer.state_dict()) == {"layout", "qweight", "qzeros", "scales", "bias"} | of_rows


def test_a_checkpoint_in_gptq_order_is_not_loaded_as_if_it_were_shuffled() -> None:
    w = weight(order="perm")
    layer = ExllamaLinear(K, N, 4, 40, act_order=True)
    before = layer.qweight.clone()
    checkpoint = {"qweight": w.qweight, "qzeros": w.qzeros, "scales": w.scales, "g_idx": w.g_idx, "bias": w.bias}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"qweight: needs perm beside it.*open_gptq"):
            layer.load_state_dict(checkpoint, strict=strict)
    assert torch.equal(layer.qweight, before)


def test_scales_of_another_dtype_are_not_cast_while_loading(layer: ExllamaLinear) -> None:
    state = layer.state_dict()
    state["scales"] = state["scales"].float()
    with pytest.raises(RuntimeError, match=r"build the layer with scales_dtype=torch.float32"):
        layer.load_state_dict(state)


def test_a_state_dict_of_another_layout_is_refused_though_its_shapes_fit(layer: ExllamaLinear) -> None:
    other = ExllamaLinear(K, N, 4, 33, act_order=layer.act_order, shuffled=layer.shuffled)
    assert layer.source_group_size or other.scales.shape == layer.scales.shape
    names = r"bits, group_size, shuffled(, source_group_size)?"
    with pytest.raises(RuntimeError, match=rf"layout: {names} = \[4, 40, [01].*\]; this layer has \[4, 33, [01]\]"):
        other.load_state_dict(layer.state_dict())


def test_a_weight_of_another_dtype_is_not_cast_while_loading(layer: ExllamaLinear) -> None:
    state = layer.state_dict()
    state["qweight"] = state["qweight"].float()
    with pytest.raises(RuntimeError, match=r"qweight: torch.float32 in the state_dict, torch.int32 in the layer"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("order", ["sorted", "perm", "unequal"])
def test_to_weight_gives_back_what_from_weight_took(bits: int, order: str) -> None:
    w = weight(bits, order)
    back = ExllamaLinear.from_weight(w).to_weight()
    assert (back.bits, back.group_size) == (w.bits, w.group_size)
    for name in ("qweight", "qzeros", "scales", "g_idx", "bias"):
        expected, got = getattr(w, name), getattr(back, name)
        assert got is None if expected is None else torch.equal(got, expected)


def test_layers_of_one_weight_share_nothing_with_it_or_each_other() -> None:
    w = weight(order="unequal")
    one, two = ExllamaLinear.from_weight(w), ExllamaLinear.from_weight(w)
    x = torch.randn(3, K)
    before = two(x)
    one.load_state_dict({name: torch.zeros_like(t) if name != "layout" else t for name, t in one.state_dict().items()})
    assert torch.equal(two(x), before)
    assert torch.equal(ExllamaLinear.from_weight(w)(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_x_and_not_the_scales(layer: ExllamaLinear, dtype: torch.dtype) -> None:
    x = torch.randn(3, K)
    with torch.autocast("cpu", dtype):
        out = layer(x)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert out.dtype == dtype
    assert torch.equal(compiled, out)
    assert torch.equal(out, layer(x.to(dtype)))
    assert layer.scales.dtype == torch.float16


def test_from_weight_leaves_the_weight_in_checkpoint_order() -> None:
    w = weight(order="perm")
    before = w.qweight.clone()
    layer = ExllamaLinear.from_weight(w)
    assert torch.equal(w.qweight, before)
    assert not torch.equal(layer.qweight, before)


def test_repr_says_what_a_user_wants_to_know() -> None:
    assert repr(ExllamaLinear.from_weight(weight(3, "perm"))) == (
        "ExllamaLinear(in_features=96, out_features=64, bits=3, group_size=40, bias=True, act_order=True, "
        "shuffled=True, scales_dtype=torch.float16)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((96, 64, 5, 32), rf"bits must be one of {re.escape(str(SUPPORTED_BITS))}; got 5"),
        ((90, 64, 4, 32), "in_features must be a positive multiple of 8, the 4-bit values .*; got 90"),
        ((96, 60, 3, 32), "out_features must be a positive multiple of 32, the 3-bit values .*; got 60"),
        ((0, 64, 4, 32), "in_features must be a positive multiple of 8, .*; got 0"),
        ((96, 64, 4, -1), "group_size must be at least 1; got -1"),
    ],
)
def test_construction_refuses(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^ExllamaLinear: {message}$"):
        ExllamaLinear(*arguments)


def test_num_groups_belongs_to_a_raw_g_idx() -> None:
    with pytest.raises(ValueError, match="num_groups is for a raw g_idx"):
        ExllamaLinear(K, N, 4, 40, num_groups=7)
    layer = ExllamaLinear(K, N, 4, 40, act_order=True, shuffled=False, num_groups=7)
    assert layer.scales.shape == (7, N)


NAMES = ["layout", "qweight", "qzeros", "scales", "perm", "bias"]


@pytest.fixture
def plain() -> ExllamaLinear:
    return ExllamaLinear.from_weight(weight(order="perm"))


@pytest.fixture(params=NAMES)
def parametrized(request: pytest.FixtureRequest, plain: ExllamaLinear) -> ExllamaLinear:
    layer = copy.deepcopy(plain)
    parametrize.register_parametrization(layer, request.param, nn.Identity())
    return layer


def test_a_parametrized_buffer_is_used_where_the_buffer_was(parametrized: ExllamaLinear, plain: ExllamaLinear) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, K)
    expected = plain(x)
    assert torch.equal(parametrized(x), expected)
    assert torch.equal(torch.compile(parametrized, backend="eager", fullgraph=True)(x), expected)
    assert torch.equal(copy.deepcopy(parametrized)(x), expected)
    assert torch.equal(parametrized.dequantize(), plain.dequantize())
    for weight in (parametrized.to_weight(), plain.to_weight()):
        assert torch.equal(ExllamaLinear.from_weight(weight)(x), expected)
    assert torch.equal(ExllamaLinear.from_packed(parametrized.to_packed())(x), expected)
    assert parametrized.extra_repr() == plain.extra_repr()
    with pytest.raises(ValueError, match=r"set_packed replaces buffers.*remove_parametrizations"):
        parametrized.set_packed(plain.to_packed())


@pytest.mark.parametrize("cast", CASTS)
def test_a_dtype_cast_reaches_the_bias_alone_where_a_buffer_is_parametrized(
    parametrized: ExllamaLinear, plain: ExllamaLinear, cast: Callable[[nn.Module], nn.Module]
) -> None:
    cast(parametrized)
    cast(plain)
    for name in NAMES:
        got, expected = getattr(parametrized, name), getattr(plain, name)
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_of_a_parametrized_layer_fits_one_likewise(name: str, plain: ExllamaLinear) -> None:
    x, other = torch.randn(3, K), ExllamaLinear(K, N, 4, 40, act_order=True)
    neighbour = copy.deepcopy(other)
    before = neighbour(x)
    other.perm = neighbour.perm
    for layer in (plain, other):
        parametrize.register_parametrization(layer, name, nn.Identity())
    state = plain.state_dict()
    if name == "perm":
        with pytest.raises(RuntimeError, match="perm: is loaded into a buffer alone, as others share it"):
            other.load_state_dict(state)
    else:
        other.load_state_dict(state)
        assert torch.equal(other(x), plain(x))
    assert torch.equal(neighbour(x), before)


def test_a_parametrized_tensor_of_another_dtype_is_not_cast_while_loading(plain: ExllamaLinear) -> None:
    parametrize.register_parametrization(plain, "scales", nn.Identity())
    state = plain.state_dict()
    state["parametrizations.scales.original"] = state["parametrizations.scales.original"].float()
    with pytest.raises(RuntimeError, match=r"parametrizations.scales.original: torch.float32 in the state_dict"):
        plain.load_state_dict(state)


def test_scales_that_would_get_no_gradient_are_refused_where_one_is_asked_for(plain: ExllamaLinear) -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1, dtype=torch.float16))

        def forward(self, scales: Tensor) -> Tensor:
            return scales * self.gain

    x = torch.randn(3, K)
    expected = plain(x)
    with pytest.raises(ValueError, match="scales require a gradient, which they do not get"):
        torch.func.functional_call(plain, {"scales": torch.ones(3, N, dtype=torch.float16, requires_grad=True)}, x)
    parametrize.register_parametrization(plain, "scales", Gain())
    with pytest.raises(ValueError, match="scales require a gradient, which they do not get"):
        plain(x)
    with torch.no_grad():
        assert torch.equal(plain(x), expected)


def test_a_bias_may_be_a_parameter_or_none(plain: ExllamaLinear) -> None:
    x = torch.randn(3, K)
    expected, bias = plain(x), plain.bias
    plain.bias = nn.Parameter(bias)
    plain(x).sum().backward()
    assert torch.equal(plain.bias.grad, torch.full((N,), 3.0))
    assert list(plain.state_dict()) == list(dict.fromkeys(["bias", *plain.state_dict()]))
    assert not plain.to_weight().bias.requires_grad
    plain.set_packed(plain.to_packed())
    assert torch.equal(plain(x), expected)
    plain.bias = None
    assert torch.equal(plain(x) + bias, expected)
    assert "bias=False" in repr(plain)


@pytest.mark.parametrize("kind", [lambda scales: scales, lambda scales: nn.Parameter(scales, requires_grad=False)])
def test_scales_that_are_assigned_may_have_another_dtype(
    plain: ExllamaLinear, kind: Callable[[Tensor], Tensor]
) -> None:
    x = torch.randn(3, K)
    expected = plain(x)
    plain.scales = kind(plain.scales.float())
    assert torch.equal(plain(x), expected)
    assert plain.to(torch.bfloat16).scales.dtype == torch.float32
    assert ExllamaLinear.from_packed(plain.to_packed()).scales_dtype == torch.float32


def test_what_was_deleted_is_named(plain: ExllamaLinear) -> None:
    x = torch.randn(3, K)
    del plain.bias
    with pytest.raises(AttributeError, match="'bias'"):
        plain(x)
    plain.register_buffer("scales", None)
    with pytest.raises(ValueError, match="scales must be a Tensor; got None"):
        plain(x)
    del plain.scales, plain.perm
    with pytest.raises(ValueError, match="scales, perm must not be deleted"):
        plain(x)


def test_set_packed_leaves_nothing_of_another_order(plain: ExllamaLinear) -> None:
    raw = ExllamaLinear.from_weight(weight(order="unequal"))
    plain.set_packed(raw.to_packed())
    assert list(plain.state_dict()) == list(raw.state_dict())


@pytest.mark.parametrize("future", ["swap_module_params_on_conversion", "overwrite_module_params_on_conversion"])
def test_conversions_of_the_future_work(plain: ExllamaLinear, future: str) -> None:
    x, shared, other = torch.randn(3, K), plain.perm, ExllamaLinear(K, N, 4, 40, act_order=True)
    expected = plain(x)
    plain.bias = nn.Parameter(plain.bias)
    state = plain.state_dict()
    getattr(torch.__future__, f"set_{future}")(True)
    try:
        other.load_state_dict(state)
        other.load_state_dict(state)
        assert torch.equal(plain.to(torch.float64).to(torch.float32)(x), expected)
        assert plain.perm is shared
    finally:
        getattr(torch.__future__, f"set_{future}")(False)
    assert torch.equal(other(x), expected)


def test_functional_call_takes_other_tensors(plain: ExllamaLinear) -> None:
    x, plain.bias = torch.randn(3, K), None
    assert torch.equal(torch.func.functional_call(plain, {"scales": plain.scales * 2}, x), 2 * plain(x))


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_a_buffer_dtype_of_fsdp_is_refused(plain: ExllamaLinear, tmp_path: Path) -> None:
    """It writes ``buffer.data``, which no method of the module sees."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    x, model = torch.randn(3, K), nn.Sequential(plain, nn.Linear(N, N))
    expected = model(x)
    with process_group(tmp_path):
        wrap = lambda **mixed: fsdp.FullyShardedDataParallel(  # noqa: E731
            copy.deepcopy(model), mixed_precision=fsdp.MixedPrecision(**mixed), device_id=torch.device("cpu")
        )
        assert torch.equal(wrap()(x), expected)
        with pytest.raises(
            ValueError, match=r"scales are never cast, and are torch.bfloat16 .* made with torch.float16"
        ):
            wrap(buffer_dtype=torch.bfloat16)(x)


def test_scales_that_were_cast_past_the_module_are_refused_wherever_they_are_used(plain: ExllamaLinear) -> None:
    torch._dynamo.reset()
    plain.scales.data = plain.scales.to(torch.bfloat16)
    for use in (plain, copy.deepcopy(plain), torch.compile(plain, backend="eager", fullgraph=True)):
        with pytest.raises(Exception, match=r"scales are never cast, and are torch.bfloat16"):
            use(torch.randn(3, K))
    for method in (plain.dequantize, plain.to_weight, plain.to_packed):
        with pytest.raises(ValueError, match=r"scales are never cast.*MixedPrecision\(buffer_dtype=...\)"):
            method()
    plain.scales_dtype = torch.bfloat16
    assert plain(torch.randn(3, K)).shape == (3, N)


def test_torch_jit_traces_and_does_not_script(plain: ExllamaLinear) -> None:
    x = torch.randn(2, 3, K)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(plain, x)(x), plain(x))
    with pytest.raises(NotImplementedError, match=r"^ExllamaLinear: torch.jit.script cannot compile it; .*trace"):
        torch.jit.script(nn.Sequential(plain))
