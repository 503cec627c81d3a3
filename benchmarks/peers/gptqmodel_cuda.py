"""GPTQModel's layers for GPUs in float16: Marlin, ExLlama V2, and Triton (which dequantizes for a dense product).

The classes are those of GPTQModel 7.7. Its extensions are compiled when they are first used.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Peer, needs

_BITS = {"MarlinLinear": (4, 8), "ExllamaV2Linear": (4,), "TritonV2Linear": (2, 4, 8)}
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def _prepare(module: str, name: str, weight: Weight, threads: int) -> Layer:
    classes = importlib.import_module(f"gptqmodel.nn_modules.qlinear.{module}")
    needs(weight, bits=_BITS[name], act_order=True)
    case = weight.case
    is_symmetric = name == "MarlinLinear"  # it has no zero points
    layer = getattr(classes, name)(
        bits=case.bits,
        group_size=case.group_size,
        desc_act=case.act_order,
        sym=is_symmetric,
        in_features=case.K,
        out_features=case.N,
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
        dtype=torch.float16,
    )
    layer.to(weight.scales.device).eval()
    checkpoint = weight.checkpoint
    parts = (checkpoint.qweight, checkpoint.qzeros, checkpoint.scales, weight.groups)
    for part, value in zip(_PARTS, parts, strict=True):
        getattr(layer, part).data.copy_(value)
    _finish(layer)

    def run(x: Tensor) -> Any:
        return layer(x)

    return Layer(
        take=lambda x: x.half(),
        run=run,
        give=lambda out: torch.as_tensor(out),
        nbytes=weight.nbytes - (weight.packed.qzeros.nbytes if is_symmetric else 0),
        dense=weight.symmetric if is_symmetric else None,
    )


def _finish(layer: Any) -> None:
    """What its loader does after it has read a checkpoint."""
    if not hasattr(layer, "scratch_space_fixed"):
        layer.post_init()
        return
    exllamav2 = importlib.import_module("gptqmodel.utils.exllamav2")
    # The extension keeps a pointer to it; a layer of a model shares the model's.
    layer.scratch_space = exllamav2.ScratchSpace(layer.scratch_space_fixed(), layer.qweight.device)
    layer.post_init(layer.scratch_space)


PEERS = tuple(
    Peer(f"GPTQModel {label} fp16", partial(_prepare, module, name), packages=("gptqmodel",))
    for label, module, name in (
        ("Marlin", "marlin", "MarlinLinear"),
        ("ExLlama V2", "exllamav2", "ExllamaV2Linear"),
        ("Triton", "tritonv2", "TritonV2Linear"),
    )
)
