"""Tracing: torch.compile, export, fake CUDA, FLOPs; what graphs contain and how many there are."""

from __future__ import annotations

import io

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounter, CompileCounterWithBackend, normalize_gm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from conformance.weights import Case, build, build_experts, build_parts, experts_args, multi_args
from exllama_ops import ExllamaLinear, quantize
from exllama_ops.layout.formats import SUPPORTED_BITS

CASE = Case(4, 96, 64, 32, "perm")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


class QuantizedMLP(nn.Module):
    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        up, down = torch.randn(64, 96, generator=generator), torch.randn(96, 64, generator=generator)
        self.up = ExllamaLinear.from_weight(quantize(up, 4, 32))
        self.down = ExllamaLinear.from_weight(quantize(down, 3, 32, bias=torch.ones(96)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.up(x)))


def test_the_positional_calls_of_the_original_work_eager_compiled_and_exported() -> None:
    weight = build(Case(4, 96, 64, 32, "perm", v2=False))
    w_q, w_zp, w_s, w_g_idx = weight.args[:4]
    checkpoint = build(Case(4, 96, 64, 32, "perm", shuffled=False, v2=False)).qweight

    def shuffle_and_multiply(x: torch.Tensor, w_q: torch.Tensor) -> torch.Tensor:
        w_q = w_q.clone()
        torch.ops.exllama.gptq_shuffle(w_q, w_g_idx, 4)
        return torch.ops.exllama.gptq_gemm(x, w_q, w_zp, w_s, w_g_idx, True, 4)

    class Module(nn.Module):
        def forward(self, x: torch.Tensor, w_q: torch.Tensor) -> torch.Tensor:
            return shuffle_and_multiply(x, w_q)

    x = torch.randn(5, 96, dtype=torch.float16)
    expected = torch.ops.exllama.gptq_gemm(x, w_q, w_zp, w_s, w_g_idx, True, 4)
    assert torch.equal(shuffle_and_multiply(x, checkpoint), expected)
    assert torch.equal(torch.compile(shuffle_and_multiply, fullgraph=True)(x, checkpoint), expected)
    exported = torch.export.export(Module(), (x, checkpoint))
    assert torch.equal(exported.module()(x, checkpoint), expected)
    assert torch.equal(exported.run_decompositions().module()(x, checkpoint), expected)


@pytest.mark.parametrize("name", ["gptq_gemm", "gptq_gemm_dx"])
def test_one_graph_serves_every_number_of_tokens_from_two(name: str) -> None:
    args = build(CASE).args
    width = 96 if name == "gptq_gemm" else 64
    counter = CompileCounter()
    compiled = torch.compile(lambda x: getattr(torch.ops.exllama, name)(x, *args), backend=counter, fullgraph=True)
    for M in (2, 3, 7, 8, 64, 257):
        x = torch.randn(M, width)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x)
    assert counter.frame_count == 1


def test_one_graph_serves_every_number_of_tokens_if_the_size_is_unbacked() -> None:
    args = build(CASE).args
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: torch.ops.exllama.gptq_gemm(x, *args), backend=counter, fullgraph=True)
    for M in (2, 1, 0, 3, 64):
        x = torch.randn(M, 96)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        assert torch.equal(compiled(x), torch.ops.exllama.gptq_gemm(x, *args))
    assert counter.frame_count == 1


def test_without_marks_tokens_take_a_graph_each_for_0_1_and_the_first_size_and_one_for_all_others() -> None:
    args = build(CASE).args
    counter = CompileCounter()
    compiled = torch.compile(lambda x: torch.ops.exllama.gptq_gemm(x, *args), backend=counter, fullgraph=True)
    for M in (4, 1, 0, 5, 6, 7, 128):
        compiled(torch.randn(M, 96))
    assert counter.frame_count == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_inductor_computes_what_eager_computes(dtype: torch.dtype) -> None:
    mlp = QuantizedMLP().to(dtype)
    compiled = torch.compile(mlp, fullgraph=True)
    with torch.no_grad():
        for shape in ((2, 3, 96), (7, 96), (1, 1, 96), (96,), (0, 96)):
            x = torch.randn(shape).to(dtype)
            # Both take SiLU in float32, whose exp may differ by some units in the last place (4 of them), and round it
            # to dtype, where that may tip one rounding. Then each rounds the product, and the sum with the bias.
            eps = torch.finfo(dtype).eps
            hidden = nn.functional.silu(mlp.up(x)).double().abs()
            out = mlp(x)
            bound = (eps + 4 * torch.finfo(torch.float32).eps) * (hidden @ mlp.down.dequantize().t().double().abs())
            error = (compiled(x).double() - out.double()).abs()
            assert (error <= bound + 4 * eps * (out.double().abs() + 1)).all()


