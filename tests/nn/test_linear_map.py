"""linear_sizes and convert: a layer is taken by what it computes, whatever its class and size."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from exllama_ops import ExllamaLinear, convert, quantize
from exllama_ops.nn import linear_sizes

K, N = 96, 64


class Projection(nn.Module):
    """A linear map with names of its own, which needs to know its sizes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.sizes = (inputs, outputs)
        self.matrix = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.shift = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.sizes[0]) @ self.matrix + self.shift
        return flat.view(*x.shape[:-1], self.sizes[1])


LINEAR: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(K, N),
    "Linear without bias": lambda: nn.Linear(K, N, bias=False),
    "FalconLinear": lambda: FalconLinear(K, N),
    "FalconLinear without bias": lambda: FalconLinear(K, N, bias=False),
    "Conv1D": lambda: Conv1D(N, K),
    "other names": lambda: Projection(K, N),
}


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_sizes_of_a_linear_map_are_found_whatever_its_class(
    make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    layer = make().to(dtype)
    assert linear_sizes(layer) == (K, N)
    assert linear_sizes(layer.to("meta")) == (K, N)


@pytest.mark.parametrize("make", [lambda: FalconLinear(K, K), lambda: Conv1D(K, K), lambda: Projection(K, K)])
def test_a_square_layer_is_known_by_its_values(make: Callable[[], nn.Module]) -> None:
    assert linear_sizes(make()) == (K, K)


def test_a_layer_of_a_million_columns_takes_no_memory() -> None:
    with torch.device("meta"):
        layer = FalconLinear(1 << 20, 1 << 20)
        assert linear_sizes(layer) == (1 << 20, 1 << 20)


class Scaled(nn.Linear):
    scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(self.out_features)


class Dropped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Lora(nn.Linear):
    def __init__(self) -> None:
        super().__init__(K, N)
        self.down, self.up = nn.Parameter(torch.randn(4, K)), nn.Parameter(torch.zeros(N, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.t() @ self.up.t()


class Clipped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-20, 20)


class InFloat32(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Masked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(K, N)
        self.register_buffer("mask", torch.ones(N, K))


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x).topk(2)


def with_forward_of_its_own() -> nn.Module:
    layer = nn.Linear(K, N)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


OTHER: dict[str, Callable[[], nn.Module]] = {
    "scaled": lambda: Scaled(K, N),
    "noise": lambda: Noisy(K, N),
    "dropout": lambda: Dropped(K, N),
    "adapter": Lora,
    "clipped": lambda: Clipped(K, N),
    "other dtype": lambda: InFloat32(K, N).half(),
    "mask": Masked,
    "tuple": lambda: Router(K, N),
    "own forward": with_forward_of_its_own,
    "embedding": lambda: nn.Embedding(N, K),
    "norm": lambda: nn.LayerNorm(K),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(K, N)),
    "read by its owner": lambda: nn.MultiheadAttention(K, 4).out_proj,
    "lazy": lambda: nn.LazyLinear(N),
    "container": lambda: nn.Sequential(nn.Linear(K, N)),
}


@pytest.mark.parametrize("make", OTHER.values(), ids=OTHER)
def test_a_layer_that_computes_something_else_has_no_sizes(make: Callable[[], nn.Module]) -> None:
    assert linear_sizes(make().eval()) is None


def test_a_layer_and_the_random_numbers_stay_as_they_were() -> None:
    layer = Noisy(K, N)
    before, state = copy.deepcopy(layer.__dict__), torch.get_rng_state()
    assert linear_sizes(layer) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.in_features == before["in_features"]
    assert layer.training == before["training"]
    assert torch.equal(layer.weight, before["_parameters"]["weight"])


@pytest.mark.parametrize("make", [LINEAR["FalconLinear"], LINEAR["Conv1D"], LINEAR["other names"]])
def test_convert_replaces_a_linear_map_of_any_class(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(make(), nn.ReLU(), make()).eval()
    weight, bias = net[0].parameters()
    rows = weight if weight.shape == (N, K) else weight.t()
    x = torch.randn(5, K)
    before = net[0](x)
    report = convert(net, {"0": quantize(rows, 8, 32, bias=bias)})
    assert isinstance(net[0], ExllamaLinear)
    assert not net[0].training
    assert report.untouched == ("2",)
    torch.testing.assert_close(net[0](x), before, rtol=0, atol=0.05)


def test_convert_refuses_a_bias_that_would_be_lost_in_any_class() -> None:
    net = nn.Sequential(Conv1D(N, K))
    with pytest.raises(ValueError, match="'0' has a bias, which its weight lacks"):
        convert(net, {"0": quantize(net[0].weight.t(), 4, 32)})
