"""Adapters over frozen quantized layers: they learn, eager and compiled, and the base stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from exllama_ops import ExllamaLinear, quantize
from exllama_ops.testing.bounds import assert_within_bound, gamma

K, HIDDEN, RANK = 96, 160, 4


def base(seed: int, out_features: int, in_features: int) -> ExllamaLinear:
    generator = torch.Generator().manual_seed(seed)
    g_idx = (torch.arange(in_features) // 32)[torch.randperm(in_features, generator=generator)]
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    return ExllamaLinear.from_weight(quantize(weight, 4, 32, g_idx=g_idx))


class Lora(nn.Module):
    """``layer(x) + B A x``, B starting at zero."""

    def __init__(self, layer: ExllamaLinear) -> None:
        super().__init__()
        self.base = layer
        self.down = nn.Linear(layer.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Lora(base(1, HIDDEN, K)), nn.SiLU(), Lora(base(2, K, HIDDEN)))


def losses(trained: nn.Module, forward: object, steps: int = 25) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(16, K, generator=generator), torch.randn(16, K, generator=generator)
    optimizer = torch.optim.Adam(trained.parameters(), 0.02)
    values = []
    for _ in range(steps):
        loss = (forward(x) - target).square().mean()  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def assert_base_untouched(trained: nn.Module) -> None:
    before = dict(model().named_buffers())
    for name, buffer in trained.named_buffers():
        assert torch.equal(buffer, before[name])


def test_training_lowers_the_loss_and_leaves_the_base_alone() -> None:
    trained = model()
    values = losses(trained, trained)
    assert values[-1] < 0.5 * values[0]
    assert_base_untouched(trained)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in trained.named_parameters()} == {"up", "down"}


def test_compiled_training_is_one_graph_and_learns_as_eager_training_does() -> None:
    torch._dynamo.reset()
    eager, compiled = model(), model()
    counter = CompileCounterWithBackend("inductor")
    ours = losses(compiled, torch.compile(compiled, backend=counter, fullgraph=True))
    assert counter.frame_count == 1
    assert_base_untouched(compiled)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(losses(eager, eager)), rtol=1e-3, atol=1e-5)


def adapter_gradients(
    x: Tensor, grad: Tensor, layers: list[tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of two layers in a row, each (W, down, up) of ``y = x W + (x down.T) up.T``, as sums of products."""
    (W_1, down_1, up_1), (W_2, down_2, up_2) = layers
    hidden = x @ W_1 + x @ down_1.t() @ up_1.t()
    grad_hidden = grad @ W_2.t() + grad @ up_2 @ down_2
    return (
        (grad_hidden @ up_1).t() @ x,
        grad_hidden.t() @ (x @ down_1.t()),
        (grad @ up_2).t() @ hidden,
        grad.t() @ (hidden @ down_2.t()),
    )


@pytest.mark.parametrize("backend", [None, "exllama"])
def test_the_gradients_of_adapters_are_within_the_bound_of_float64(backend: str | None) -> None:
    """Float32 sums of products err by at most gamma(n) times the sums of magnitudes, n the roundings in a row.

    A gradient that passes both layers has the most of them. It has sums over K, HIDDEN, ranks and tokens, and two
    additions of an adapter to its layer. The ops add three roundings beside their sums.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    adapted = [Lora(base(1, HIDDEN, K)), Lora(base(2, K, HIDDEN))]
    for layer in adapted:
        nn.init.normal_(layer.up.weight)
    x, grad = torch.randn(7, K), torch.randn(7, K)
    chain = nn.Sequential(*adapted)
    forward = chain if backend is None else torch.compile(chain, backend=backend, fullgraph=True)
    forward(x).backward(grad)
    weights = []
    for layer in adapted:
        exact = ExllamaLinear.from_packed(layer.base.to_packed())
        exact.scales = exact.scales.float()
        weights.append((exact.dequantize().t(), layer.down.weight.detach(), layer.up.weight.detach()))
    doubles = [tuple(tensor.double() for tensor in layer) for layer in weights]
    expected = adapter_gradients(x.double(), grad.double(), doubles)
    magnitudes = adapter_gradients(
        x.double().abs(), grad.double().abs(), [tuple(tensor.abs() for tensor in layer) for layer in doubles]
    )
    relative = gamma(K + HIDDEN + 2 * RANK + 7 + 2 + 3)
    found = [adapted[0].down, adapted[0].up, adapted[1].down, adapted[1].up]
    for linear, exact_gradient, magnitude in zip(found, expected, magnitudes, strict=True):
        assert linear.weight.grad is not None
        assert ((linear.weight.grad.double() - exact_gradient).abs() <= relative * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_gradient_that_passes_a_layer_is_within_the_bound_of_float64(dtype: torch.dtype) -> None:
    """What reaches the adapters below a layer: the gradient of its input, of the exact product by the weight."""
    layer = base(1, HIDDEN, K)
    x = torch.randn(7, K, dtype=dtype, requires_grad=True)
    grad = torch.randn(7, HIDDEN).to(dtype)
    layer(x).backward(grad)
    exact = ExllamaLinear.from_packed(layer.to_packed())
    exact.scales = exact.scales.float()  # the product of a float16 scale and q - z is exact in float32
    assert x.grad is not None
    assert_within_bound(x.grad, grad, exact.dequantize().double(), gamma(HIDDEN + 3))
