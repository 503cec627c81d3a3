"""Which layers compute what nn.Linear computes: `linear_sizes` tries a small copy of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

# The sizes of the copy, of the two dims of its weight. Two differ where those of the layer do.
_COPY_SIZES = (12, 8)

# The copy computes with integers up to this. Sums of 12 products and a bias stay below 256, and are exact in any dtype.
_LARGEST = 4

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer that computes ``y = x @ W + bias`` or ``y = x @ W``, None of any other.

    A layer is known by what it computes, whatever its class and the names of its attributes. Its forward runs on a
    copy of the layer with a weight of 12 by 8 small integers, in training and in evaluation, and the result is compared
    with the product. So it does not matter how large the layer is, nor whether it is on the meta device. One call takes
    some tenths of a millisecond.

    Args:
        module: any module. It is neither called nor changed, and its hooks are not looked at.

    Returns:
        (K, N), or None. A weight may lie as (N, K), as in nn.Linear, or as (K, N), as in the Conv1D of transformers.
        None is also the answer for layers with buffers, submodules or a forward of their own instance.
    """
    if "forward" in vars(module) or module._modules or any(value is not None for value in module._buffers.values()):
        return None
    # The attention that owns such a layer reads its weight and never calls it.
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    if any(is_lazy(value) or value.dtype not in _DTYPES for value in parameters.values()):
        return None
    weights = [value for value in parameters.values() if value.dim() == 2]
    biases = [value for value in parameters.values() if value.dim() == 1]
    if len(weights) != 1 or len(biases) > 1 or len(weights) + len(biases) != len(parameters):
        return None
    rows, columns = weights[0].shape
    if type(module) is nn.Linear:
        return columns, rows
    fits = [bias.shape[0] for bias in biases] or [rows, columns]
    if rows in fits and _computes_product(module, transposed=True):
        return columns, rows
    if columns in fits and _computes_product(module, transposed=False):
        return rows, columns
    return None


def _computes_product(module: nn.Module, *, transposed: bool) -> bool:
    """Whether a copy computes ``x @ W.t() + bias``, or ``x @ W + bias`` if not transposed."""
    with _undisturbed():
        copy = _small_copy(module)
        tensors = [value for value in copy._parameters.values() if value is not None]
        weight = next(value for value in tensors if value.dim() == 2)
        W = weight.t() if transposed else weight
        x = _integers((2, 3, W.shape[0]), weight.dtype, seed=2)
        expected = x.double() @ W.double() + sum(value.double() for value in tensors if value.dim() == 1)
        for training in (True, False):
            copy.__dict__["training"] = training
            try:
                got = type(module).forward(copy, x.clone())
            except Exception:  # whatever the code of the layer raises, it does not take x alone
                return False
            if not isinstance(got, Tensor) or got.dtype != x.dtype or got.shape != expected.shape:
                return False
            if not torch.equal(got.double(), expected):
                return False
    return True


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Compute on the CPU whatever device and dtype rules surround the call, and leave the random state as it is."""
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        yield


def _small_copy(module: nn.Module) -> nn.Module:
    """A module of the same class and attributes, but for its sizes, whose parameters are small integers."""
    weight = next(value for value in module._parameters.values() if value is not None and value.dim() == 2)
    rows, columns = weight.shape
    sizes = {rows: _COPY_SIZES[0], columns: _COPY_SIZES[int(rows != columns)]}
    copy = object.__new__(type(module))
    copy.__dict__.update({name: _resized(value, sizes) for name, value in vars(module).items()})
    copy.__dict__["_parameters"] = {
        name: None
        if value is None
        else nn.Parameter(
            _integers(tuple(sizes[size] for size in value.shape), weight.dtype, seed=value.dim()), requires_grad=False
        )
        for name, value in module._parameters.items()
    }
    return copy


def _resized(value: Any, sizes: dict[int, int]) -> Any:
    """An attribute of a layer as its small copy has it: sizes are those of the copy."""
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list, torch.Size):
        return type(value)(_resized(member, sizes) for member in value)
    return sizes.get(value, value) if type(value) is int else value


def _integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randint(-_LARGEST, _LARGEST + 1, shape, generator=generator, dtype=torch.int64, device="cpu")
    return values.to(dtype)
