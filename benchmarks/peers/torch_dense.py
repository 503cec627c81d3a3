"""torch.nn.functional.linear with the dequantized weight."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Peer


def _prepare(dtype: torch.dtype, weight: Weight, threads: int) -> Layer:
    W = weight.dense.t().to(dtype, copy=True).contiguous()

    def run(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, W)

    return Layer(take=lambda x: x.to(dtype), run=run, give=lambda out: out, nbytes=W.nbytes)


PEERS = tuple(
    Peer(f"torch dense {name}", partial(_prepare, dtype), held=("avx512", "avx2"), packages=("torch",))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16))
)
