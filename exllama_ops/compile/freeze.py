"""`freeze`: a model's quantized layers rewritten for speed, as far as a graph proves that nothing changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from exllama_ops.compile.trace import Trace, UnprovenError
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

    * Layers beside each other that take the same input (q, k and v; gate and up), with weights of one format and one
      order of rows, become one product: their weights lie side by side in one layer, and there is no second copy.
    * The activation order of a layer whose input is made from the outputs of others, element by element (down_proj
      from gate_proj and up_proj), goes into the columns of those: ``x[:, perm]`` is what they compute then, and the
      gather before each product is gone.

    Both are proven by a non-strict export of the forward on the example; a layer for which they do not follow stays as
    it is, and the report says why. The proof is one of the path that the example takes: a model that uses the
    intermediate of an MLP elsewhere on another path must not be frozen.

    Results are the same numbers (on a CPU the same bits). Freeze before compiling, training adapters or wrapping
    layers. A frozen model's state_dict fits a model that was frozen likewise: fused layers have ``NAME.fused.*`` (one
    tensor under the name of each of the group) and keep ``NAME.bias``; folded ones have an empty ``perm``, and their
    producers other columns.

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
        try:
            producers = trace.producers(name, layer.in_features)
        except UnprovenError as reason:
            unfolded[name] = str(reason)
            continue
        weight = layer.to_packed()
        for producer in producers:
            target = _layer(model, producer)
            target.set_packed(take_columns(target.to_packed(), weight.perm))
        layer.set_packed(replace(weight, perm=no_order(weight.perm)))
        folded[name] = tuple(producers)
    return folded, unfolded


def _fuse(model: nn.Module, trace: Trace) -> tuple[tuple[tuple[str, ...], ...], dict[str, str]]:
    siblings: dict[Any, list[str]] = {}
    for call in sorted(trace.calls.values(), key=lambda call: call.order):
        parent = call.layer.rpartition(".")[0]
        siblings.setdefault((parent, _layer(model, call.layer).in_features, call.x), []).append(call.layer)
    fused: list[tuple[str, ...]] = []
    unfused = dict(trace.reasons)
    for names in siblings.values():
        for group in _by_format(model, names):
            if len(group) == 1:
                others = ", ".join(name for name in names if name != group[0])
                differs = f"format or order of rows differ from those of {others}"
                unfused[group[0]] = differs if others else "no layer beside it takes the same input"
                continue
            for name, projection in zip(group, fuse([_layer(model, name) for name in group]), strict=True):
                model.set_submodule(name, projection)
            fused.append(tuple(group))
    return tuple(fused), unfused


def _by_format(model: nn.Module, names: list[str]) -> list[list[str]]:
    groups: list[list[str]] = []
    for name in names:
        weight = _layer(model, name).to_packed()
        for group in groups:
            if same_format(_layer(model, group[0]).to_packed(), weight):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups
