"""freeze: the same numbers from fewer products and gathers, and what it must leave alone."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode

from compile.blocks import Recorder
from exllama_ops import ExllamaLinear, freeze, layout, quantize, set_cpu_matmul_precision
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.layout.weight import PackedWeight

K, N, GROUP = 96, 160, 32


def order(seed: int, features: int) -> Tensor:
    """The g_idx of an act-order weight."""
    return (torch.arange(features) // GROUP)[torch.randperm(features, generator=torch.Generator().manual_seed(seed))]


def linear(
    seed: int, out_features: int, in_features: int, bits: int = 4, *, g_idx: Tensor | None = None, bias: bool = False
) -> ExllamaLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    added = torch.randn(out_features, generator=generator) if bias else None
    return ExllamaLinear.from_weight(quantize(weight, bits, GROUP, g_idx=g_idx, bias=added))


class MLP(nn.Module):
    """An act-order MLP: gate and up share the order of their rows, down has its own."""

    def __init__(self, bits: int = 4, *, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj = linear(1, N, K, bits, g_idx=order(1, K), bias=bias)
        self.up_proj = linear(2, N, K, bits, g_idx=order(1, K), bias=bias)
        self.down_proj = linear(3, K, N, bits, g_idx=order(3, N), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """q, k, v of different widths, biases and orders of rows, and attention over them."""

    def __init__(self, orders: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.q_proj = linear(4, 64, K, g_idx=order(orders[0], K), bias=True)
        self.k_proj = linear(5, 32, K, g_idx=order(orders[1], K))
        self.v_proj = linear(6, 32, K, g_idx=order(orders[2], K), bias=True)
        self.o_proj = linear(7, K, 64, g_idx=order(7, 64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 32)).transpose(-2, -3) for p in (self.q_proj, self.k_proj, self.v_proj))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o_proj(heads.transpose(-2, -3).flatten(-2))


class Columns(TorchDispatchMode):
    """The columns of each product that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.of_products: list[int] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.exllama.gptq_gemm.default:
            self.of_products.append(args[1].shape[1])
        return op(*args, **(kwargs or {}))


def columns_of_products(model: nn.Module, x: Tensor) -> list[int]:
    with torch.no_grad(), Columns() as columns:
        model(x)
    return columns.of_products


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.RMSNorm(K), Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm(x))


