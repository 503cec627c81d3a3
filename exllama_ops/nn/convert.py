"""Replacement of a model's Linear layers by ExllamaLinear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from exllama_ops.layout.weight import GptqWeight
from exllama_ops.nn.linear import ExllamaLinear


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` did.

    Args:
        converted: names of the layers that are ExllamaLinear now.
        untouched: names of the nn.Linear layers that were left, having no weight.
    """

    converted: tuple[str, ...]
    untouched: tuple[str, ...]

    def __str__(self) -> str:
        left = f"; left as they were: {', '.join(self.untouched)}" if self.untouched else ""
        return f"converted {len(self.converted)} Linear layers{left}"


def convert(model: nn.Module, weights: Mapping[str, GptqWeight]) -> ConvertReport:
    """Replace the nn.Linear layers named in ``weights`` by `ExllamaLinear`, in place.

    Every new layer is built before the first is put in, so an error leaves the model as it was. A new layer lies where
    the old one did, or where its weight lies if the old one is on the meta device. A weight with a bias gives a layer
    with one, also where the old layer has none: old quantizers write biases of zeros.

    Args:
        model: any module; not itself a Linear.
        weights: by name of the layer (`model.get_submodule`). Read one at a time, so it may load lazily.

    Returns:
        What was converted, and which Linear layers were not.

    Raises:
        ValueError: a name is no nn.Linear of the model, and a subclass is none; or the layer has hooks. Or a weight
            has other sizes than its layer, or lacks the bias that the layer has.
    """
    for name in weights:
        _check_target(model, name)
    layers = {name: _build(model.get_submodule(name), name, weights[name]) for name in weights}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    untouched = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return ConvertReport(converted=tuple(layers), untouched=tuple(untouched))


def _check_target(model: nn.Module, name: str) -> None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"convert: {type(model).__name__} has no module {name!r}, which the weights name") from None
    # A subclass may compute something else than a Linear does.
    if not name or type(module) is not nn.Linear:
        raise ValueError(f"convert: {name!r} must be an nn.Linear inside the model; got {type(module).__name__}")
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise ValueError(f"convert: {name!r} has hooks, which would be lost; remove them first")


def _build(old: nn.Module, name: str, weight: GptqWeight) -> ExllamaLinear:
    assert isinstance(old, nn.Linear)
    expected, got = (old.in_features, old.out_features), (weight.in_features, weight.out_features)
    if expected != got:
        raise ValueError(f"convert: {name!r} must have a weight of (K, N) = {expected}; got {got}")
    if old.bias is not None and weight.bias is None:
        raise ValueError(f"convert: {name!r} has a bias, which its weight lacks")
    layer = ExllamaLinear.from_weight(weight).to(old.weight.dtype)
    if old.weight.device.type != "meta":
        layer = layer.to(old.weight.device)
    return layer.train(old.training)
