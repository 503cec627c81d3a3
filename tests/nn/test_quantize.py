"""quantize: round to nearest."""

from __future__ import annotations

import pytest
import torch

from exllama_ops import GptqWeight, quantize
from exllama_ops.layout import unpack_columns, unpack_rows
from exllama_ops.layout.formats import SUPPORTED_BITS


def decode(weight: GptqWeight) -> torch.Tensor:
    """(N, K) float64."""
    q, z = unpack_rows(weight.qweight, weight.bits), unpack_columns(weight.qzeros, weight.bits)
    g = torch.arange(weight.in_features) // weight.group_size if weight.g_idx is None else weight.g_idx.long()
    return ((q - z[g]).double() * weight.scales.double()[g]).t()


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [8, 40, 96, -1])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_every_weight_is_within_half_a_step(bits: int, group_size: int, sym: bool) -> None:
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    weight = quantize(W, bits, group_size, sym, scales_dtype=torch.float32)
    step = weight.scales[torch.arange(96) // weight.group_size].t().double()
    error = (decode(weight) - W.double()).abs()
    # One step more at the ends of an asymmetric range: the zero point is rounded too.
    inside = error <= step / 2 * (1 + 1e-5)
    assert (inside if sym else inside | (error <= step)).all()
    assert inside.double().mean() > 0.95


def test_symmetric_zero_points_are_the_middle() -> None:
    weight = quantize(torch.randn(64, 96), 3, 32, sym=True)
    assert (unpack_columns(weight.qzeros, 3) == 4).all()


def test_g_idx_chooses_the_group_of_each_input() -> None:
    W = torch.randn(64, 96)
    g_idx = (torch.arange(96) // 32)[torch.randperm(96)]
    W[:, g_idx == 1] *= 100
    weight = quantize(W, 8, 32, g_idx=g_idx)
    assert torch.equal(weight.g_idx, g_idx.int())
    quiet = (decode(weight) - W).abs()[:, g_idx != 1]
    assert quiet.max() < 0.05


def test_zeros_and_tiny_weights_are_kept_finite() -> None:
    W = torch.zeros(64, 96)
    W[:, :32] = 1e-12
    weight = quantize(W, 4, 32)
    assert weight.scales.isfinite().all()
    assert (weight.scales > 0).all()
    assert (decode(weight)[:, 32:] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(64, 96), 5, 32), "bits must be one of"),
        ((torch.zeros(64, 96), 4, 0), "group_size must be at least 1"),
        ((torch.zeros(64, 90), 4, 32), "in_features must be a positive multiple of 8"),
        ((torch.zeros(64), 4, 32), "weight must have shape"),
        ((torch.full((64, 96), float("nan")), 4, 32), "must be finite"),
    ],
)
def test_quantize_refuses(arguments: tuple[torch.Tensor, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^quantize: .*{message}"):
        quantize(*arguments)
