"""`LayeredForward`: a transformers forward whose decoder layer is compiled once and serves all layers."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from exllama_ops.compile import packages
from exllama_ops.compile.packages import Graph, Run
from exllama_ops.integrations.cpu_forms import fast_forms
from exllama_ops.integrations.layers import Call, Split, SplitError, Weights, description, split
from exllama_ops.integrations.static_cache import CacheInterface, KeysAndValues, OneLayerCache, cache_interface
from exllama_ops.progress import Notify, ignore

Backend = str | Callable[..., Any]

# Sizes to trace with. They differ from one another, and from 0 and 1, which torch takes for constants.
_TOKENS, _LENGTH = 5, 192
# More would be as long to compile as the whole forward.
_MOST_KINDS = 8
_LONGEST_REASON = 200
# Backends whose graphs AOTInductor compiles, and whether ours passes over them first.
_INDUCTOR = {"inductor": False, "exllama": True}
# Decoding computes some thousand numbers between two products: threads that are woken for them cost more than they
# give, and then spin on the cores that the products want.
_ONE_THREAD = {"cpp.threads": 1}
# Headers that are compiled once are worth their time from ten graphs on.
_OPTIONS = {"size_asserts": False, "aot_inductor.precompile_headers": False}
# A graph that runs once for a prompt or a token: what calls its kernels need not be fast.
_ONCE = {"aot_inductor.compile_wrapper_opt_level": "O0"}


class _Plan(NamedTuple):
    """How the graphs make a forward; a JSON value.

    Args:
        layers: for each layer its kind, and which results of the head it takes beside the first, the hidden state.
        op_calls: calls of ``torch.ops.exllama`` in each graph, by its name.
    """

    layers: list[tuple[int, list[int]]]
    op_calls: dict[str, int]


class _Layer(NamedTuple):
    kind: int
    slots: list[int]
    weights: list[Tensor]


class LayeredForward:
    """The forward of a transformers causal LM in a few small graphs, however many layers it has.

    There are a head (embedding, masks, rotary tables), for each kind of decoder layer one graph for prompts and one for
    single tokens, and a tail (last norm, output layer). With Inductor behind it they are AOTInductor packages
    that the cache folder keeps: a later process loads them, and traces nothing.

    The weights are those that the model has now. What is written into them later is seen; tensors that take their
    place are not.

    Args:
        model: a transformers causal LM in eval mode whose layers have full or sliding-window attention; its Linear
            layers may be quantized or dense.
        backend: "exllama" or "inductor". Another backend of torch.compile serves tests; its graphs are not kept.
        notify: takes the steps.

    Raises:
        ValueError: the model cannot be split into layers, and the text says why.
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
        interface = cache_interface(model, device) if interface is None else interface
        try:
            parts = split(model, interface)
            self._shapes = interface.shapes
            self._around = Weights.of(model, parts.names)
            weights = [Weights.of(layer) for layer in parts.layers]
            with torch.no_grad(), fast_forms(model, device):
                self._runs, self._plan = _compiled(parts, self._around, weights, backend, notify)
        except SplitError as error:
            raise ValueError(f"{type(model).__name__} cannot be compiled layer by layer: {error}") from error
        self._layers = [
            _Layer(kind, slots, own.tensors) for (kind, slots), own in zip(self._plan.layers, weights, strict=True)
        ]

    @property
    def graphs(self) -> int:
        """How many graphs there are."""
        return len(self._runs)

    @property
    def op_calls(self) -> dict[str, int]:
        """Calls of ``torch.ops.exllama`` in a forward of "prefill" and of "decode"."""
        calls = self._plan.op_calls
        return {
            step: calls["head"] + calls["tail"] + sum(calls[f"layer{kind}-{step}"] for kind, _ in self._plan.layers)
            for step in ("prefill", "decode")
        }

    def new_cache(self, capacity: int) -> KeysAndValues:
        """Memory for the keys and values of one sequence of at most ``capacity`` tokens."""
        return KeysAndValues(self._shapes, capacity)

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
        step = "decode" if tokens == 1 else "prefill"
        runs, start = self._runs, cache.start
        keys_and_values = cache.views(cache.cut(end))
        slots = runs["head"]([ids, start, *keys_and_values[0], *self._around.tensors])
        hidden = slots[0]
        steps = [runs[f"layer{kind}-{step}"] for kind in range(1 + max(layer.kind for layer in self._layers))]
        for layer, pair in zip(self._layers, keys_and_values, strict=True):
            (hidden,) = steps[layer.kind](
                [hidden, start, *pair, *(slots[slot] for slot in layer.slots), *layer.weights]
            )
        cache.advance(tokens)
        logits: Tensor = runs["tail"]([hidden[:, -1:], *self._around.tensors])[0]
        return logits


