"""Experts whose tensors lie in stacks, as GPTQModel writes GPT-OSS: X.qweight (E, ...) has X.0.qweight and so on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exllama_ops.checkpoint.module import TENSORS

if TYPE_CHECKING:
    from exllama_ops.checkpoint.files import TensorInfo


def unstacked(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """The tensors of each expert, in place of the stacks that files have.

    Args:
        tensors: name -> what a header says.

    Returns:
        The same for each expert alone, and the number of experts by the name of a stack, X.
    """
    stacks = {
        name.removesuffix(".qweight"): info.shape[0]
        for name, info in tensors.items()
        # A stack of no bytes may say that it has any number of experts.
        if name.endswith(".qweight") and len(info.shape) == 3 and info.num_bytes
    }
    places = {_name_in_stack(stack, tensor): (stack, tensor) for stack in stacks for tensor in TENSORS}
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        stack, tensor = places.get(name, ("", ""))
        experts = stacks.get(stack)
        if experts is None or info.shape[:1] != (experts,):
            found[name] = info
            continue
        size = info.num_bytes // experts
        for expert in range(experts):
            found[f"{stack}.{expert}.{tensor}"] = replace(
                info, shape=info.shape[1:], start=info.start + expert * size, num_bytes=size
            )
    return found, stacks


def stacked(tensors: Mapping[str, Tensor], stacks: Mapping[str, int]) -> dict[str, Tensor]:
    """The inverse of `unstacked`, for tensors.

    Args:
        tensors: name -> tensor, with names as in the files.
        stacks: the number of experts by the name of a stack. One that lacks an expert stays as it is.
    """
    found = dict(tensors)
    for stack, experts in stacks.items():
        for tensor in TENSORS:
            names = [f"{stack}.{expert}.{tensor}" for expert in range(experts)]
            if all(name in found for name in names):
                found[_name_in_stack(stack, tensor)] = torch.stack([found.pop(name) for name in names])
    return found


def _name_in_stack(stack: str, tensor: str) -> str:
    return f"{stack}_bias" if tensor == "bias" else f"{stack}.{tensor}"