def assert_same_bits(model: nn.Module, example: Tensor, **expected: Any) -> None:
    """Freezing changes no bit of the results for any number of tokens, and reports what is expected."""
    before = copy.deepcopy(model)
    report = freeze(model, (example,))
    for name, value in expected.items():
        assert getattr(report, name) == value
    # The same columns by fewer products.
    frozen, unfrozen = columns_of_products(model, example), columns_of_products(before, example)
    assert sum(frozen) == sum(unfrozen)
    assert len(frozen) == len(unfrozen) - sum(len(group) - 1 for group in report.fused)
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, example.shape[-1]).to(example.dtype)
        assert torch.equal(model(x), before(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_an_act_order_mlp_becomes_two_products_without_a_gather(bits: int, dtype: torch.dtype) -> None:
    model = MLP(bits).to(dtype)
    assert_same_bits(
        model,
        torch.randn(2, K).to(dtype),
        fused=(("gate_proj", "up_proj"),),
        folded={"down_proj": ("gate_proj", "up_proj")},
        unfused={"down_proj": "no layer beside it takes the same input"},
        unfolded={
            "gate_proj": "x enters its input",
            "up_proj": "x enters its input",
        },
    )
    assert not model.down_proj.act_order


def test_q_k_v_of_one_order_become_one_product_and_keep_their_biases() -> None:
    model = Attention()
    assert_same_bits(model, torch.randn(2, K), fused=(("q_proj", "k_proj", "v_proj"),), folded={})


def test_q_k_v_of_different_orders_are_fused_only_where_the_orders_agree() -> None:
    reason = "format or order of rows differ from those of q_proj, v_proj"
    assert_same_bits(
        Attention((1, 2, 1)),
        torch.randn(2, K),
        fused=(("q_proj", "v_proj"),),
        unfused={"k_proj": reason, "o_proj": "no layer beside it takes the same input"},
    )


@pytest.mark.parametrize(
    "changed",
    [
        lambda mlp: linear(1, N, K, 8, g_idx=order(1, K)),
        lambda mlp: ExllamaLinear.from_weight(quantize(torch.randn(N, K), 4, 16, g_idx=order(1, K))),
        lambda mlp: ExllamaLinear.from_weight(quantize(torch.randn(N, K), 4, GROUP)),
        lambda mlp: ExllamaLinear.from_weight(
            quantize(torch.randn(N, K), 4, GROUP, g_idx=order(1, K), scales_dtype=torch.float32)
        ),
    ],
    ids=["bits", "group_size", "order", "scales"],
)
def test_layers_of_different_formats_are_not_fused(changed: Callable[[MLP], ExllamaLinear]) -> None:
    model = MLP()
    model.up_proj = changed(model)
    assert_same_bits(model, torch.randn(2, K), fused=(), folded={"down_proj": ("gate_proj", "up_proj")})


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_block_keeps_its_numbers_and_lists_every_layer(precision: str) -> None:
    set_cpu_matmul_precision(precision)
    model = Block()
    report = freeze(copy.deepcopy(model), (torch.randn(2, K),))
    assert report.fused == (
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    )
    assert report.unfolded["attention.o_proj"] == "its input is made of other columns, from attention"
    assert "folded mlp.down_proj into mlp.gate_proj, mlp.up_proj" in str(report)
    assert_same_bits(model, torch.randn(2, K))


class Elsewhere(MLP):
    """The intermediate is a second result, so its columns must stay."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(hidden), hidden


class GateElsewhere(MLP):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(silu(gate) * self.up_proj(x)) + gate.sum(-1, keepdim=True)


class Shifted(MLP):
    """An element of the input is made from two columns."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)).roll(1, -1) * self.up_proj(x))


class Scaled(MLP):
    """A learned scale for each column, which is no column of a quantized layer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(N))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x) * self.scale)


class BiasElsewhere(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.gate_proj.bias.sum()


class Twice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x)) + self.gate_proj(-x).sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (GateElsewhere, "what becomes its input is used by the model itself too"),
        (Shifted, "its input is made by the model itself"),
        (Scaled, "scale enters its input"),
        (BiasElsewhere, "what becomes its input is used by the model itself too"),
        (Twice, "its input is made by gate_proj"),
    ],
)
def test_an_order_that_cannot_be_folded_stays_and_the_reason_is_told(kind: type[MLP], reason: str) -> None:
    model = kind()
    before = copy.deepcopy(model)
    report = freeze(model, (torch.randn(2, K),))
    assert report.folded == {}
    assert report.unfolded["down_proj"] == reason
    assert model.down_proj.act_order
    x = torch.randn(3, K)
    assert torch.equal(model(x), before(x))


def test_an_intermediate_that_is_returned_stays_as_it_is() -> None:
    model = Elsewhere()
    before = copy.deepcopy(model)
    report = freeze(model, (torch.randn(2, K),))
    assert report.unfolded["down_proj"] == "what becomes its input is used by the output too"
    x = torch.randn(3, K)
    for new, old in zip(model(x), before(x), strict=True):
        assert torch.equal(new, old)


def test_a_factor_for_each_token_does_not_stand_in_the_way() -> None:
    class Routed(MLP):
        def forward(self, x: Tensor) -> Tensor:
            weight = x.mean(-1, keepdim=True).sigmoid()
            return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x) * weight) + weight

    assert_same_bits(Routed(), torch.randn(2, K), folded={"down_proj": ("gate_proj", "up_proj")})


def test_an_input_that_is_written_to_between_the_calls_is_not_shared() -> None:
    class Writes(MLP):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            gate = self.gate_proj(x)
            x.mul_(2)
            return self.down_proj(silu(gate) * self.up_proj(x))

    assert_same_bits(Writes(), torch.randn(2, K), fused=())


class Reshapes(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x.reshape(-1, K))) * self.up_proj(x.reshape(-1, K)))


class Casts(MLP):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x.to(torch.float16))
        return self.down_proj(silu(gate) * self.up_proj(x.to(torch.float16)))


class Views(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x.view_as(x)))


@pytest.mark.parametrize("kind", [Reshapes, Casts, Views])
def test_the_same_values_in_another_tensor_are_not_shared(kind: type[MLP]) -> None:
    """The columns of the others go with the tensor: fused, each layer would multiply for all."""
    assert_same_bits(
        kind(),
        torch.randn(2, K),
        fused=(),
        folded={"down_proj": ("gate_proj", "up_proj")},
        unfused={
            "gate_proj": "up_proj takes the same values in another tensor",
            "up_proj": "gate_proj takes the same values in another tensor",
            "down_proj": "no layer beside it takes the same input",
        },
    )


def test_a_tensor_that_was_reshaped_for_all_is_shared() -> None:
    class Reshaped(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(-1, K))

    assert_same_bits(Reshaped(), torch.randn(2, K), fused=(("gate_proj", "up_proj"),))


def test_a_layer_that_is_not_called_as_a_module_is_left() -> None:
    class Forward(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(silu(self.gate_proj(x)) * self.up_proj.forward(x))

    reason = "the example calls its forward, and not the module"
    assert_same_bits(
        Forward(),
        torch.randn(2, K),
        fused=(),
        folded={},
        unfused={
            "up_proj": reason,
            "gate_proj": "no layer beside it takes the same input",
            "down_proj": "no layer beside it takes the same input",
        },
    )


def test_an_argument_by_name_is_shared_too() -> None:
    class Named(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(silu(self.gate_proj(x=x)) * self.up_proj(x=x))

    assert_same_bits(Named(), torch.randn(2, K), fused=(("gate_proj", "up_proj"),))


def test_what_the_trace_attached_is_gone() -> None:
    model = MLP()
    freeze(model, (torch.randn(2, K),))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="x must have shape"):
        freeze(unfrozen := MLP(), (torch.randn(2, K + 1),))
    assert not any(module._forward_pre_hooks for module in unfrozen.modules())


def test_an_error_leaves_the_numbers_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as of memory, when up's columns are made in the order that gate's have already."""
    model, x = MLP(), torch.randn(3, K)
    expected = model(x)
    made = []

    def take_columns(weight: PackedWeight, order: Tensor) -> PackedWeight:
        made.append(weight)
        if len(made) == 2:
            raise MemoryError
        return layout.columns.take_columns(weight, order)

    monkeypatch.setattr("exllama_ops.compile.freeze.take_columns", take_columns)
    with pytest.raises(MemoryError):
        freeze(model, (x,))
    assert torch.equal(model(x), expected)


def test_filled_weights_fuse_but_have_no_order_to_fold() -> None:
    model = MLP()
    raw = torch.randint(0, 3, (K,), generator=torch.Generator().manual_seed(0))
    model.gate_proj, model.up_proj = linear(1, N, K, g_idx=raw), linear(2, N, K, g_idx=raw)
    assert model.gate_proj.source_group_size is not None
    assert_same_bits(
        model,
        torch.randn(2, K),
        fused=(("gate_proj", "up_proj"),),
        folded={"down_proj": ("gate_proj", "up_proj")},
        unfolded=dict.fromkeys(["gate_proj", "up_proj"], "its groups are filled up with rows that name no column of x"),
    )


def test_layers_with_hooks_or_outside_of_the_example_are_left() -> None:
    model = MLP()
    model.unused = linear(8, K, K)
    model.gate_proj.register_forward_hook(lambda *args: None)
    report = freeze(model, (torch.randn(2, K),))
    assert report.fused == ()
    assert report.folded == {}
    assert report.unfused["gate_proj"] == "it has hooks"
    assert report.unfused["unused"] == "the example calls it 0 times"


def test_frozen_projections_hold_one_copy_of_the_weights() -> None:
    model = MLP(bias=False)

    def words() -> int:
        return sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("qweight"))

    before = words()
    freeze(model, (torch.randn(2, K),))
    assert words() == before
    state = model.state_dict()
    assert state["gate_proj.fused.qweight"] is not None
    assert state["gate_proj.fused.qweight"].data_ptr() == state["up_proj.fused.qweight"].data_ptr()


def test_a_frozen_state_dict_fits_a_model_frozen_likewise_and_no_other() -> None:
    first, second = MLP(), MLP()
    for layer in second.children():
        layer.scales *= 2
    x = torch.randn(3, K)
    for model in (first, second):
        freeze(model, (x,))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(x), first(x))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        MLP().load_state_dict(first.state_dict())


