"""`freeze`: a model's quantized layers rewritten for speed, as far as a graph proves that nothing changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from exllama_ops.compile.trace import Call, Trace, UnprovenError
from exllama_ops.layout.columns import same_format, take_columns
from exllama_ops.layout.weight import no_order
from exllama_ops.nn import ExllamaLinear
from exllama_ops.nn.fused import fuse


@dataclass(frozen=True)
class FreezeReport:
    """What `freeze` did, by names of layers.

    Args:
        fused: the groups of layers that are one product now.
        folded: each layer whose activation order went into the columns of others -> those layers.
        unfused: every other layer -> why it shares no product.
        unfolded: every layer that still has an activation order -> why.
    """

    fused: tuple[tuple[str, ...], ...]
    folded: Mapping[str, tuple[str, ...]]
    unfused: Mapping[str, str]
    unfolded: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"fused {', '.join(group)}" for group in self.fused]
        lines += [f"folded {layer} into {', '.join(producers)}" for layer, producers in self.folded.items()]
        lines += [f"not fused: {layer}: {reason}" for layer, reason in self.unfused.items()]
        lines += [f"not folded: {layer}: {reason}" for layer, reason in self.unfolded.items()]
        return "\n".join(lines)


def freeze(model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any]) -> FreezeReport:
    """Rewrite a model's `ExllamaLinear` layers in place, to be run and compiled faster with the same results.

    * Layers that take the same tensor become one product: q, k and v, or gate and up. Their weights must have one
      format and one order of rows. They lie side by side in one layer then, and there is no second copy. A reshape or
      cast of its own for each is another tensor: let them share one.
    * The activation order of a layer goes into the columns of the layers before, if its input is made from their
      outputs element by element. That is how down_proj follows gate_proj and up_proj. They
      compute ``x[:, perm]`` then, and the gather before each product is gone.

    Both are proven by a non-strict export of the forward on the example. A layer for which they do not follow stays as
    it is, and the report says why. The proof is one of the path that the example takes. A model that uses the
    intermediate of an MLP elsewhere on another path must not be frozen.

    Results are the same numbers (on a CPU the same bits). Freeze before compiling, training adapters or wrapping
    layers. A frozen model's state_dict fits a model that was frozen likewise. Fused layers have ``NAME.fused.*`` and
    keep ``NAME.bias``. One tensor stands there under several names, so safetensors keeps it by ``save_model`` and
    ``load_model``. Folded layers have an empty ``perm``, and their producers other columns.

    Args:
        model: with its weights loaded; its dense layers stay as they are.
        example_inputs: arguments of its forward, a tuple of positional or a mapping of keyword ones.

    Returns:
        What was fused and folded, what was not, and why.

    Raises:
        ValueError: example_inputs is neither a tuple nor a mapping.
        Exception: what torch.export raises where it cannot trace the model, which stays as it was.
    """
    if isinstance(example_inputs, tuple):
        trace = Trace(model, example_inputs, {})
    elif isinstance(example_inputs, Mapping):
        trace = Trace(model, (), example_inputs)
    else:
        raise ValueError(
            "freeze: example_inputs must be a tuple of positional arguments or a mapping of keyword arguments; got "
            f"{type(example_inputs).__name__}"
        )
    folded, unfolded = _fold(model, trace)
    fused, unfused = _fuse(model, trace)
    return FreezeReport(fused, folded, unfused, unfolded)


def _layer(model: nn.Module, name: str) -> ExllamaLinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, ExllamaLinear)
    return layer


def _fold(model: nn.Module, trace: Trace) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    folded, unfolded = {}, {name: reason for name, reason in trace.reasons.items() if _layer(model, name).act_order}
    for name in trace.calls:
        layer = _layer(model, name)
        if not layer.act_order:
            continue
        if not layer.shuffled:
            unfolded[name] = "its rows have a raw g_idx, and no permutation"
            continue
        if layer.source_group_size is not None:
            unfolded[name] = "its groups are filled up with rows that name no column of x"
            continue
        try:
            producers = trace.producers(name, layer.in_features)
        except UnprovenError as reason:
            unfolded[name] = str(reason)
            continue
        weight = layer.to_packed()
        # All are made before the first is set: an error, as of memory, must not leave some of them in another order.
        rewritten = {producer: take_columns(_layer(model, producer).to_packed(), weight.perm) for producer in producers}
        rewritten[name] = replace(weight, perm=no_order(weight.perm))
        for changed, packed in rewritten.items():
            _layer(model, changed).set_packed(packed)
        folded[name] = tuple(producers)
    return folded, unfolded


def _fuse(model: nn.Module, trace: Trace) -> tuple[tuple[tuple[str, ...], ...], dict[str, str]]:
    siblings: dict[Any, list[Call]] = {}
    for call in sorted(trace.calls.values(), key=lambda call: call.order):
        parent = call.layer.rpartition(".")[0]
        siblings.setdefault((parent, _layer(model, call.layer).in_features, call.x), []).append(call)
    fused: list[tuple[str, ...]] = []
    unfused = dict(trace.reasons)
    for calls in siblings.values():
        for group in _that_share(model, calls):
            names = tuple(call.layer for call in group)
            if len(group) == 1:
                unfused[names[0]] = _why_alone(group[0], calls)
                continue
            for name, projection in zip(names, fuse([_layer(model, name) for name in names]), strict=True):
                model.set_submodule(name, projection)
            fused.append(names)
    return tuple(fused), unfused


def _that_share(model: nn.Module, calls: list[Call]) -> list[list[Call]]:
    """Groups that can be one product: given one tensor, on which a `FusedProjection` leaves the columns of others."""
    groups: list[list[Call]] = []
    for call in calls:
        weight = _layer(model, call.layer).to_packed()
        for group in groups:
            first = group[0]
            if call.given is first.given and same_format(_layer(model, first.layer).to_packed(), weight):
                group.append(call)
                break
        else:
            groups.append([call])
    return groups


def _why_alone(call: Call, siblings: list[Call]) -> str:
    others = [other for other in siblings if other is not call]
    beside = ", ".join(other.layer for other in others if other.given is call.given)
    if beside:
        return f"format or order of rows differ from those of {beside}"
    if others:
        return f"{', '.join(other.layer for other in others)} takes the same values in another tensor"
    return "no layer beside it takes the same input"
