"""Greedy generation with a transformers causal LM, its whole forward compiled into two graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exllama_ops.extras import require

require("transformers")
from transformers.cache_utils import (  # noqa: E402 (after the check that says what to install)
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)

_SMALLEST_BUCKET = 64

# What transformers calls the cache, in forwards and in results: newer versions, and older ones.
_CACHE_NAMES = ("cache", "past_key_values")

# Inductor's exceptions for a machine that lacks what its kernels are compiled with. They arrive wrapped, and under
# names that moved between versions of torch.
_NO_TOOLCHAIN = ("InvalidCxxCompiler", "TritonMissing")

_Step = Callable[[Tensor, Any], Tensor]


class CompilerUnavailableError(RuntimeError):
    """torch.compile cannot build kernels on this machine."""


class _LayerShape(NamedTuple):
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


class CompiledGenerator:
    """Greedy decoding with a static cache, the whole forward compiled with ``fullgraph=True``.

    Two graphs serve any number of generations. Prefill has a symbol for its sequence length. Decode has
    length 1, and also takes prompts of one token. The length of the cache is a symbol in both. So a longer generation
    moves to a larger cache without a recompile. Positions are tensors in the cache, so no step is guarded on an int.

    Args:
        model: a transformers causal LM in eval mode whose layers have full or sliding-window attention.
        compile: False runs the same steps eagerly.
        backend: of torch.compile; another one than Inductor serves tests and debugging.

    Raises:
        ValueError: the model is in training mode, or has layers with another kind of cache.
        ImportError: the extra "hf" is not installed.
    """

    def __init__(self, model: Any, compile: bool = True, *, backend: str | Callable[..., Any] = "inductor") -> None:
        if model.training:
            raise ValueError("CompiledGenerator: model must be in eval mode; call model.eval()")
        self.model = model
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.max_length: int | None = _text_config(model).to_dict().get("max_position_embeddings")
        self._cache_argument, self._cache_shapes = _cache_of(model, self.device)
        self._cache: Any = None
        self._capacity = 0
        self._length = 0
        self._generation = 0
        self._graphs: dict[str, list[int]] = {"prefill": [], "decode": []}
        self._prefill = self._step("prefill", backend) if compile else self._forward()
        self._decode = self._step("decode", backend) if compile else self._forward()

    @property
    def graphs(self) -> int:
        """Graphs compiled so far."""
        return sum(map(len, self._graphs.values()))

    @property
    def recompiles(self) -> int:
        """Graphs compiled beyond the first of prefill and the first of decode."""
        return sum(max(len(graphs) - 1, 0) for graphs in self._graphs.values())

    @property
    def op_calls(self) -> dict[str, int]:
        """Calls of ``torch.ops.exllama`` in the first graph of "prefill" and "decode", as far as they are compiled."""
        return {name: graphs[0] for name, graphs in self._graphs.items() if graphs}

    def prefill(self, prompt: Sequence[int] | Tensor, max_new_tokens: int = 1) -> Tensor:
        """Forget the former generation and run a prompt: the logits (vocabulary,) of the token after it.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: tokens that may follow; the cache is made large enough for them.

        Raises:
            ValueError: no token, or more positions than the model has.
            CompilerUnavailableError: torch.compile finds no working compiler.
        """
        self._generation += 1
        ids = torch.as_tensor(prompt, dtype=torch.long, device=self.device).reshape(1, -1)
        length = ids.shape[1]
        if length < 1 or max_new_tokens < 1:
            raise ValueError(
                f"CompiledGenerator: needs a prompt of at least 1 token and max_new_tokens of at least 1; got {length} "
                f"and {max_new_tokens}"
            )
        if self.max_length is not None and length + max_new_tokens > self.max_length:
            raise ValueError(
                f"CompiledGenerator: prompt and new tokens must fit the model's {self.max_length} positions; got "
                f"{length} + {max_new_tokens}"
            )
        with torch.inference_mode():
            self._make_room(length + max_new_tokens)
            # A copy made in here: whether a tensor comes from inference mode is part of the guards.
            ids = ids.clone()
            if length == 1:
                return self._run(self._decode, ids)
            torch._dynamo.mark_dynamic(ids, 1)
            return self._run(self._prefill, ids)

    def decode(self, token: int | Tensor) -> Tensor:
        """Append one token to the sequence: the logits (vocabulary,) of the token after it.

        Raises:
            ValueError: there was no prefill, or its cache is full.
        """
        if self._length >= self._capacity:
            state = f"all {self._capacity} positions are used" if self._capacity else "there was no prefill"
            raise ValueError(f"CompiledGenerator: the cache must have room for a token; {state}")
        with torch.inference_mode():
            ids = torch.as_tensor(token, dtype=torch.long, device=self.device).reshape(1, 1).clone()
            return self._run(self._decode, ids)

    def generate(
        self, prompt: Sequence[int] | Tensor, max_new_tokens: int, *, stop: Collection[int] | None = None
    ) -> Iterator[int]:
        """Yield greedy tokens as they come; the last one yielded may be a stop token.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: the most tokens to yield, at least 1.
            stop: tokens that end the text; None for those of the model's generation_config.

        Raises:
            ValueError: as in `prefill`, or another generation was started before this one was done.
            CompilerUnavailableError: as in `prefill`.
        """
        stops = stop_tokens(self.model) if stop is None else frozenset(stop)
        logits = self.prefill(prompt, max_new_tokens)
        generation = self._generation
        for remaining in reversed(range(max_new_tokens)):
            # The token stays on its device for the next step; reading it is what waits for this one.
            token = logits.argmax()
            value = int(token)
            yield value
            if value in stops or not remaining:
                return
            if self._generation != generation:
                raise ValueError("CompiledGenerator: one generation at a time; another one was started meanwhile")
            logits = self.decode(token)

    def warm_up(self) -> None:
        """Compile both graphs, with two steps on made-up tokens."""
        self.prefill([0, 0], 2)
        self.decode(0)

    @property
    def cache_length(self) -> int:
        """Positions of the present cache; 0 before the first prefill."""
        return self._capacity

    def _make_room(self, length: int) -> None:
        """An empty cache of more than ``length - 1`` positions, in a power of two unless the model has fewer."""
        bucket = max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())
        if self.max_length is not None:
            bucket = min(bucket, self.max_length)
        self._length = 0
        if bucket == self._capacity:
            self._cache.reset()
            return
        self._cache = None  # frees the former cache before the next is made
        self._capacity = bucket
        with self.device:  # transformers makes a count where the caller's default is
            self._cache = _Cache(self._cache_shapes, bucket)

    def _run(self, step: _Step, ids: Tensor) -> Tensor:
        try:
            logits = step(ids, self._cache)
        except Exception as error:
            reason = _missing_toolchain(error)
            if reason is None:
                raise
            raise CompilerUnavailableError(
                f"torch.compile has no working compiler for {self.device.type}: {reason}. Install one (g++ or clang++ "
                "for the CPU; the variable CXX names another), or run without compilation: --no-compile on the command "
                "line, CompiledGenerator(model, compile=False) in Python."
            ) from error
        self._length += ids.shape[1]
        return logits

    def _step(self, name: str, backend: str | Callable[..., Any]) -> _Step:
        compile_graph = torch._dynamo.lookup_backend(backend)
        graphs = self._graphs[name]

        def counting_backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            graphs.append(sum(str(node.target).startswith("exllama.") for node in graph.graph.nodes))
            compiled: Callable[..., Any] = compile_graph(graph, inputs)
            return compiled

        step: _Step = torch.compile(
            self._forward(),
            fullgraph=True,
            # What is marked is a symbol, and nothing else becomes one because it differed in another model.
            dynamic=False,
            backend=counting_backend,
            options={"guard_filter_fn": _without_registry},
        )
        return step

    def _forward(self) -> _Step:
        """One forward with a cache, as a function with a code object of its own."""
        model, cache_argument = self.model, self._cache_argument

        def forward(ids: Tensor, cache: Any) -> Tensor:
            logits: Tensor = model(input_ids=ids, **{cache_argument: cache}, use_cache=True, logits_to_keep=1).logits
            return logits[0, -1]

        # Dynamo keeps its graphs, and counts them against its limit, per code object. Sharing one would make the steps,
        # and the generators of one process, guard against each other.
        return FunctionType(
            forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
        )


def stop_tokens(model: Any) -> frozenset[int]:
    """The end-of-sequence tokens of a model's generation_config."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def _without_registry(guards: Sequence[Any]) -> list[bool]:
    """Drop the guards on transformers' registry of model classes, which grows when a model of a new class is made."""
    return ["_CAN_RECORD_REGISTRY" not in guard.name for guard in guards]


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _cache_of(model: Any, device: torch.device) -> tuple[str, list[_LayerShape]]:
    """The name of the argument that takes the cache, and what each layer caches.

    Both are learned from a step of one token: configs name the latter in too many ways.
    """
    with torch.inference_mode():
        output = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=True)
    returned = next((name for name in _CACHE_NAMES if isinstance(getattr(output, name, None), Cache)), None)
    if returned is None:
        raise ValueError(
            f"CompiledGenerator: {type(model).__name__} must return a Cache of keys and values; it has none"
        )
    # A model's own code may keep the older name, and a wrapper's forward may have neither among its parameters.
    parameters = inspect.signature(model.forward).parameters
    argument = next((name for name in _CACHE_NAMES if name in parameters), returned)
    cache = getattr(output, returned)
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    unknown = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in known})
    if unknown:
        raise ValueError(
            "CompiledGenerator: every layer of the model must have full or sliding-window attention; "
            f"{type(model).__name__} caches with {', '.join(unknown)}"
        )
    return argument, [
        _LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device)
        for keys, values in ((layer.keys, layer.values) for layer in cache.layers)
    ]


class _Layer(StaticLayer):  # type: ignore[misc]
    """A layer of the static cache that takes its length from its tensor: the attribute, an int, would be guarded on."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0


class _Cache(StaticCache):  # type: ignore[misc]
    """A transformers StaticCache, allocated, the length of its tensors marked as a symbol.

    A window layer gets the full length as well. Transformers masks it all the same, and its own static window counts
    in Python, which is a recompile per token.
    """

    def __init__(self, shapes: Sequence[_LayerShape], capacity: int) -> None:
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


def _missing_toolchain(error: BaseException) -> str | None:
    """The reason, if a missing compiler is behind an error."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if any(name in (type(current).__name__, *str(current).split(":")[:1]) for name in _NO_TOOLCHAIN):
            return str(current).partition("\n")[0]
        current = getattr(current, "inner_exception", None) or current.__cause__ or current.__context__
    return None
