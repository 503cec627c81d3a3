"""`WholeForward`: the whole forward of a transformers model in two graphs of torch.compile, or eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from exllama_ops.integrations.cpu_forms import fast_eager_attention
from exllama_ops.integrations.eager import accepted
from exllama_ops.integrations.static_cache import CacheInterface, WholeCache


class WholeForward:
    """The forward of a transformers causal LM, compiled with ``fullgraph=True``.

    Prefill has a symbol for its length, and decode has length 1. The length of the cache is a symbol in both.

    Args:
        model: a transformers causal LM in eval mode.
        interface: how it takes its cache.
        compile: False runs it eagerly.
        backend: of torch.compile.
    """

    def __init__(
        self, model: Any, interface: CacheInterface, *, compile: bool, backend: str | Callable[..., Any]
    ) -> None:
        self._model, self._interface = model, interface
        self._graphs: dict[str, list[int]] = {"prefill": [], "decode": []}
        self._compile = compile
        self._steps = {name: self._compiled(name, backend) if compile else self._function() for name in self._graphs}

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

    def new_cache(self, capacity: int) -> WholeCache:
        """Memory for the keys and values of one sequence of at most ``capacity`` tokens."""
        device = self._interface.shapes[0].device
        with device:  # transformers makes a count where the caller's default is
            return WholeCache(self._interface.shapes, capacity)

    def __call__(self, ids: Tensor, cache: WholeCache) -> Tensor:
        """Append tokens (1, tokens) to a sequence: the logits (vocabulary,) of the token after them."""
        # A copy made in here: whether a tensor comes from inference mode is part of the guards.
        ids = ids.clone()
        if not self._compile:
            with fast_eager_attention(ids.device):
                return self._steps["decode"](ids, cache)
        if ids.shape[1] == 1:
            return self._steps["decode"](ids, cache)
        torch._dynamo.mark_dynamic(ids, 1)
        return self._steps["prefill"](ids, cache)

    def _compiled(self, name: str, backend: str | Callable[..., Any]) -> Callable[[Tensor, Any], Tensor]:
        compile_graph = torch._dynamo.lookup_backend(backend)
        graphs = self._graphs[name]

        def counting_backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            graphs.append(sum(str(node.target).startswith("exllama.") for node in graph.graph.nodes))
            compiled: Callable[..., Any] = compile_graph(graph, inputs)
            return compiled

        step: Callable[[Tensor, Any], Tensor] = torch.compile(
            self._function(),
            fullgraph=True,
            # What is marked is a symbol, and nothing else becomes one because it differed in another model.
            dynamic=False,
            backend=counting_backend,
            options={"guard_filter_fn": _without_registry},
        )
        return step

    def _function(self) -> Callable[[Tensor, Any], Tensor]:
        """One forward with a cache, as a function with a code object of its own."""
        model, cache_argument = self._model, self._interface.argument
        options = accepted(model, {"use_cache": True, "logits_to_keep": 1})

        def forward(ids: Tensor, cache: Any) -> Tensor:
            logits: Tensor = model(input_ids=ids, **{cache_argument: cache}, **options).logits
            return logits[0, -1]

        # Dynamo keeps its graphs, and counts them against its limit, per code object. Sharing one would make the steps,
        # and the generators of one process, guard against each other.
        return FunctionType(
            forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
        )


def _without_registry(guards: Sequence[Any]) -> list[bool]:
    """Drop the guards on transformers' registry of model classes, which grows when a model of a new class is made."""
    return ["_CAN_RECORD_REGISTRY" not in guard.name for guard in guards]