def _compiled(
    parts: Split, around: Weights, weights: Sequence[Weights], backend: Backend, notify: Notify
) -> tuple[dict[str, Run], _Plan]:
    if backend not in _INDUCTOR:
        graphs, plan = _traced(parts, around, weights, fuse=False, notify=notify)
        return {name: _run_by(backend, graph.program) for name, graph in graphs.items()}, plan
    model, versions = _model_text(parts, backend), _versions(parts.model)
    entry = packages.find(model, versions, notify)
    if entry is None:
        graphs, plan = _traced(parts, around, weights, fuse=_INDUCTOR[str(backend)], notify=notify)
        entry = packages.make(model, versions, graphs, plan._asdict(), notify)
    return dict(entry.runs), _Plan(**entry.notes)


def _model_text(parts: Split, backend: Backend) -> str:
    """All that the graphs depend on, but for versions: the same text means the same graphs."""
    model: Any = parts.model
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    described = {
        "config": json.dumps(config, sort_keys=True, default=str),
        "attention": getattr(model.config, "_attn_implementation", None),
        "around": description(parts.model, parts.names),
        "layers": [description(layer) for layer in parts.layers],
        "in_tuple": parts.in_tuple,
        "cache": [str(shape) for shape in parts.cache.shapes],
        "argument": parts.cache.argument,
        "backend": backend,
        "options": {**_OPTIONS, "prefill": _prefill_options()},
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


def _prefill_options() -> dict[str, Any]:
    """The code reads the number of threads when it runs. What it is cut for is all cores, not the present number."""
    return {"cpp.dynamic_threads": True, "cpp.threads": os.cpu_count() or 1, **_ONCE}


def _traced(
    parts: Split, around: Weights, weights: Sequence[Weights], *, fuse: bool, notify: Notify
) -> tuple[dict[str, Graph], _Plan]:
    """Export the graphs.

    Raises:
        SplitError: they cannot be exported, by whatever in the model.
    """
    notify("tracing the model")
    try:
        programs, tracer = _exported(parts, around, weights)
    except SplitError:
        raise
    except Exception as error:  # of the model's code, and of torch.export, which share no base class
        raise SplitError(f"torch.export says: {' '.join(str(error).split())[:_LONGEST_REASON]}") from error
    op_calls = {name: _op_calls(program) for name, (program, _, _) in programs.items()}
    graphs = {
        name: Graph(program, {**_OPTIONS, **options}, fuse, title)
        for name, (program, options, title) in programs.items()
    }
    return graphs, _Plan(tracer.layers, op_calls)


def _exported(
    parts: Split, around: Weights, weights: Sequence[Weights]
) -> tuple[dict[str, tuple[ExportedProgram, dict[str, Any], str]], _Tracer]:
    """The graphs with Inductor's options and their titles."""
    tracer = _Tracer(parts, around, weights)
    prefill = _prefill_options()
    programs: dict[str, tuple[ExportedProgram, dict[str, Any], str]] = {}
    programs["head"] = (tracer.head, {**_ONE_THREAD, **_ONCE}, "embedding and masks")
    for kind in range(len(tracer.kinds)):
        of = f" {kind + 1} of {len(tracer.kinds)}" if len(tracer.kinds) > 1 else ""
        programs[f"layer{kind}-prefill"] = (tracer.layer(kind, _TOKENS), prefill, f"decoder layer{of}, prefill")
        programs[f"layer{kind}-decode"] = (tracer.layer(kind, 1), _ONE_THREAD, f"decoder layer{of}, decode")
    programs["tail"] = (tracer.tail(), {**_ONE_THREAD, **_ONCE}, "last norm and output layer")
    return programs, tracer


class _Function(nn.Module):
    """A function of tensors as a module, which torch.export wants. What the function closes over is no part of it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self._function(*tensors)
        return result


class _Tracer:
    """Exports the graphs of a model: the head first, since its results are what the layers take.

    Attributes:
        layers: for each layer its kind, and which results of the head it takes.
        kinds: for each kind the number of its first layer.
    """

    def __init__(self, parts: Split, around: Weights, weights: Sequence[Weights]) -> None:
        self._parts, self._around, self._weights = parts, around, weights
        self._dims = {"tokens": Dim("tokens", min=2), "length": Dim("length", min=2)}
        self._cache = KeysAndValues(parts.cache.shapes, _LENGTH)
        self._calls: list[Call] = []
        self._slots: list[list[int]] = []
        around_dims: list[dict[int, str]] = [{} for _ in around.tensors]
        self.head = self._exported(
            self._head, self._head_inputs(_TOKENS), ({1: "tokens"}, {}, {2: "length"}, {2: "length"}, *around_dims)
        )
        self._slot_dims = _varying_sizes(self.head)
        self.layers, self.kinds = self._sorted_layers()

    def layer(self, kind: int, tokens: int) -> ExportedProgram:
        """(hidden, start, keys, values, what it takes of the head, weights) -> (hidden,)."""
        index = self.kinds[kind]
        call, own = self._calls[index], self._weights[index]
        given = self.head.module(check_guards=False)(*self._head_inputs(tokens))
        slots = self._slots[index]
        taken, count = [given[slot] for slot in slots], len(slots)

        def function(hidden: Tensor, start: Tensor, keys: Tensor, values: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            cache = OneLayerCache(keys, values, start, len(self._weights))
            return (self._parts.layer(index, call, hidden, rest[:count], cache, own.named(rest[count:])),)

        dims = [self._slot_dims[0], {}, {2: "length"}, {2: "length"}]
        dims += [self._slot_dims[slot] for slot in slots] + [{} for _ in own.tensors]
        if tokens == 1:
            dims = [{axis: name for axis, name in sizes.items() if name != "tokens"} for sizes in dims]
        inputs = (given[0], self._cache.start, *self._cache.views(_LENGTH)[index], *taken, *own.tensors)
        return self._exported(function, inputs, dims)

    def tail(self) -> ExportedProgram:
        """(hidden (1, 1, hidden_size), weights around the layers) -> (logits (vocabulary,),)."""
        given = self.head.module(check_guards=False)(*self._head_inputs(1))

        def function(hidden: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            return (self._parts.tail(hidden, self._around.named(rest)),)

        inputs = (given[0], *self._around.tensors)
        return self._exported(function, inputs, [{} for _ in inputs])

    def _head_inputs(self, tokens: int) -> tuple[Tensor, ...]:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=self._cache.start.device)
        return (ids, self._cache.start, *self._cache.views(_LENGTH)[0], *self._around.tensors)

    def _head(self, ids: Tensor, start: Tensor, keys: Tensor, values: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        cache = OneLayerCache(keys, values, start, len(self._weights))
        hidden, self._calls = self._parts.head(ids, cache, self._around.named(rest))
        results, places = [hidden], {id(hidden): 0}
        self._slots = []
        for call in self._calls:
            for tensor in call.tensors:
                if id(tensor) not in places:
                    places[id(tensor)] = len(results)
                    results.append(tensor)
            self._slots.append([places[id(tensor)] for tensor in call.tensors])
        return tuple(results)

    def _sorted_layers(self) -> tuple[list[tuple[int, list[int]]], list[int]]:
        layers, kinds = [], list[int]()
        known: dict[Any, int] = {}
        for index, (layer, call, slots) in enumerate(zip(self._parts.layers, self._calls, self._slots, strict=True)):
            sizes = [sorted(self._slot_dims[slot].items()) for slot in slots]
            key = (description(layer), str(call.spec), str(call.leaves), str(sizes), self._parts.in_tuple[index])
            if key not in known:
                known[key] = len(kinds)
                kinds.append(index)
            layers.append((known[key], slots))
        if len(kinds) > _MOST_KINDS:
            raise SplitError(
                f"its {len(layers)} layers are of {len(kinds)} kinds, and must be of {_MOST_KINDS} at most"
            )
        return layers, kinds

    def _exported(
        self, function: Callable[..., Any], inputs: Sequence[Tensor], sizes: Sequence[dict[int, str]]
    ) -> ExportedProgram:
        dims = tuple({axis: self._dims[name] for axis, name in varying.items()} for varying in sizes)
        program = torch.export.export(_Function(function), tuple(inputs), dynamic_shapes=(dims,), strict=False)
        # A forward computes more than what its head or its tail gives. Checks of dtypes would keep all of it.
        for check in program.graph.find_nodes(
            op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
        ):
            program.graph.erase_node(check)
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
        return program


def _varying_sizes(head: ExportedProgram) -> list[dict[int, str]]:
    """The axes of each result of the head whose size is that of the tokens or of the cache, by its name.

    Raises:
        SplitError: a size is computed from one of them.
    """
    nodes = {node.name: node.meta.get("val") for node in head.graph.nodes}
    ids, _, keys, *_ = (nodes[name] for name in head.graph_signature.user_inputs)
    names = {ids.shape[1].node.expr: "tokens", keys.shape[2].node.expr: "length"}
    varying = []
    for output in head.graph_signature.user_outputs:
        sizes = {axis: size for axis, size in enumerate(nodes[output].shape) if not isinstance(size, int)}
        if unknown := [str(size) for size in sizes.values() if size.node.expr not in names]:
            raise SplitError(f"a layer takes a tensor with a size of {', '.join(unknown)}")
        varying.append({axis: names[size.node.expr] for axis, size in sizes.items()})
    return varying


def _op_calls(program: ExportedProgram) -> int:
    return sum(str(node.target).startswith("exllama.") for node in program.graph.nodes)


def _run_by(backend: Backend, program: ExportedProgram) -> Run:
    graph = program.module(check_guards=False)
    inputs = list(program.example_inputs[0])
    compiled = torch._dynamo.lookup_backend(backend)(graph, inputs)
    return lambda tensors: list(compiled(*tensors))
