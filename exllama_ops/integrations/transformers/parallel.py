"""Tensor parallelism of transformers: which part of each quantized layer this process holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from exllama_ops.integrations.transformers.pending import PendingLinear
from exllama_ops.layout import GptqWeight
from exllama_ops.layout.formats import FORMATS
from exllama_ops.nn import ExllamaLinear

# Plans name a layer of all layers by a star in place of its number.
_LAYER = re.compile(r"\.[0-9]+(?=\.|$)")
_COLUMNS = ("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise")
_ROWS = ("rowwise", "rowwise_rep", "rowwise_split_input")
# Every process holds the whole layer.
_WHOLE = ("replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "all_reduce")


class Cut(NamedTuple):
    """One of ``size`` parts of a layer: of its rows (inputs) or else of its columns (outputs)."""

    rows: bool
    rank: int
    size: int


def cuts(model: Any, pending: Mapping[str, PendingLinear], parameters: Mapping[str, str]) -> dict[str, Cut]:
    """The cut of each layer that is not whole in this process; none without tensor parallelism.

    Args:
        model: that transformers distributes.
        pending: name of the module -> layer.
        parameters: name of the module -> the parameter of transformers' plan that it is a part of, for experts.

    Raises:
        ValueError: the plan has a style that packed layers cannot follow.
    """
    size = model._tp_size or 1
    if size == 1:
        return {}
    mesh = model._mesh_manager.get_mesh("tp")
    rank = mesh.get_local_rank() if mesh.ndim == 1 else mesh.get_local_rank("tp")
    found: dict[str, Cut] = {}
    for target in pending:
        rule = parameters.get(target, target)
        style = model.tp_plan.get(_LAYER.sub(".*", rule)) or model.tp_plan.get(rule)
        if style in _ROWS or style in _COLUMNS:
            found[target] = Cut(style in _ROWS, rank, size)
        elif style is not None and style not in _WHOLE:
            raise ValueError(
                f"{target}: quantized layers follow the tensor parallel styles {', '.join(_COLUMNS + _ROWS)}; the plan "
                f"has {style}"
            )
    return found


def fill(target: str, layer: PendingLinear, weight: GptqWeight, cut: Cut, device: torch.device) -> ExllamaLinear:
    """Fill a layer with its part of a weight, and tell transformers that it computes with local tensors.

    Raises:
        ValueError: the cut falls within a packed word.
    """
    outputs = layer.out_features
    size = weight.in_features if cut.rows else weight.out_features
    step = -(-size // cut.size)  # as torch.chunk cuts
    part = range(min(cut.rank * step, size), min((cut.rank + 1) * step, size))
    unit = FORMATS[weight.bits].block_values
    if not part or part.start % unit or part.stop % unit:
        raise ValueError(
            f"{target}: {size} {'inputs' if cut.rows else 'outputs'} in {cut.size} parts must be cut at multiples of "
            f"{unit}, which fill whole words of {weight.bits} bits; part {cut.rank} is {part.start}:{part.stop}"
        )
    if cut.rows:
        # The parts are added up, so one of them has the bias.
        own = weight.shard(rows=part, bias=weight.bias is not None and cut.rank == 0)
    else:
        own = weight.shard(columns=part)
    filled = layer.fill(own).to(device)
    filled._hf_quantized_needs_local_tp = True
    # What gathers the outputs asks for the whole width.
    filled.out_features = outputs
    return filled
