"""The decoder layers of a transformers model, and the model around them, as functions of tensors alone.

A forward is split where the layers begin and end. What comes before them is the head: embedding, masks, rotary
tables. What comes after is the tail: the last norm and the output layer. Weights are arguments, so that one graph
of a layer serves all layers of its kind.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from exllama_ops.integrations.eager import accepted
from exllama_ops.integrations.static_cache import CacheInterface, OneLayerCache

# In the places of a layer's arguments that each call fills.
_HIDDEN, _CACHE, _TENSOR = "hidden", "cache", "tensor"
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
# What a call of a module calls.
_CALLED = ("forward", "_forward_hooks", "_forward_pre_hooks")
# What torch.nn.Module keeps of its own.
_MODULE_STATE = frozenset(vars(nn.Module())) - {"training"}


# How deep objects are looked into that modules hold.
_DEPTH = 3
# What a config says of its file.
_ORIGIN = ("_name_or_path", "transformers_version")


class SplitError(ValueError):
    """A model whose layers cannot be compiled one by one; the text says why."""


class Weights(NamedTuple):
    """The tensors of a module, each once, and which of them its names mean."""

    tensors: list[Tensor]
    places: dict[str, int]

    @staticmethod
    def of(module: nn.Module, without: Sequence[str] = ()) -> Weights:
        """All parameters and buffers but those below the submodules ``without``."""
        prefixes = tuple(f"{name}." for name in without)
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        places: dict[str, int] = {}
        seen: dict[int, int] = {}
        tensors: list[Tensor] = []
        for name, tensor in named:
            if name.startswith(prefixes):
                continue
            if id(tensor) not in seen:
                seen[id(tensor)] = len(tensors)
                tensors.append(tensor.detach())
            places[name] = seen[id(tensor)]
        return Weights(tensors, places)

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The same names for other tensors."""
        return {name: tensors[place] for name, place in self.places.items()}


class Call(NamedTuple):
    """How a forward calls one layer.

    Args:
        spec: of the arguments.
        leaves: for each argument what comes there: the hidden state, the cache, a tensor, or the value itself.
        tensors: what came where a tensor comes, in this order.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    tensors: list[Tensor]

    def arguments(
        self, hidden: Tensor, cache: Cache, tensors: Sequence[Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for another call of the same kind."""
        rest = iter(tensors)
        given = {_HIDDEN: hidden, _CACHE: cache}
        leaves = [next(rest) if kind == _TENSOR else given.get(kind, value) for kind, value in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


@dataclass
class Split:
    """A model, its decoder layers, and how its forward uses them.

    Args:
        model: a transformers causal LM.
        cache: how it takes its cache.
        names: of the layers, in the order of their calls.
        in_tuple: for each layer 0 if it returns its hidden state, or the length of the tuple that begins with it.
        hidden: the size of what the last layer gives, and its dtype.
    """

    model: nn.Module
    cache: CacheInterface
    names: list[str]
    in_tuple: list[int]
    hidden: tuple[int, torch.dtype]

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        return [self.model.get_submodule(name) for name in self.names]

    def around(
        self, ids: Tensor, cache: OneLayerCache, last: Tensor, weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, list[Call], Tensor]:
        """What comes before the layers and what comes after them, which do not depend on one another.

        Args:
            ids: (1, tokens).
            cache: of any layer; its keys are as long as those of all.
            last: (1, rows, hidden_size), hidden states that the last layer gave for other tokens.
            weights: of the model but for its layers.

        Returns:
            The first hidden state of the tokens, the call of each layer, and the logits (rows, vocabulary).
        """
        calls: list[Call] = []
        states: list[Tensor] = []

        def called(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            call, given = self._call_of(args, kwargs, states[-1] if states else None)
            calls.append(call)
            # Another tensor each time, by which the next layer's argument is known to be this one's result.
            states.extend([given.view_as(given)] if states else [given, given.view_as(given)])
            return last if index == len(self.names) - 1 else states[-1]

        arguments = {
            self.cache.argument: cache,
            **accepted(self.model, {"input_ids": ids, "use_cache": True, "logits_to_keep": 0}),
        }
        with _replaced_forwards(self.layers, self.in_tuple, called):
            output = functional_call(self.model, dict(weights), (), arguments)
        return states[0], calls, output.logits[0]

    def layer(
        self, index: int, call: Call, hidden: Tensor, tensors: Sequence[Tensor], cache: OneLayerCache,
        weights: Mapping[str, Tensor],
    ) -> Tensor:  # fmt: skip
        """A layer with these weights: its hidden state."""
        layer = self.layers[index]
        args, kwargs = call.arguments(hidden, cache, tensors)
        with _without_index(layer):
            result = functional_call(layer, dict(weights), args, kwargs)
        state: Tensor = result[0] if self.in_tuple[index] else result
        return state

    def _call_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Tensor | None) -> tuple[Call, Tensor]:
        """A layer's call, and the hidden state that it was given."""
        values, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda value: isinstance(value, Cache))
        leaves: list[tuple[str | None, Any]] = []
        tensors: list[Tensor] = []
        given: Tensor | None = None
        for value in values:
            if isinstance(value, Cache):
                leaves.append((_CACHE, None))
            elif isinstance(value, Tensor):
                if given is None and (expected is None or value is expected):
                    given = value
                    leaves.append((_HIDDEN, None))
                else:
                    tensors.append(value)
                    leaves.append((_TENSOR, None))
            elif isinstance(value, _PLAIN):
                leaves.append((None, value))
            else:
                raise SplitError(f"a layer takes a {type(value).__name__}")
        if given is None:
            raise SplitError("a layer takes something else than what the one before it returns")
        return Call(spec, tuple(leaves), tensors), given


