"""torch.export of quantized models: our ops as nodes, or in plain aten ops."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.weights import Case, build_parts, multi_args
from exllama_ops import ExllamaLinear, quantize
from exllama_ops.compile.decompositions import decompositions
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.testing.bounds import assert_within_bound, error_bound, gamma

K, HIDDEN = 96, 64
TOKENS = ({0: torch.export.Dim.DYNAMIC},)


def mlp(bits: int = 4) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    g_idx = (torch.arange(K) // 32)[torch.randperm(K, generator=generator)]
    up = quantize(torch.randn(HIDDEN, K, generator=generator), bits, 32, g_idx=g_idx)
    down = quantize(torch.randn(K, HIDDEN, generator=generator), 3, 32, bias=torch.ones(K))
    return nn.Sequential(ExllamaLinear.from_weight(up), nn.SiLU(), ExllamaLinear.from_weight(down))


def ours(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "exllama" in str(node.target)]


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_mlp_is_saved_loaded_and_run_for_any_number_of_tokens(strict: bool) -> None:
    model = mlp()
    program = torch.export.export(model, (torch.randn(4, K),), dynamic_shapes=TOKENS, strict=strict)
    assert ours(program) == ["exllama.gptq_gemm.default"] * 2
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert ours(loaded) == ours(program)
    for tokens in (2, 3, 65):
        x = torch.randn(tokens, K)
        assert torch.equal(loaded.module()(x), model(x))


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_decomposed_a_layer_is_plain_aten_and_within_the_bound(bits: int) -> None:
    """The sums of the reference are float64: what is left is the rounding to float32 and x's dtype."""
    layer = mlp(bits)[0]
    assert isinstance(layer, ExllamaLinear)
    program = torch.export.export(layer, (torch.randn(4, K),), dynamic_shapes=TOKENS)
    plain = program.run_decompositions({**torch.export.default_decompositions(), **decompositions()})
    assert ours(plain) == []
    assert {node.target.namespace for node in plain.graph.nodes if isinstance(node.target, torch._ops.OpOverload)} == {
        "aten"
    }
    exact = ExllamaLinear.from_packed(layer.to_packed())
    exact.scales = exact.scales.float()  # the product of a float16 scale and q - z is exact in float32
    W = exact.dequantize().t().double()
    for tokens in (2, 7):
        x = torch.randn(tokens, K)
        error = (plain.module()(x).double() - x.double() @ W).abs()
        assert (error <= error_bound(x, W, gamma(1))).all()


def test_the_decompositions_cover_every_op_that_writes_nothing() -> None:
    def names(overload: torch._ops.OpOverload) -> str:
        return str(overload).removeprefix("exllama.").removesuffix(".default")

    from exllama_ops.ops import _library

    assert {names(overload) for overload in decompositions()} == set(_library.schemas()) - {"gptq_shuffle"}


class Op(nn.Module):
    """One of our ops as a forward."""

    def __init__(self, op: torch._ops.OpOverload) -> None:
        super().__init__()
        self.op = op

    def forward(self, *args: Any) -> Tensor:
        return self.op(*args)


def decomposed(op: torch._ops.OpOverload, *args: Any) -> Tensor:
    program = torch.export.export(Op(op), args)
    assert len(ours(program)) == 1
    plain = program.run_decompositions(decompositions())
    assert ours(plain) == []
    return plain.module()(*args)


@pytest.mark.parametrize("order", ["sorted", "perm", "raw"])
def test_decomposed_the_ops_on_whole_weights_have_the_values_of_the_ops(order: str) -> None:
    exllama = torch.ops.exllama
    case = Case(4, K, HIDDEN, 32, order, shuffled=order != "raw")
    parts = build_parts(case, (HIDDEN, 32))
    x = torch.randn(5, K)
    dense = torch.cat([part.dense for part in parts], 1)
    assert_within_bound(decomposed(exllama.gptq_gemm_multi.default, x, *multi_args(parts)), x, dense, gamma(1))
    weight = parts[0]
    assert torch.equal(decomposed(exllama.gptq_dequantize.default, *weight.args), weight.dense.to(weight.args[2].dtype))
    if case.shuffled:
        words = (weight.args[0], weight.args[3], 4)
        unshuffled = decomposed(exllama.gptq_unshuffle.default, *words)
        exllama.gptq_shuffle(unshuffled, *words[1:])
        assert torch.equal(unshuffled, weight.args[0])


def test_a_program_for_training_decomposes_in_both_directions() -> None:
    def gradient(x: Tensor) -> Tensor:
        return torch.ops.exllama.gptq_gemm_dx(x, *weight)

    layer = mlp()[0]
    assert isinstance(layer, ExllamaLinear)
    packed = layer.to_packed()
    weight = (packed.qweight, packed.qzeros, packed.scales, packed.perm, True, 4, True, 32)

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return gradient(x)

    x = torch.randn(3, HIDDEN)
    plain = torch.export.export(Module(), (x,)).run_decompositions(decompositions())
    assert ours(plain) == []
    torch.testing.assert_close(plain.module()(x), gradient(x))
