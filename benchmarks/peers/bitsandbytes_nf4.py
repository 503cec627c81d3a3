"""bitsandbytes NF4 in bfloat16, its own format: groups as ours, but no zero points and another grid of values."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Peer, Unsupported, needs


@lru_cache(maxsize=1)  # the copies of a weight share it
def _quantized(weight: Weight) -> tuple[Tensor, Any, Tensor]:
    """The packed weight, its state, and the weight (K, N) that they hold."""
    from bitsandbytes import functional

    if not functional.has_avx512bf16():
        raise Unsupported("without AVX512-BF16 it dequantizes the whole weight in every call")
    W = weight.dense.t().bfloat16().contiguous()
    packed, state = functional.quantize_4bit(W, blocksize=weight.case.group_size, quant_type="nf4")
    dense = functional.dequantize_4bit(packed, state).float().t()
    packed, state = functional._convert_weight_packed_for_cpu(packed, state)
    return packed, state, dense


def _prepare(weight: Weight, threads: int) -> Layer:
    import bitsandbytes

    needs(weight, bits=(4,))
    shared, state, dense = _quantized(weight)
    packed = shared.clone()

    def run(x: Tensor) -> Any:
        return bitsandbytes.matmul_4bit(x, packed, state)

    nbytes = packed.nbytes + state.absmax.nbytes
    return Layer(
        take=lambda x: x.bfloat16(), run=run, give=lambda out: torch.as_tensor(out), nbytes=nbytes, dense=dense
    )


PEERS = (Peer("bitsandbytes NF4 bf16", _prepare, packages=("bitsandbytes",)),)
