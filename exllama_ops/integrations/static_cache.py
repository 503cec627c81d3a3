"""Keys and values of transformers models in memory of a fixed size, as compiled graphs take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from exllama_ops.extras import require
from exllama_ops.integrations.eager import accepted, cache_argument, returned_cache

require("transformers")
from transformers.cache_utils import Cache, StaticCache, StaticLayer  # noqa: E402 (after the check of what is installed)

# Attention reads the positions up to the last one that is used, rounded up to a multiple of this.
_CUT = 64


class LayerShape(NamedTuple):
    """What one layer caches of a token."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


class Returned(NamedTuple):
    """What a module returned.

    Args:
        length: 0 for a tensor, n for a tuple of n that begins with a tensor, None for anything else.
        size: the last size of that tensor.
        dtype: its dtype.
    """

    length: int | None
    size: int = 0
    dtype: torch.dtype = torch.float32

    @staticmethod
    def of(result: Any) -> Returned:
        """Describe a result."""
        in_tuple = isinstance(result, tuple) and len(result) > 0
        state = result[0] if in_tuple else result
        if not isinstance(state, Tensor):
            return Returned(None)
        return Returned(len(result) if in_tuple else 0, state.shape[-1] if state.dim() else 0, state.dtype)


class CacheInterface(NamedTuple):
    """What a forward of a few tokens shows of a model.

    Args:
        argument: the name under which its forward takes its cache; empty if it returns none.
        reason: why no static cache can be made for it; empty if one can.
        shapes: what each layer caches.
        calls: the modules of its lists that were called, in order, and what each returned.
        logits: (2, vocabulary), after the last two tokens.
    """

    argument: str
    reason: str
    shapes: list[LayerShape]
    calls: list[tuple[nn.Module, Returned]]
    logits: Tensor


def cache_interface(model: Any, tokens: Tensor) -> CacheInterface:
    """Learn it from a forward of tokens (1, 2 or more): configs name it in too many ways."""
    calls: list[tuple[nn.Module, Returned]] = []
    handles = [
        module.register_forward_hook(lambda module, args, result: calls.append((module, Returned.of(result))))
        for modules in model.modules()
        if isinstance(modules, nn.ModuleList)
        for module in modules
    ]
    try:
        with torch.inference_mode():
            output = model(**accepted(model, {"input_ids": tokens, "use_cache": True, "logits_to_keep": 2}))
    finally:
        for handle in handles:
            handle.remove()
    logits: Tensor = output.logits[0, -2:]
    returned, cache = returned_cache(output)
    if not returned:
        return CacheInterface("", "it returns no cache", [], calls, logits)
    argument = cache_argument(model, returned)
    layers = getattr(cache, "layers", [])
    others = sorted({type(layer).__name__ for layer in layers if not _has_keys_and_values(layer) and _tensors(layer)})
    shape = next((_shape(layer) for layer in layers if _has_keys_and_values(layer)), None)
    if others or shape is None:
        kept = ", ".join(others) or type(cache).__name__
        reason = f"not all of its layers cache keys and values alone ({kept})"
        return CacheInterface(argument, reason, [], calls, logits)
    # A layer that shares what another one caches has a place in the cache, and nothing there.
    nothing = LayerShape(0, 0, 0, shape.dtype, shape.device)
    shapes = [_shape(layer) if _has_keys_and_values(layer) else nothing for layer in layers]
    return CacheInterface(argument, "", shapes, calls, logits)


def _shape(layer: Any) -> LayerShape:
    return LayerShape(
        layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], layer.keys.dtype, layer.keys.device
    )


def _has_keys_and_values(layer: Any) -> bool:
    """Whether a layer of a cache holds (1, heads, tokens, dim) of each, and nothing else that grows or changes."""
    tensors = _tensors(layer)
    return set(tensors) == {"keys", "values"} and all(tensor.dim() == 4 for tensor in tensors.values())


def _tensors(layer: Any) -> dict[str, Any]:
    """All that a layer of a cache holds but numbers, which may be tensors too."""
    attributes = {name: value for name, value in vars(layer).items() if isinstance(value, (Tensor, list, tuple, dict))}
    return {
        name: value
        for name, value in attributes.items()
        if (value.dim() > 0 if isinstance(value, Tensor) else len(value) > 0)
    }


