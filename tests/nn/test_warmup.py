from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

import exllama_ops
from exllama_ops import ExllamaLinear, quantize


def layer(bits: int) -> ExllamaLinear:
    return ExllamaLinear.from_weight(quantize(torch.randn(32, 64), bits, 32))


def calls_of(*args: object, **options: object) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    calls = []

    def record(name: str) -> object:
        return lambda x, *weight: calls.append((name, tuple(x.shape), x.dtype))

    with mock.patch("torch.ops.exllama", gptq_gemm=record("gemm"), gptq_gemm_dx=record("dx")):
        exllama_ops.warmup(*args, **options)  # type: ignore[arg-type]
    return calls


def test_every_layer_is_called_with_every_number_of_tokens() -> None:
    model = nn.Sequential(layer(4), nn.ReLU(), layer(3))
    calls = calls_of(model, dtype=torch.bfloat16, tokens=(1, 9), gradient=True)
    shapes = [("gemm", (1, 64)), ("dx", (1, 32)), ("gemm", (9, 64)), ("dx", (9, 32))]
    assert calls == [(name, shape, torch.bfloat16) for _ in range(2) for name, shape in shapes]


def test_weights_are_given_as_the_op_takes_them() -> None:
    assert calls_of([layer(2).op_arguments], tokens=(3,)) == [("gemm", (3, 64), torch.float16)]
    exllama_ops.warmup([layer(2).op_arguments], tokens=(3,))


def test_nothing_to_warm_up_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no weight"):
        exllama_ops.warmup(nn.ReLU())
    with pytest.raises(ValueError, match="must be the 8 arguments of gptq_gemm after x; got 2"):
        exllama_ops.warmup([layer(2).op_arguments[:2]])  # type: ignore[list-item]


def test_only_the_tiles_of_triton_are_tuned() -> None:
    with pytest.raises(ValueError, match="on cpu Triton does not compute gptq_gemm"):
        exllama_ops.warmup([layer(4).op_arguments], tokens=(1,), autotune=True)
