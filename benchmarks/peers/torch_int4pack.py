"""torch.ops.aten._weight_int4pack_mm_for_cpu, in bfloat16: other dtypes of x run a scalar loop there."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Peer, needs


def _prepare(weight: Weight, threads: int) -> Layer:
    needs(weight, bits=(4,))
    group_size = weight.case.group_size
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.q.t().to(torch.int32).contiguous(), 1)
    scales = weight.scales.float()
    # Its weight is (q - 8) * scale + zero.
    pairs = torch.stack([scales, (8 - weight.zeros.float()) * scales], -1).bfloat16().contiguous()

    def run(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, pairs)
        return out

    nbytes = packed.nbytes + pairs.nbytes
    return Layer(take=lambda x: x.bfloat16(), run=run, give=lambda out: out, nbytes=nbytes)


PEERS = (Peer("torch int4pack bf16", _prepare, held=("avx512", "avx2"), packages=("torch",)),)