class _Layer(StaticLayer):  # type: ignore[misc]
    """A layer of the static cache that takes its length from its tensor: the attribute, an int, would be guarded on."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0


class WholeCache(StaticCache):  # type: ignore[misc]
    """A transformers StaticCache, allocated, the length of its tensors marked as a symbol for Dynamo.

    A window layer gets the full length as well. Transformers masks it all the same, and its own static window counts
    in Python, which is a recompile per token.
    """

    def __init__(self, shapes: Sequence[LayerShape], capacity: int) -> None:
        layers = []
        for shape in shapes:
            layer = _Layer(capacity)
            # Nothing is lazy: a first update that allocates would be a graph of its own.
            layer.lazy_initialization(
                torch.empty(1, shape.heads, 0, shape.key_dim, dtype=shape.dtype, device=shape.device),
                torch.empty(1, shape.heads, 0, shape.value_dim, dtype=shape.dtype, device=shape.device),
            )
            torch._dynamo.mark_dynamic(layer.keys, 2)
            torch._dynamo.mark_dynamic(layer.values, 2)
            layers.append(layer)
        # StaticCache by type, since models ask for it; its constructor would choose the layers itself.
        Cache.__init__(self, layers=layers)


class OneLayerCache(StaticCache):  # type: ignore[misc]
    """The cache of a model while one layer of it is traced: whatever layer is asked for, it is this one.

    Args:
        keys: (1, heads, length, key_dim), written in place at the positions of the new tokens.
        values: (1, heads, length, value_dim), likewise.
        start: the position of the first new token, a tensor without dimensions.
        layers: how many layers the model has.
    """

    def __init__(self, keys: Tensor, values: Tensor, start: Tensor, layers: int) -> None:
        layer = _Layer(keys.shape[2])
        layer.keys, layer.values, layer.cumulative_length = keys, values, start
        layer.device = keys.device
        layer.is_initialized = True
        self._start = start
        Cache.__init__(self, layers=[layer] * layers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        layer = self.layers[0]
        positions = torch.arange(key_states.shape[2], dtype=torch.long, device=key_states.device) + self._start
        layer.keys.index_copy_(2, positions, key_states)
        layer.values.index_copy_(2, positions, value_states)
        return layer.keys, layer.values


class KeysAndValues:
    """The keys and values of all layers of one sequence, for `LayeredForward`.

    A layer's memory is (capacity, heads, head_dim), so that a cut to the positions in use changes no stride. So what
    attention reads does not grow with the capacity.

    Args:
        shapes: of the layers.
        capacity: positions.
    """

    def __init__(self, shapes: Sequence[LayerShape], capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.start = torch.zeros((), dtype=torch.long, device=shapes[0].device)
        # Zeros: attention multiplies what lies beyond the mask by zero, and NaN would survive that.
        self._memory = [
            tuple(
                torch.zeros(capacity, shape.heads, dim, dtype=shape.dtype, device=shape.device)
                for dim in (shape.key_dim, shape.value_dim)
            )
            for shape in shapes
        ]
        self._views: list[tuple[Tensor, ...]] = []

    def cut(self, length: int) -> int:
        """How many positions attention has to read for a sequence of this length."""
        return min(self.capacity, -(-length // _CUT) * _CUT)

    def views(self, cut: int) -> list[tuple[Tensor, ...]]:
        """The first positions of the keys and values of each layer: (1, heads, cut, head_dim)."""
        if not self._views or self._views[0][0].shape[2] != cut:
            self._views = [tuple(memory[:cut].transpose(0, 1).unsqueeze(0) for memory in pair) for pair in self._memory]
        return self._views

    def advance(self, tokens: int) -> None:
        """Count tokens that were appended."""
        self.length += tokens
        self.start.fill_(self.length)

    def reset(self) -> None:
        """Forget the sequence; the memory stays."""
        for pair in self._memory:
            for memory in pair:
                memory[: self.length].zero_()
        self.length = 0
        self.start.fill_(0)
