"""A layer's parameters: read with every rule checked, and set with what says their layout."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


def read_tensor(
    layer: nn.Module, name: str, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None
) -> Tensor:
    """The data of a layer's parameter, buffer or plain tensor.

    Raises:
        ValueError: there is none, or it has another dtype or lies on another device.
    """
    tensor = getattr(layer, name, None)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"ExllamaLinearKernel: the layer has no parameter '{name}'")
    if tensor.dtype not in dtypes:
        names = ", ".join(map(str, dtypes))
        raise ValueError(
            f"ExllamaLinearKernel: '{name}' must be {'one of ' * (len(dtypes) > 1)}{names}; got {tensor.dtype}"
        )
    if device is not None and tensor.device != device:
        raise ValueError(f"ExllamaLinearKernel: '{name}' must be on {device} like the weight; got {tensor.device}")
    return tensor.data


def read_matrix(
    layer: nn.Module,
    name: str,
    dtypes: tuple[torch.dtype, ...],
    *,
    packed: Literal["input", "output"] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """A parameter as a view in (input, output) order, which its ``input_dim`` and ``output_dim`` tell.

    Raises:
        ValueError: as in `read_tensor`, or it is no matrix, or its dimensions or packing are said otherwise.
    """
    tensor = read_tensor(layer, name, dtypes, device)
    if tensor.dim() != 2:
        raise ValueError(f"ExllamaLinearKernel: '{name}' must have 2 dimensions; got shape {tuple(tensor.shape)}")
    param = getattr(layer, name)
    given: tuple[int | None, ...] = (getattr(param, "input_dim", None), getattr(param, "output_dim", None))
    # There are two dimensions, so the number of one tells that of the other.
    input_dim = given[0] if given[0] is not None else 0 if given[1] is None else 1 - given[1]
    output_dim = given[1] if given[1] is not None else 1 - input_dim
    if (input_dim, output_dim) not in ((0, 1), (1, 0)):
        raise ValueError(
            f"ExllamaLinearKernel: '{name}' must have input_dim and output_dim 0 and 1, in any order; got {given}"
        )
    packed_dim = getattr(param, "packed_dim", None)
    expected = input_dim if packed == "input" else output_dim
    if packed is not None and packed_dim not in (None, expected):
        raise ValueError(
            f"ExllamaLinearKernel: '{name}' must be packed along its {packed} dimension, packed_dim={expected}; got "
            f"packed_dim={packed_dim}"
        )
    return tensor if input_dim == 0 else tensor.t()


def check_shape(name: str, tensor: Tensor, formula: str, expected: tuple[int, ...], given: str) -> None:
    """Refuse a tensor of another shape.

    Raises:
        ValueError: the text has the formula, what it gives, and what it was given for.
    """
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"ExllamaLinearKernel: '{name}' must have shape {formula} = {expected} {given}, in (input, output) order; "
            f"got {tuple(tensor.shape)}"
        )


def set_parameter(layer: nn.Module, name: str, tensor: Tensor, **dims: int) -> None:
    """Give a layer a parameter that needs no gradient and says its dimensions."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    for attribute, dim in dims.items():
        setattr(parameter, attribute, dim)
    setattr(layer, name, parameter)