@pytest.mark.pinned
def test_graph_text_of_a_quantized_mlp() -> None:
    """What Dynamo and AOTAutograd see: no break, no copy of a weight, and the overload that costs no autograd."""
    backend = AotEagerAndRecordGraphs()
    compiled = torch.compile(QuantizedMLP(), backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(torch.randn(2, 3, 96))
    (graph,) = backend.fw_graphs
    assert_expected_inline(
        normalize_gm(graph.print_readable(print_output=False)),
        """\
class <lambda>(torch.nn.Module):
    def forward(self, arg0_1: "f32[2, 3, 96]", arg1_1: "f16[3, 64]", arg2_1: "i32[12, 64]", arg3_1: "i32[3, 8]", arg4_1: "i32[0]", arg5_1: "f16[2, 96]", arg6_1: "i32[6, 96]", arg7_1: "i32[2, 9]", arg8_1: "i32[0]", arg9_1: "f32[96]"):
        view: "f32[6, 96]" = torch.ops.aten.view.default(arg0_1, [-1, 96]);  arg0_1 = None

        gptq_gemm: "f32[6, 64]" = torch.ops.exllama.gptq_gemm.no_autograd(view, arg2_1, arg3_1, arg1_1, arg4_1, True, 4, True, 32);  view = arg2_1 = arg3_1 = arg1_1 = arg4_1 = None

        view_1: "f32[2, 3, 64]" = torch.ops.aten.view.default(gptq_gemm, [2, 3, 64]);  gptq_gemm = None

        silu: "f32[2, 3, 64]" = torch.ops.aten.silu.default(view_1);  view_1 = None

        view_2: "f32[6, 64]" = torch.ops.aten.view.default(silu, [-1, 64]);  silu = None

        gptq_gemm_1: "f32[6, 96]" = torch.ops.exllama.gptq_gemm.no_autograd(view_2, arg6_1, arg7_1, arg5_1, arg8_1, True, 3, True, 32);  view_2 = arg6_1 = arg7_1 = arg5_1 = arg8_1 = None

        view_3: "f32[2, 3, 96]" = torch.ops.aten.view.default(gptq_gemm_1, [2, 3, 96]);  gptq_gemm_1 = None

        add: "f32[2, 3, 96]" = torch.ops.aten.add.Tensor(view_3, arg9_1);  view_3 = arg9_1 = None
        return (add,)
""",
    )


def test_compiled_training_graphs_contain_only_overloads_without_autograd() -> None:
    """The default overloads own a Python autograd kernel; compiled code must not pay for it on every call."""
    backend = AotEagerAndRecordGraphs()
    compiled = torch.compile(QuantizedMLP(), backend=backend, fullgraph=True)
    compiled(torch.randn(2, 3, 96, requires_grad=True)).sum().backward()
    targets = [str(node.target) for graph in (*backend.fw_graphs, *backend.bw_graphs) for node in graph.graph.nodes]
    assert sorted(target for target in targets if "exllama" in target) == [
        "exllama.gptq_gemm.no_autograd",
        "exllama.gptq_gemm.no_autograd",
        "exllama.gptq_gemm_dx.no_autograd",
        "exllama.gptq_gemm_dx.no_autograd",
    ]


def test_export_with_dynamic_tokens_saved_and_loaded() -> None:
    mlp = QuantizedMLP()
    exported = torch.export.export(mlp, (torch.randn(4, 96),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for M in (2, 3, 7, 65):
        x = torch.randn(M, 96)
        assert torch.equal(loaded(x), mlp(x))


def test_fake_cuda_models_trace_and_export_without_a_gpu() -> None:
    with FakeTensorMode():
        layer = ExllamaLinear(96, 64, 4, 32, act_order=True, device="cuda", dtype=torch.float16)
        x = torch.empty(4, 96, device="cuda", dtype=torch.float16)
        out = torch.compile(layer, backend="eager", fullgraph=True)(x)
        assert (out.device.type, out.shape, out.dtype) == ("cuda", (4, 64), torch.float16)
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    (op,) = [node for node in exported.graph.nodes if "exllama" in str(node.target)]
    assert op.meta["val"].device.type == "cuda"
    assert op.meta["val"].shape[1] == 64


def test_compiled_shuffle_mutates_its_argument() -> None:
    checkpoint = build(Case(4, 96, 64, 32, shuffled=False)).qweight
    expected = build(Case(4, 96, 64, 32)).qweight
    none = torch.empty(0, dtype=torch.int32)
    torch.compile(lambda w: torch.ops.exllama.gptq_shuffle(w, none, 4), fullgraph=True)(checkpoint)
    assert torch.equal(checkpoint, expected)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_flops_are_two_M_K_N_each_way(bits: int) -> None:
    weight = build(Case(bits, 96, 64, 32))
    x = torch.randn(5, 96, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = torch.ops.exllama.gptq_gemm(x, *weight.args)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    with FlopCounterMode(display=False) as inference, torch.inference_mode():
        torch.ops.exllama.gptq_gemm(x, *weight.args)
    expected = 2 * 5 * 96 * 64
    assert forward.get_total_flops() == backward.get_total_flops() == inference.get_total_flops() == expected


def test_flops_of_multi_are_those_of_its_parts() -> None:
    parts = build_parts(CASE, (64, 32))
    x = torch.randn(5, 96, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = torch.ops.exllama.gptq_gemm_multi(x, *multi_args(parts))
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == backward.get_total_flops() == 2 * 5 * 96 * (64 + 32)


def test_one_graph_of_multi_serves_every_number_of_tokens_from_two() -> None:
    args = multi_args(build_parts(CASE, (64, 32)))
    counter = CompileCounter()
    compiled = torch.compile(lambda x: torch.ops.exllama.gptq_gemm_multi(x, *args), backend=counter, fullgraph=True)
    for M in (2, 3, 64, 257):
        x = torch.randn(M, 96)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x)
    assert counter.frame_count == 1


def test_one_graph_of_experts_serves_every_routing_and_number_of_rows() -> None:
    *stacks, _, use_exllama, bit, v2, group_size = experts_args(build_experts(CASE, 3), [0, 0, 0, 0])

    def product(x: torch.Tensor, expert_of_row: torch.Tensor) -> torch.Tensor:
        ids, order = expert_of_row.sort(stable=True)
        offsets = torch.searchsorted(ids, torch.arange(4), out_int32=True)
        y = torch.ops.exllama.gptq_moe_gemm(x[order], *stacks, offsets, use_exllama, bit, v2, group_size)
        return torch.empty_like(y).index_copy(0, order, y)

    counter = CompileCounter()
    compiled = torch.compile(product, backend=counter, fullgraph=True)
    for M in (2, 3, 64, 257):
        x, ids = torch.randn(M, 96), torch.randint(3, (M,))
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(ids, 0)
        assert torch.equal(compiled(x, ids), product(x, ids))
    assert counter.frame_count == 1


def test_flops_of_experts_are_those_of_one_for_each_row() -> None:
    args = experts_args(build_experts(CASE, 3), [0, 1, 1, 5])
    with FlopCounterMode(display=False) as counter:
        torch.ops.exllama.gptq_moe_gemm(torch.randn(5, 96), *args)
    assert counter.get_total_flops() == 2 * 5 * 96 * 64


def test_ops_keep_their_schemas() -> None:
    """Users call them positionally: a change here breaks them."""
    schemas = "\n".join(
        str(getattr(torch.ops.exllama, name).default._schema)
        for name in (
            "gptq_shuffle",
            "gptq_unshuffle",
            "gptq_dequantize",
            "gptq_gemm",
            "gptq_gemm_dx",
            "gptq_gemm_multi",
            "gptq_moe_gemm",
            "gptq_moe_gemm_dx",
        )
    )
    assert_expected_inline(
        schemas,
        """\
exllama::gptq_shuffle(Tensor(a!) qweight, Tensor q_perm, int bit) -> ()
exllama::gptq_unshuffle(Tensor qweight, Tensor q_perm, int bit) -> Tensor
exllama::gptq_dequantize(Tensor qweight, Tensor qzeros, Tensor scales, Tensor g_idx, bool use_exllama, int bit, bool use_v2_format=False, int group_size=0) -> Tensor
exllama::gptq_gemm(Tensor x, Tensor qweight, Tensor qzeros, Tensor scales, Tensor g_idx, bool use_exllama, int bit, bool use_v2_format=False, int group_size=0) -> Tensor
exllama::gptq_gemm_dx(Tensor grad, Tensor qweight, Tensor qzeros, Tensor scales, Tensor g_idx, bool use_exllama, int bit, bool use_v2_format=False, int group_size=0) -> Tensor
exllama::gptq_gemm_multi(Tensor x, Tensor[] qweight, Tensor[] qzeros, Tensor[] scales, Tensor g_idx, bool use_exllama, int bit, bool use_v2_format=False, int group_size=0) -> Tensor
exllama::gptq_moe_gemm(Tensor x, Tensor qweight, Tensor qzeros, Tensor scales, Tensor g_idx, Tensor expert_offsets, bool use_exllama, int bit, bool use_v2_format=False, int group_size=0) -> Tensor
exllama::gptq_moe_gemm_dx(Tensor grad, Tensor qweight, Tensor qzeros, Tensor scales, Tensor g_idx, Tensor expert_offsets, bool use_exllama, int bit, bool use_v2_format=False, int group_size=0) -> Tensor""",
    )
