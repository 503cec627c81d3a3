"""auto-round-lib's weight-only GEMM, with float32 products or int8 activations."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Peer, needs


def _prepare(compute: str, weight: Weight, threads: int) -> Layer:
    import auto_round_kernel as ark

    needs(weight, bits=(2, 4, 8))
    case = weight.case
    middle = 1 << (case.bits - 1)
    signed = [(values.to(torch.int16) - middle).to(torch.int8) for values in (weight.q, weight.zeros)]
    kind = (compute, f"int{case.bits}", "fp32", True)
    packed = ark.repack_quantized_weight(signed[0], weight.scales.float(), signed[1], case.group_size, *kind)
    no_bias = torch.empty(0)

    def run(x: Tensor) -> Tensor:
        out: Tensor = ark.woqgemm(x, packed, no_bias, case.N, case.K, case.group_size, *kind)
        return out

    return Layer(take=lambda x: x.float(), run=run, give=lambda out: out, nbytes=packed.nbytes)


PEERS = (
    Peer("auto-round-lib fp32", partial(_prepare, "fp32"), packages=("auto-round-lib",)),
    Peer("auto-round-lib int8", partial(_prepare, "int8"), packages=("auto-round-lib",)),
)
