"""humming's kernels in float16, by the class of humming-kernels 0.1. They are compiled at a shape's first call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Peer, needs


def _prepare(weight: Weight, threads: int) -> Layer:
    from humming.layer import HummingLayer

    needs(weight, bits=(2, 3, 4, 8))
    case, checkpoint = weight.case, weight.checkpoint
    layer = HummingLayer(
        shape_n=case.N,
        shape_k=case.K,
        weight_config={"quant_method": "gptq", "bits": case.bits, "group_size": case.group_size, "sym": False},
        torch_dtype=torch.float16,
    ).to(checkpoint.qweight.device)
    parts = {"qweight": checkpoint.qweight, "qzeros": checkpoint.qzeros, "scales": checkpoint.scales}
    layer.load_from_tensors({**parts, "g_idx": weight.groups})
    layer.transform()

    def run(x: Tensor) -> Any:
        return layer(x)

    nbytes = sum(part.nbytes for part in layer.parameters())
    return Layer(take=lambda x: x.half(), run=run, give=lambda out: torch.as_tensor(out), nbytes=nbytes)


PEERS = (Peer("humming fp16", _prepare, packages=("humming-kernels",)),)
