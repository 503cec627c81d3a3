"""gemlite's Triton kernels in float16, by the class of gemlite 0.6. They tune themselves at a shape's first call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Peer, needs


def _prepare(weight: Weight, threads: int) -> Layer:
    import gemlite

    needs(weight, bits=(2, 4, 8))
    case = weight.case
    layer = gemlite.GemLiteLinear(
        W_nbits=case.bits,
        group_size=case.group_size,
        in_features=case.K,
        out_features=case.N,
        input_dtype=gemlite.DType.FP16,
        output_dtype=gemlite.DType.FP16,
    )
    scales, zeros = weight.scales.t().contiguous(), weight.zeros.t().half().contiguous()
    layer.pack(W_q=weight.q.t().contiguous(), scales=scales, zeros=zeros)

    def run(x: Tensor) -> Any:
        return layer(x)

    nbytes = sum(part.nbytes for part in (layer.W_q, layer.scales, layer.zeros))
    return Layer(take=lambda x: x.half(), run=run, give=lambda out: torch.as_tensor(out), nbytes=nbytes)


PEERS = (Peer("gemlite fp16", _prepare, packages=("gemlite",)),)
