"""`LayeredForward`: a transformers forward whose decoder layer is compiled once and serves all layers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from exllama_ops.compile import packages
from exllama_ops.compile.packages import Run
from exllama_ops.extras import collector_paused
from exllama_ops.integrations import layer_graphs
from exllama_ops.integrations.cache_check import CacheCheck
from exllama_ops.integrations.cpu_forms import fast_forms
from exllama_ops.integrations.layer_graphs import Plan
from exllama_ops.integrations.layers import Split, SplitError, Weights, config_text, description, split
from exllama_ops.integrations.positions import position_limit
from exllama_ops.integrations.static_cache import CacheInterface, KeysAndValues
from exllama_ops.progress import Notify, ignore

Backend = str | Callable[..., Any]

# Backends whose graphs AOTInductor compiles, and whether ours passes over them first.
_INDUCTOR = {"inductor": False, "exllama": True}


class _Layer(NamedTuple):
    kind: int
    slots: list[int]
    weights: list[Tensor]


class LayeredForward:
    """The forward of a transformers causal LM in a few small graphs, however many layers it has.

    Each kind of decoder layer has one graph for prompts and one for single tokens. One more has what lies around the
    layers: the head (embedding, masks, rotary tables) and the tail (last norm, output layer). With Inductor behind it
    they are AOTInductor packages that the cache folder keeps: a later process loads them, and traces nothing.

    The weights are those that the model has now. What is written into them later is seen; tensors that take their
    place are not. One thread at a time may call it.

    Args:
        model: a transformers causal LM in eval mode; its Linear layers may be quantized or dense.
        backend: "exllama" or "inductor". Another backend of torch.compile serves tests; its graphs are not kept.
        notify: takes the steps.
        interface: how the model takes a static cache that is known to serve it. None learns it, and checks the cache.

    Raises:
        ValueError: the model computes something else with a static cache, or cannot be split into layers. The text says
            why.
        exllama_ops.compile.packages.PackageError: a graph does not compile.

    Example::

        forward = LayeredForward(model)
        cache = forward.new_cache(256)
        logits = forward(ids, cache)  # (1, tokens) -> (vocabulary,), of the token after the last one
    """

    def __init__(
        self,
        model: Any,
        *,
        backend: Backend = "exllama",
        notify: Notify = ignore,
        interface: CacheInterface | None = None,
    ) -> None:
        device = model.get_input_embeddings().weight.device
        self._name = type(model).__name__
        self._check: CacheCheck | None = None
        self._checked = 0
        if interface is None:
            self._check = CacheCheck(model, device, position_limit(model.config))
            self._check_cache(self._check.first_capacity())
            interface = self._check.interface
            assert interface is not None  # else there was a reason against it
        try:
            parts = split(model, interface)
            self._shapes = interface.shapes
            self._around = Weights.of(model, parts.names)
            weights = [Weights.of(layer) for layer in parts.layers]
            with torch.no_grad(), fast_forms(model, device), collector_paused():
                self._runs, self._plan = _compiled(parts, self._around, weights, backend, notify)
        except SplitError as error:
            raise ValueError(f"{self._name} cannot be compiled layer by layer: {error}") from error
        self._layers = [
            _Layer(kind, slots, own.tensors) for (kind, slots), own in zip(self._plan.layers, weights, strict=True)
        ]

        kinds = range(1 + max(kind for kind, _ in self._plan.layers))
        self._steps = {step: [self._runs[f"layer{kind}-{step}"] for kind in kinds] for step in ("prefill", "decode")}
        size, dtype = self._plan.hidden
        self._no_rows = torch.zeros(1, 0, size, dtype=getattr(torch, dtype), device=device)

    @property
    def graphs(self) -> int:
        """How many graphs there are."""
        return len(self._runs)

    @property
    def op_calls(self) -> dict[str, int]:
        """Calls of ``torch.ops.exllama`` in a forward of "prefill" and of "decode"."""
        calls = self._plan.op_calls
        return {
            step: calls["around"] + sum(calls[f"layer{kind}-{step}"] for kind, _ in self._plan.layers)
            for step in ("prefill", "decode")
        }

    def new_cache(self, capacity: int) -> KeysAndValues:
        """Memory for the keys and values of one sequence of at most ``capacity`` tokens.

        Raises:
            ValueError: the model computes something else with so large a cache.
        """
        if capacity > self._checked:
            self._check_cache(capacity)
        return KeysAndValues(self._shapes, capacity)

    def _check_cache(self, capacity: int) -> None:
        if self._check is not None and (reason := self._check.reason_against_static(capacity)):
            raise ValueError(f"{self._name} cannot be compiled layer by layer: {reason}")
        self._checked = capacity

    def __call__(self, ids: Tensor, cache: KeysAndValues) -> Tensor:
        """Append tokens to a sequence: the logits (vocabulary,) of the token after them.

        Args:
            ids: (1, tokens) int64, at least one token.
            cache: the sequence so far. It must have room for the tokens.

        Raises:
            ValueError: it has not.
        """
        tokens = ids.shape[1]
        end = cache.length + tokens
        if tokens < 1 or end > cache.capacity:
            raise ValueError(
                f"LayeredForward: ids must have 1 token or more, and the cache room for them; got {tokens} tokens, and "
                f"{cache.length} of {cache.capacity} positions are used"
            )
        steps = self._steps["decode" if tokens == 1 else "prefill"]
        around, start = self._runs["around"], cache.start
        keys_and_values = cache.views(cache.cut(end))
        slots = around([ids, start, *keys_and_values[0], self._no_rows, *self._around.tensors])
        hidden = slots[0]
        for layer, pair in zip(self._layers, keys_and_values, strict=True):
            (hidden,) = steps[layer.kind](
                [hidden, start, *pair, *(slots[slot] for slot in layer.slots), *layer.weights]
            )
        *_, logits = around([ids[:, :0], start, *keys_and_values[0], hidden[:, -1:], *self._around.tensors])
        cache.advance(tokens)
        return logits[0]


def _compiled(
    parts: Split, around: Weights, weights: Sequence[Weights], backend: Backend, notify: Notify
) -> tuple[dict[str, Run], Plan]:
    if backend not in _INDUCTOR:
        notify("tracing the model")
        graphs, plan = layer_graphs.trace(parts, around, weights, fuse=False)
        return {name: _run_by(backend, graph.program) for name, graph in graphs.items()}, plan
    model, versions = _model_text(parts, backend), _versions(parts.model)
    entry = packages.find(model, versions, notify)
    if entry is None:
        notify("tracing the model")
        graphs, plan = layer_graphs.trace(parts, around, weights, fuse=_INDUCTOR[str(backend)])
        entry = packages.make(model, versions, graphs, plan._asdict(), notify)
    return dict(entry.runs), Plan(**entry.notes)


def _model_text(parts: Split, backend: Backend) -> str:
    """All that the graphs depend on, but for versions: the same text means the same graphs."""
    model: Any = parts.model
    described = {
        "config": config_text(model.config),
        "around": description(parts.model, parts.names),
        "layers": [description(layer) for layer in parts.layers],
        "in_tuple": parts.in_tuple,
        "cache": [str(shape) for shape in parts.cache.shapes],
        "argument": parts.cache.argument,
        "backend": backend,
        "options": layer_graphs.options(),
    }
    return json.dumps(described)


def _versions(model: nn.Module) -> dict[str, str]:
    import transformers

    sources = {inspect.getsourcefile(type(part)) for part in model.modules() if not _is_torch(part)}
    return {
        **packages.versions(),
        "transformers": transformers.__version__,
        "model sources": packages.files_digest(Path(source) for source in sources if source),
    }


def _is_torch(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "torch"


def _run_by(backend: Backend, program: ExportedProgram) -> Run:
    graph = program.module(check_guards=False)
    inputs = list(program.example_inputs[0])
    compiled = torch._dynamo.lookup_backend(backend)(graph, inputs)
    return lambda tensors: list(compiled(*tensors))