def split(model: nn.Module, cache: CacheInterface) -> Split:
    """Find the decoder layers of a model: those of the list of modules whose length is the cache's.

    Raises:
        SplitError: there are none, or they do not follow on one another.
    """
    count = len(cache.shapes)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and count > 0
    ]
    if len(lists) != 1:
        raise SplitError(f"it must have one list of {count} layers; it has {len(lists)}")
    names = [f"{lists[0]}.{index}" for index in range(count)]
    layers = [model.get_submodule(name) for name in names]
    for layer in layers:
        if stray := [
            name for module in layer.modules() for name, value in vars(module).items() if isinstance(value, Tensor)
        ]:
            raise SplitError(f"its layers hold tensors that are neither parameters nor buffers: {', '.join(stray)}")
    calls = [(module, returned) for module, returned in cache.calls if any(module is layer for layer in layers)]
    if [module for module, _ in calls] != layers:
        raise SplitError("its forward must call every layer once, in order")
    if any(returned.length is None for _, returned in calls):
        raise SplitError("a layer returns neither a tensor nor a tuple that begins with one")
    _, last = calls[-1]
    return Split(model, cache, names, [returned.length or 0 for _, returned in calls], (last.size, last.dtype))


def description(module: nn.Module, without: Sequence[str] = ()) -> str:
    """A text that is the same for modules which compute the same with other weights of the same shapes.

    It has the types, the plain attributes, and the dtypes, shapes and sharing of tensors. The number of a layer is
    left out.
    """
    prefixes = tuple(f"{name}." for name in without)
    weights = Weights.of(module, without)
    lines = []
    for name, part in module.named_modules(remove_duplicate=False):
        if name in without or name.startswith(prefixes):
            continue
        attributes = {key: _plain(value) for key, value in vars(part).items() if key not in _MODULE_STATE}
        attributes.pop("layer_idx", None)
        hooks = [len(getattr(part, key)) for key in ("_forward_hooks", "_forward_pre_hooks")]
        lines.append(f"{name} {_type(part)} {hooks} {sorted(attributes.items())}")
    for name, place in weights.places.items():
        tensor = weights.tensors[place]
        lines.append(f"{name} {place} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device.type}")
    return "\n".join(lines)


def config_text(config: PreTrainedConfig) -> str:
    """A config as text, without where it came from."""
    values = {name: value for name, value in config.to_dict().items() if name not in _ORIGIN}
    return f"{json.dumps(values, sort_keys=True, default=str)} {getattr(config, '_attn_implementation', None)}"


def _plain(value: Any, depth: int = _DEPTH) -> str:
    """An attribute as text that is the same in every process, with the attributes of objects to some depth."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_plain(item, depth) for item in value)}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_plain(item, depth) for item in value))}}}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_plain(key)}: {_plain(item, depth)}' for key, item in value.items()))}}}"
    if isinstance(value, Tensor):  # no weight, so what it holds becomes a part of the graph
        content = "" if value.is_meta else hashlib.sha256(repr(value.tolist()).encode()).hexdigest()
        return f"{_type(value)} {value.dtype} {content}"
    if isinstance(value, PreTrainedConfig):
        return config_text(value)
    if isinstance(value, partial):
        return f"partial({_plain([value.func, value.args, value.keywords], depth)})"
    if hasattr(value, "__qualname__"):
        return f"{_type(value)} {value.__module__}.{value.__qualname__}"
    if depth and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, ModuleType)):
        return f"{_type(value)}({_plain(vars(value), depth - 1)})"
    return _type(value)


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


class _NoIndex:
    """Stands for the number of a layer while it is traced for all: it may find the layer's cache, and no more."""

    def __index__(self) -> int:
        return 0

    def _refuse(self, *args: Any) -> Any:
        raise SplitError("a layer computes with its number")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = __bool__ = __int__ = __float__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __neg__ = _refuse
    __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _refuse


@contextmanager
def _without_index(layer: nn.Module) -> Iterator[None]:
    numbered = [vars(module) for module in layer.modules() if isinstance(vars(module).get("layer_idx"), int)]
    indices = [attributes["layer_idx"] for attributes in numbered]
    try:
        for attributes in numbered:
            attributes["layer_idx"] = _NoIndex()
        yield
    finally:
        for attributes, index in zip(numbered, indices, strict=True):
            attributes["layer_idx"] = index


@contextmanager
def _replaced_forwards(
    layers: Sequence[nn.Module],
    in_tuple: Sequence[int],
    called: Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor],
) -> Iterator[None]:
    """Let the layers' forwards call this instead; their hooks and attributes stay."""
    count = [0]

    def replacement(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            hidden = called(index, args, kwargs)
            return (hidden, *(None,) * (in_tuple[index] - 1)) if in_tuple[index] else hidden

        return forward

    # A layer's hooks belong to the layer, so they are not called here.
    former = [{name: value for name, value in vars(layer).items() if name in _CALLED} for layer in layers]
    try:
        for index, layer in enumerate(layers):
            vars(layer).update({name: OrderedDict() for name in former[index]}, forward=replacement(index))
        yield
    finally:
        for layer, attributes in zip(layers, former, strict=True):
            vars(layer).pop("forward")
            vars(layer).update(attributes)
    if count[0] != len(layers):
        raise SplitError("its forward must call every layer once, in order")
