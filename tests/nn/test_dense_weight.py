"""ExllamaLinear.weight: code that reads a dense weight works, and code that writes to one is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration, initialization

from exllama_ops import ExllamaLinear, convert, quantize

K, N = 96, 64


def layer(bias: bool = False) -> ExllamaLinear:
    torch.manual_seed(0)
    return ExllamaLinear.from_weight(quantize(torch.randn(N, K) / K**0.5, 4, 32, bias=torch.randn(N) if bias else None))


def exact(quantized: ExllamaLinear) -> Tensor:
    """The weight in float32, which holds every product of a float16 scale and q - z."""
    wide = ExllamaLinear.from_packed(quantized.to_packed())
    wide.scales = wide.scales.float()
    return wide.dequantize()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_its_description_is_that_of_the_dense_weight(dtype: torch.dtype, bias: bool) -> None:
    weight = layer(bias).to(dtype).weight
    assert isinstance(weight, Tensor)
    assert weight.shape == (N, K)
    assert weight.dtype == dtype
    assert weight.device.type == "cpu"
    assert not weight.requires_grad
    assert layer(bias).to("meta").weight.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_expression_computes_with_the_weight_rounded_once(dtype: torch.dtype) -> None:
    quantized = layer().to(dtype)
    expected = exact(quantized).to(dtype)
    assert torch.equal(quantized.weight.clone(), expected)
    assert torch.equal(quantized.weight.data.t(), expected.t())
    assert torch.equal(quantized.weight.contiguous().view(-1), expected.flatten())
    assert torch.equal(torch.from_dlpack(quantized.weight), expected)
    x = torch.randn(5, K).to(dtype).requires_grad_()
    y = nn.functional.linear(x, quantized.weight)
    assert torch.equal(y, nn.functional.linear(x, expected))
    (gradient,) = torch.autograd.grad(y, x, torch.eye(5, N).to(dtype))
    assert torch.equal(gradient, expected[:5])


def assign_data(weight: Tensor) -> None:
    weight.data = torch.zeros(N, K)


def add_to_data(weight: Tensor) -> None:
    weight.data += 1


def set_rows(weight: Tensor) -> None:
    weight[0] = 0


def write_out(weight: Tensor) -> None:
    torch.add(torch.zeros(N, K), 1, out=weight)


WRITES: list[Callable[[Tensor], Any]] = [
    assign_data,
    add_to_data,
    set_rows,
    write_out,
    nn.init.normal_,
    nn.init.kaiming_uniform_,
    lambda weight: weight.copy_(torch.zeros(N, K)),
    lambda weight: weight.__iadd__(1),
]


@pytest.mark.parametrize("write", WRITES)
def test_writing_to_it_is_refused_and_says_what_to_do(write: Callable[[Tensor], Any]) -> None:
    quantized = layer().float()
    before = quantized.qweight.clone()
    with pytest.raises(RuntimeError, match=r"packed in the buffers.*dequantize\(\).*to_weight\(\)"):
        write(quantized.weight)
    with pytest.raises(AttributeError, match="weight cannot be assigned"):
        quantized.weight = nn.Parameter(torch.zeros(N, K))  # type: ignore[misc, assignment]
    assert torch.equal(quantized.qweight, before)
    assert "weight" not in quantized.state_dict()


def test_transformers_takes_it_for_initialized() -> None:
    initialization.normal_(layer().weight)


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    tokens = torch.arange(12).reshape(2, 6)
    return T5ForConditionalGeneration(config), {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]}


def mamba() -> tuple[nn.Module, dict[str, Tensor]]:
    config = MambaConfig(vocab_size=64, hidden_size=32, state_size=16, num_hidden_layers=1, time_step_rank=32)
    return MambaForCausalLM(config), {"input_ids": torch.arange(12).reshape(2, 6)}


@pytest.mark.parametrize("make", [t5, mamba])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_read_the_weight_of_their_layers_compute_as_dense_ones(
    make: Callable[[], tuple[nn.Module, dict[str, Tensor]]], dtype: torch.dtype
) -> None:
    """T5 casts to the dtype of a weight, and Mamba multiplies by the weight of dt_proj itself."""
    torch.manual_seed(0)
    model, inputs = make()
    dense = model.to(dtype).eval()
    quantized = copy.deepcopy(dense)
    linears = {name: module for name, module in dense.named_modules() if type(module) is nn.Linear}
    weights = {
        name: quantize(linear.weight.float(), 4, 32, bias=linear.bias)
        for name, linear in linears.items()
        if name != "lm_head"  # tied
    }
    convert(quantized, weights)
    for name in weights:
        linears[name].weight.data = exact(quantized.get_submodule(name)).to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        expected, got = dense(**inputs).logits.float(), quantized(**inputs).logits.float()
    tolerance = 2e-3 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_a_compiled_read_of_the_dtype_leaves_no_trace_in_the_graph() -> None:
    quantized = layer().float()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    def forward(x: Tensor) -> Tensor:
        return quantized(x.to(quantized.weight.dtype))

    x = torch.randn(5, K)
    with torch.no_grad():
        assert torch.equal(forward(x), quantized(x))
    assert [str(node.target) for node in graphs[0].graph.nodes if "dequantize" in str(node.target)] == []
