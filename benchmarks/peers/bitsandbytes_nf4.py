"""bitsandbytes NF4 in bfloat16, its own format: groups as ours, but no zero points and another grid of values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Peer, Unsupported, needs


def _prepare(weight: Weight, threads: int) -> Layer:
    import bitsandbytes
    from bitsandbytes import functional

    needs(weight, bits=(4,))
    W = weight.dense.t().bfloat16().contiguous()
    packed, state = functional.quantize_4bit(W, blocksize=weight.case.group_size, quant_type="nf4")
    dense = functional.dequantize_4bit(packed, state).float().t()
    if not functional.has_avx512bf16():
        raise Unsupported("without AVX512-BF16 it dequantizes the whole weight in every call")
    packed, state = functional._convert_weight_packed_for_cpu(packed, state)

    def run(x: Tensor) -> Any:
        return bitsandbytes.matmul_4bit(x, packed, state)

    nbytes = packed.nbytes + state.absmax.nbytes
    return Layer(
        take=lambda x: x.bfloat16(), run=run, give=lambda out: torch.as_tensor(out), nbytes=nbytes, dense=dense
    )


PEERS = (Peer("bitsandbytes NF4 bf16", "float", _prepare, packages=("bitsandbytes",)),)
