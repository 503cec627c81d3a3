"""Replacement of a model's linear layers by ExllamaLinear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from exllama_ops.layout.weight import GptqWeight
from exllama_ops.nn.linear import ExllamaLinear
from exllama_ops.nn.linear_map import linear_sizes


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` did.

    Args:
        converted: names of the layers that are ExllamaLinear now.
        untouched: names of the linear layers that were left, having no weight. They are all nn.Linear layers, and
            layers of any class that compute what one computes.
    """

    converted: tuple[str, ...]
    untouched: tuple[str, ...]

    def __str__(self) -> str:
        left = f"; left as they were: {', '.join(self.untouched)}" if self.untouched else ""
        return f"converted {len(self.converted)} Linear layers{left}"


def convert(model: nn.Module, weights: Mapping[str, GptqWeight]) -> ConvertReport:
    """Replace the linear layers named in ``weights`` by `ExllamaLinear`, in place.

    A layer is taken by what it computes, which is ``x @ W`` or ``x @ W + bias``, and not by its class. nn.Linear is
    taken, and so are FalconLinear and Conv1D of transformers. A subclass that computes something else is refused.

    Every new layer is built before the first is put in, so an error leaves the model as it was. A new layer lies where
    the old one did, or where its weight lies if the old one is on the meta device. A weight with a bias gives a layer
    with one, also where the old layer has none: old quantizers write biases of zeros. A transformers model refuses
    ``save_pretrained`` from then on, since its files would load as random weights.

    Args:
        model: any module; not itself the layer.
        weights: by name of the layer (`model.get_submodule`). Read one at a time, so it may load lazily.

    Returns:
        What was converted, and which linear layers were not.

    Raises:
        ValueError: a name is no module of the model, or one that computes something else. Or the layer has hooks. Or a
            weight has other sizes than its layer, or lacks the bias that the layer has.
    """
    sizes = {name: _sizes(model, name) for name in weights}
    layers = {name: _build(model.get_submodule(name), name, sizes[name], weights[name]) for name in weights}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    # transformers would write the packed layers under names that it reads as random weights.
    if layers and hasattr(type(model), "save_pretrained"):
        model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[assignment]
    untouched = (
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) or linear_sizes(module)
    )
    return ConvertReport(converted=tuple(layers), untouched=tuple(untouched))


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of a transformers model's own: what it would write of packed layers, nobody could load."""
    if getattr(model, "_hf_peft_config_loaded", False):  # it writes the adapters alone
        return type(model).save_pretrained(model, *args, **kwargs)
    raise ValueError(
        f"save_pretrained: {type(model).__name__} has layers that exllama_ops.convert put in, and no quantization "
        "config that describes them. Write it by exllama_ops.save_gptq, with layer.to_weight() of each ExllamaLinear"
    )


def _sizes(model: nn.Module, name: str) -> tuple[int, int]:
    """(K, N) of the layer of this name, which can be replaced."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"convert: {type(model).__name__} has no module {name!r}, which the weights name") from None
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    # accelerate's hooks are a forward of the instance.
    if any(hooks) or "forward" in vars(module):
        raise ValueError(f"convert: {name!r} has hooks, which would be lost; remove them first")
    sizes = linear_sizes(module) if name else None
    if sizes is None:
        raise ValueError(
            f"convert: {name!r} must be a layer inside the model that computes x @ W + bias, as nn.Linear does; "
            f"{type(module).__name__} does not"
        )
    return sizes


def _build(old: nn.Module, name: str, expected: tuple[int, int], weight: GptqWeight) -> ExllamaLinear:
    got = (weight.in_features, weight.out_features)
    if expected != got:
        raise ValueError(f"convert: {name!r} must have a weight of (K, N) = {expected}; got {got}")
    parameters = list(old.parameters())
    if len(parameters) == 2 and weight.bias is None:
        raise ValueError(f"convert: {name!r} has a bias, which its weight lacks")
    dense = next(parameter for parameter in parameters if parameter.dim() == 2)
    layer = ExllamaLinear.from_weight(weight).to(dense.dtype)
    if dense.device.type != "meta":
        layer = layer.to(dense.device)
    return layer.train(old.training)