def test_a_frozen_model_is_kept_by_safetensors_as_a_model(tmp_path: Path) -> None:
    """One tensor has several names in its state_dict, which `save_file` refuses and `save_model` knows about."""
    safetensors = pytest.importorskip("safetensors.torch", reason='needs the extra "hf"')
    first, second, x = MLP(), MLP(), torch.randn(3, K)
    for layer in second.children():
        layer.scales *= 2
    for model in (first, second):
        freeze(model, (x,))
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.save_file(first.state_dict(), tmp_path / "state.safetensors")
    safetensors.save_model(first, tmp_path / "model.safetensors")
    assert safetensors.load_model(second, tmp_path / "model.safetensors") == (set(), [])
    assert torch.equal(second(x), first(x))


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_one_product_stands_for_each_group(grad: bool) -> None:
    """The public op, as Dynamo sees it."""
    torch._dynamo.reset()
    model = nn.Sequential(Block(), Block())
    freeze(model, (torch.randn(2, K),))
    backend = EagerAndRecordGraphs()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(3, K, requires_grad=grad)
    assert torch.equal(compiled(x), model(x))
    (graph,) = backend.graphs
    assert sum(node.target is torch.ops.exllama.gptq_gemm for node in graph.graph.nodes) == 2 * 4


def test_the_backend_keeps_what_freeze_concatenated_and_folded() -> None:
    """What the pass finds are four products a block, and AOTAutograd's have the orders of rows that were left."""
    torch._dynamo.reset()
    model, recorder = nn.Sequential(Block(), Block()), Recorder()
    unfrozen = copy.deepcopy(model)
    report = freeze(model, (torch.randn(2, K),))
    assert set(report.folded) == {"0.mlp.down_proj", "1.mlp.down_proj"}
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    with torch.no_grad():
        for tokens in (3, 1):
            x = torch.randn(tokens, K)
            assert torch.equal(compiled(x), unfrozen(x))
    assert recorder.before == recorder.after == 2 * [Counter({"gptq_gemm": 2 * 4})]
    assert recorder.aot == 2 * [Counter({"gptq_gemm.no_autograd": 2 * 4})]
    # These are q/k/v, o, gate/up and down of each block. The order of down is gone.
    assert recorder.orders == 2 * [2 * [K, 64, K, 0]]


