"""Models whose decoder layers torch.compile compiles one by one, and whose rest is eager; for `compile_ways`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call

from exllama_ops.integrations.static_cache import KeysAndValues, OneLayerCache, cache_interface

# A layer, the hidden state and the other arguments.
Run = Callable[[Any, Tensor, dict[str, Any]], Any]
# Positions of the cache: as many as CompiledGenerator takes for as short a text.
CAPACITY = 64


class _Layer(nn.Module):
    def __init__(self, run: Run, layer: nn.Module, own: dict[str, Any]) -> None:
        super().__init__()
        self._run, self._layer, self._own = run, layer, own

    def forward(self, hidden: Tensor, **arguments: Any) -> Any:
        return self._run(self._layer, hidden, {**arguments, **self._own})


class ByLayer:
    """The forward of transformers, eager but for its layers, with the interface of CompiledGenerator.

    What would make a graph for each layer is taken away: all have the number 0, and each has a cache of its own.
    """

    def __init__(self, model: Any, way: str) -> None:
        interface = cache_interface(model, torch.zeros(1, 2, dtype=torch.long))
        self._argument, self._model = interface.argument, model
        self._memory = KeysAndValues(interface.shapes, CAPACITY)
        pairs = self._memory.views(CAPACITY)
        self._caches = [OneLayerCache(keys, values, self._memory.start, 1) for keys, values in pairs]
        for layer in model.model.layers:
            layer.self_attn.layer_idx = 0
        if way == "regions":
            from accelerate.utils import compile_regions

            self._model = compile_regions(model, fullgraph=True, dynamic=True, backend="exllama")
        run = {"regions": _call, "no-guards": _without_guards(), "aot-compile": _aot_compiled(model)}[way]
        layers = zip(self._model.model.layers, self._caches, strict=True)
        self._model.model.layers = nn.ModuleList(_Layer(run, layer, {self._argument: cache}) for layer, cache in layers)

    @property
    def graphs(self) -> int:
        return int(counters["stats"]["unique_graphs"])

    def prefill(self, prompt: Sequence[int], max_new_tokens: int) -> Tensor:
        self._memory.reset()
        return self._step(torch.tensor([prompt]))

    def decode(self, token: Any) -> Tensor:
        return self._step(torch.as_tensor(token).reshape(1, 1))

    def _step(self, ids: Tensor) -> Tensor:
        arguments = {self._argument: self._caches[0], "use_cache": True, "logits_to_keep": 1}
        with torch.inference_mode():
            logits: Tensor = self._model(input_ids=ids, **arguments).logits[0, -1]
        self._memory.advance(ids.shape[1])
        return logits


def _call(layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> Any:
    return layer(hidden, **arguments)


def _without_guards() -> Run:
    # Nothing tells the graphs of one code object apart, so each has one of its own.
    functions = [FunctionType(_call.__code__.replace(), _call.__globals__, name) for name in ("prefill", "decode")]
    options: Any = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    prefill, decode = (
        torch.compile(function, fullgraph=True, dynamic=True, backend="exllama", options=options)
        for function in functions
    )
    return lambda layer, hidden, arguments: (decode if hidden.shape[1] == 1 else prefill)(layer, hidden, arguments)


def _aot_compiled(model: Any) -> Run:
    weights = {layer: {**dict(layer.named_parameters()), **dict(layer.named_buffers())} for layer in model.model.layers}
    # A copy: what is both part of the module and given with the weights would be guarded on.
    first = copy.deepcopy(model.model.layers[0])
    compiled: dict[bool, Any] = {}

    def step(own: dict[str, Tensor], hidden: Tensor, arguments: dict[str, Any]) -> Any:
        return functional_call(first, own, (hidden,), arguments)

    def run(layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> Any:
        given = (weights[layer], hidden, arguments)
        one = hidden.shape[1] == 1
        if one not in compiled:
            # A float that is a symbol makes Dynamo begin again, for which aot_compile is not prepared.
            with torch._dynamo.config.patch(specialize_float=True):
                lazy: Any = torch.compile(step, fullgraph=True, dynamic=True, backend="exllama")
                compiled[one] = lazy.aot_compile((given, {}))
        return compiled[one](*given)

    return run
