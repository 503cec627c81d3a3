"""Quantized models as ONNX programs, run by onnxruntime on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.weights import Case, build, build_parts, multi_args
from exllama_ops import ExllamaLinear, convert, freeze, quantize
from exllama_ops.compile.onnx import onnx_program
from exllama_ops.testing.bounds import assert_within_bound, error_bound, gamma

pytest.importorskip("onnxscript", reason='needs the extra "onnx"')
onnxruntime = pytest.importorskip("onnxruntime", reason='needs the extra "onnx"')

TOKENS = ({0: torch.export.Dim.DYNAMIC},)
_gemm, _gemm_multi = torch.ops.exllama.gptq_gemm, torch.ops.exllama.gptq_gemm_multi


class Product(nn.Module):
    """The op on weights that are constants; float32 outside, since numpy has no bfloat16."""

    def __init__(self, op: Any, args: tuple[Any, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.op, self.args, self.dtype = op, args, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x.to(self.dtype), *self.args).float()


class Program:
    """An exported model in onnxruntime."""

    def __init__(self, model: nn.Module, *args: Tensor, **options: Any) -> None:
        program = onnx_program(model.eval(), args, **options)
        self.nodes = [node for node in program.model.graph if node.op_type not in ("Constant", "Identity")]
        self.initializers = dict(program.model.graph.initializers)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    @property
    def ops(self) -> list[str]:
        return [node.op_type for node in self.nodes]

    def attributes(self, op: str) -> list[dict[str, Any]]:
        found = [node for node in self.nodes if node.op_type == op]
        return [{name: value.value for name, value in node.attributes.items()} for node in found]

    def __call__(self, x: Tensor) -> Tensor:
        (name,) = (given.name for given in self.session.get_inputs())
        return torch.from_numpy(self.session.run(None, {name: x.numpy()})[0])


def assert_exact(program: Program, W: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """W has two roundings in float32, of scales that are float32; a product and its sum in any order K more."""
    for tokens in (1, 2, 33):
        x = torch.randn(tokens, W.shape[0]).to(dtype)
        assert_within_bound(program(x.float()).to(dtype), x, W, gamma(W.shape[0] + 2))


# case -> bits and block of the one MatMulNBits
NBITS = {
    Case(2, 96, 32, 32): (2, 32),
    Case(8, 96, 20, 32): (8, 32),
    Case(3, 96, 32, 32): (4, 32),
    Case(4, 96, 24, 32, shuffled=False): (4, 32),
    Case(4, 96, 24, 32, order="perm", scales_dtype=torch.bfloat16): (4, 32),
    Case(4, 96, 24, 48, scales_dtype=torch.float32): (4, 16),  # a block of 16 divides a group of 48
    Case(2, 1024, 16, 1024): (2, 256),  # the largest block
    Case(4, 40, 24, 32, order="filled"): (4, 32),
    Case(4, 104, 24, 32): (4, 32),  # a partial last group
    Case(4, 80, 24, 48): (4, 16),  # and one in several blocks
    Case(4, 32, 24, 128): (4, 128),  # a group of more rows than there are
    Case(2, 96, 32, 32, v2=False): (4, 32),  # v1 zero points of 4
    Case(4, 96, 24, 32, v2=False): (8, 32),  # and of 16
}
PLAIN = [
    Case(4, 96, 24, 8),
    Case(3, 96, 32, 20, order="perm"),  # and a partial last group
    Case(4, 96, 24, 32, order="raw", shuffled=False),
    Case(8, 96, 256, 32, v2=False),  # zero points of 256
]


@pytest.mark.parametrize("case", NBITS, ids=str)
def test_a_product_is_one_matmul_nbits_within_the_bound_of_float32(case: Case) -> None:
    weight = build(case)
    program = Program(Product(_gemm, weight.args), torch.randn(4, case.K), dynamic_shapes=TOKENS)
    gathers = {"perm": ["Gather"], "filled": ["Pad", "Gather"]}.get(case.order, [])
    assert program.ops == [*gathers, "MatMulNBits"]
    bits, block = NBITS[case]
    (attributes,) = program.attributes("MatMulNBits")
    expected = {"K": weight.rows, "N": case.N, "bits": bits, "block_size": block, "accuracy_level": 1}
    assert attributes == expected
    assert_exact(program, weight.dense)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_what_matmul_nbits_cannot_express_is_plain_onnx(case: Case) -> None:
    weight = build(case)
    assert case.bits < 8 or weight.z.max() == 256
    program = Program(Product(_gemm, weight.args), torch.randn(4, case.K), dynamic_shapes=TOKENS)
    assert program.ops[-1] == "MatMul"
    assert {node.domain for node in program.nodes} == {""}
    assert_exact(program, weight.dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 8])
def test_half_precision_activations_are_rounded_once(dtype: torch.dtype, group_size: int) -> None:
    weight = build(Case(4, 96, 24, group_size, order="perm"))
    program = Program(Product(_gemm, weight.args, dtype), torch.randn(4, 96), dynamic_shapes=TOKENS)
    assert_exact(program, weight.dense, dtype)


def test_products_side_by_side_share_one_gather() -> None:
    parts = build_parts(Case(4, 96, 24, 32, order="perm"), [24, 8, 16])
    program = Program(Product(_gemm_multi, multi_args(parts)), torch.randn(4, 96), dynamic_shapes=TOKENS)
    assert program.ops == ["Gather", *["MatMulNBits"] * 3, "Concat"]
    assert_exact(program, torch.cat([part.dense for part in parts], 1))


def mlp() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    g_idx = (torch.arange(96) // 32)[torch.randperm(96, generator=generator)]
    up = quantize(torch.randn(64, 96, generator=generator), 4, 32, g_idx=g_idx)
    down = quantize(torch.randn(96, 64, generator=generator), 3, 32, bias=torch.ones(96))
    return nn.Sequential(ExllamaLinear.from_weight(up), nn.SiLU(), ExllamaLinear.from_weight(down))


def dense(layer: nn.Module) -> nn.Linear:
    """The float64 layer of the same weight, whose float16 scales make it exact in float32."""
    assert isinstance(layer, ExllamaLinear)
    exact = ExllamaLinear.from_packed(layer.to_packed())
    exact.scales = exact.scales.float()
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
    linear.weight.data = exact.dequantize().double()
    if layer.bias is not None:
        linear.bias.data = layer.bias.double()
    return linear


def test_a_model_of_layers_is_exported_and_stays_as_it_is() -> None:
    model = mlp()
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = Program(model, torch.randn(2, 3, 96), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert [op for op in program.ops if op in ("Gather", "MatMulNBits")] == ["Gather", "MatMulNBits", "MatMulNBits"]
    exact = nn.Sequential(dense(model[0]), nn.SiLU(), dense(model[2]))
    x = torch.randn(5, 3, 96)
    with torch.no_grad():
        expected, hidden = exact(x.double()), exact[:2](x.double())
    up, down = (exact[i].weight.abs().t() for i in (0, 2))
    # Of the first product, through SiLU (its slope is at most 1.1) and its own roundings; of the second; of the bias.
    before = 1.1 * gamma(96 + 2) * (x.double().abs() @ up) + gamma(8) * hidden.abs()
    bound = before @ down + gamma(64 + 2) * ((hidden.abs() + before) @ down) + gamma(2) * (expected.abs() + 1)
    assert ((program(x).double() - expected).abs() <= bound).all()
    after = model.state_dict()
    assert set(stored) == set(after)
    assert all(torch.equal(stored[name], after[name]) for name in stored)


def test_the_file_has_each_weight_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = ExllamaLinear.from_weight(quantize(torch.randn(512, 512), 4, 128))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    program = Program(Tied(), torch.randn(2, 512))
    assert program.ops.count("MatMulNBits") == 2
    B, zeros, scales = 512 * 512 // 2, 512 * 4 // 2, 512 * 4 * 4
    shapes = 64  # what reshapes take
    assert sum(tensor.const_value.nbytes for tensor in program.initializers.values()) <= B + zeros + scales + shapes


def test_a_frozen_model_is_exported_with_its_fused_product() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = (nn.Linear(96, 64, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(x) * self.up(x)

    model = Gated()
    convert(model, {name: quantize(model.get_submodule(name).weight, 4, 32) for name in ("gate", "up")})
    gate, up = dense(model.gate), dense(model.up)
    assert freeze(model, (torch.randn(4, 96),)).fused == (("gate", "up"),)
    program = Program(model, torch.randn(4, 96), dynamic_shapes=TOKENS)
    assert program.ops.count("MatMulNBits") == 1
    x = torch.randn(7, 96)
    with torch.no_grad():
        left, right = gate(x.double()), up(x.double())
    of_left, of_right = (error_bound(x, layer.weight.detach().t(), gamma(96 + 2)) for layer in (gate, up))
    bound = of_left * right.abs() + left.abs() * of_right + of_left * of_right
    bound += gamma(1) * ((left * right).abs() + bound)
    assert ((program(x).double() - left * right).abs() <= bound).all()


def test_a_weight_that_is_no_constant_is_refused() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, qweight: Tensor) -> Tensor:
            return _gemm(x, qweight, *weight.args[1:])

    weight = build(Case(4, 96, 24, 32))
    with pytest.raises(ValueError, match="takes qweight, which must be a constant of the model"):
        onnx_program(Given(), (torch.randn(4, 96), weight.qweight))


def test_other_ops_of_ours_are_refused_by_name() -> None:
    weight = build(Case(4, 96, 24, 32))
    model = Product(torch.ops.exllama.gptq_gemm_dx, weight.args)
    with pytest.raises(
        ValueError, match=r"gptq_gemm_dx\.default has no form in ONNX; gptq_gemm and gptq_gemm_multi have"
    ):
        onnx_program(model, (torch.randn(4, 24),))


ADVICE = r"gptq_gemm: torch.onnx.export has no translation of this op; exllama_ops.compile.onnx.onnx_program exports"


def test_a_plain_export_fails_with_the_name_of_the_op_and_the_function_to_call() -> None:
    with pytest.raises(torch.onnx.OnnxExporterError, match=ADVICE) as error:
        torch.onnx.export(mlp().eval(), (torch.randn(4, 96),), verbose=False)
    assert "no_autograd" not in str(error.value)


def test_a_plain_export_of_a_program_fails_likewise() -> None:
    program = torch.export.export(mlp().eval(), (torch.randn(4, 96),))
    with pytest.raises(torch.onnx.OnnxExporterError, match=ADVICE):
        torch.onnx.export(program, verbose=False)


def test_a_translation_of_the_users_own_is_taken() -> None:
    from onnxscript import FLOAT, INT32, opset18

    def product(
        x: FLOAT,
        qweight: INT32,
        qzeros: INT32,
        scales: FLOAT,
        g_idx: INT32,
        use_exllama: bool,
        bit: int,
        v2: bool,
        g: int,
    ) -> FLOAT:
        return opset18.MatMul(x, opset18.CastLike(qweight, x))

    layer = ExllamaLinear.from_weight(quantize(torch.randn(8, 8), 4, 8))
    table = {torch.ops.exllama.gptq_gemm.no_autograd: product}
    program = torch.onnx.export(layer, (torch.randn(4, 8),), verbose=False, custom_translation_table=table)
    assert "MatMul" in {node.op_type for node in program.model.graph}


def test_the_error_of_the_torchscript_exporter_has_the_name_of_the_op(tmp_path: Path) -> None:
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"exllama::gptq_gemm\."):
        torch.onnx.export(mlp().eval(), (torch.randn(4, 96),), tmp_path / "mlp.onnx", dynamo=False, verbose=False)


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'pip install "exllama-ops\[onnx\]"'):
        onnx_program(nn.Identity(), (torch.ones(1),))