@pytest.mark.parametrize("strict", [False, True])
def test_exported_one_product_stands_for_each_group(strict: bool) -> None:
    model = MLP()
    x = torch.randn(3, K)
    freeze(model, (x,))
    exported = torch.export.export(model, (x,), strict=strict)
    gemm = torch.ops.exllama.gptq_gemm.default
    assert sum(node.target is gemm for node in exported.graph.nodes) == 2
    assert torch.equal(exported.module()(x), model(x))


def test_one_graph_serves_all_frozen_blocks() -> None:
    torch._dynamo.reset()
    blocks = [Block() for _ in range(3)]
    backend = EagerAndRecordGraphs()
    x = torch.randn(3, K)
    for scale, block in enumerate(blocks):
        block.norm.weight.data.mul_(scale + 1)
        freeze(block, (x,))
    with torch.no_grad():
        expected = x
        for block in blocks:
            expected = block(expected)
        for block in blocks:
            block.compile(backend=backend, fullgraph=True)
        for block in blocks:
            x = block(x)
    assert torch.equal(x, expected)
    assert len(backend.graphs) == 1


def test_frozen_blocks_may_be_checkpointed_and_compiled() -> None:
    torch._dynamo.reset()
    block = Block()
    freeze(block, (torch.randn(2, K),))

    def run(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)

    grads = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        x = torch.ones(3, K).requires_grad_()
        function(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_a_projection_called_alone_or_on_a_changed_input_multiplies_for_itself() -> None:
    model = MLP(bias=False)
    before = copy.deepcopy(model)
    x = torch.randn(3, K)
    freeze(model, (x,))
    alone = model.up_proj(x)
    assert torch.equal(alone, before.up_proj(x)[:, before.down_proj.perm])
    first = model(x)
    model.gate_proj(x)  # leaves columns that nobody takes
    x.mul_(2)
    assert torch.equal(model(x), model(x.clone()))
    assert not torch.equal(model(x), first)
    y = torch.randn(3, K)
    model.gate_proj(x)
    assert torch.equal(model.up_proj(y), model.up_proj(y.clone()))


def test_a_write_to_x_between_projections_makes_what_the_first_one_left_stale() -> None:
    """Also where autograd is off, as long as torch counts the writes."""
    model, x = MLP(bias=False), torch.randn(3, K)
    freeze(model, (x,))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model.gate_proj(x)
            x.mul_(2)
            assert torch.equal(model.up_proj(x), model.up_proj(x.clone()))
    with torch.inference_mode():
        model.gate_proj(x)
        x.mul_(2)
        assert torch.equal(model.up_proj(x), model.up_proj(x.clone()))


def test_nothing_is_left_on_x_once_every_projection_was_called() -> None:
    """Of a tensor of inference mode no writes are counted."""
    model = MLP(bias=False)
    freeze(model, (torch.randn(2, K),))
    with torch.inference_mode():
        x = torch.randn(3, K)
        model(x)
        x.mul_(2)
        assert torch.equal(model.up_proj(x), model.up_proj(x.clone()))


def test_a_frozen_model_is_copied_moved_and_cast() -> None:
    model = MLP()
    freeze(model, (torch.randn(2, K),))
    x = torch.randn(3, K).half()
    twin = copy.deepcopy(model).half()
    assert twin.gate_proj.fused is twin.up_proj.fused
    assert torch.equal(twin(x), model.half()(x))
    assert twin.to("meta")(x.to("meta")).shape == (3, K)


def test_keyword_arguments_serve_as_example_and_anything_else_is_refused() -> None:
    assert freeze(MLP(), {"x": torch.randn(2, K)}).folded
    with pytest.raises(ValueError, match=r"^freeze: example_inputs must be a tuple .* got Tensor$"):
        freeze(MLP(), torch.randn(2, K))  # type: ignore[arg-type]


def test_one_region_compiled_once_serves_all_frozen_blocks() -> None:
    torch._dynamo.reset()
    blocks = nn.ModuleList([Block() for _ in range(2)])
    x = torch.randn(3, K)
    for block in blocks:
        freeze(block, (x,))

    @torch.compiler.nested_compile_region
    def run(block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    def model(x: Tensor) -> Tensor:
        for block in blocks:
            x = run(block, x)
        return x

    backend = EagerAndRecordGraphs()
    with torch.inference_mode():
        expected = blocks[1](blocks[0](x))
        assert torch.equal(torch.compile(model, backend=backend, fullgraph=True)(x), expected)
    (graph,) = backend.graphs
    regions = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    assert len(regions) == 2  # the model, and one region


# An export of all layers, which are alike, takes a minute.
@pytest.mark.demo
@pytest.mark.parametrize("layers", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_the_demo_model_frozen_computes_the_same_logits(layers: int) -> None:
    pytest.importorskip("transformers")
    from exllama_ops import load_model
    from exllama_ops.integrations.demo import demo_checkpoint

    model = load_model(demo_checkpoint())
    assert len(model.model.layers) == 30
    model.model.layers = model.model.layers[:layers]
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
    report = freeze(model, {"input_ids": ids, "use_cache": False})
    assert [len(group) for group in report.fused] == [3, 2] * layers
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, expected)
