"""The graphs of a model that is compiled layer by layer: head, decoder layers, tail, as torch.export traces them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from exllama_ops.compile.packages import Graph
from exllama_ops.integrations.layers import Call, Split, SplitError, Weights, description
from exllama_ops.integrations.static_cache import KeysAndValues, OneLayerCache

# Sizes to trace with. They differ from one another, and from 0 and 1, which torch takes for constants.
_TOKENS, _LENGTH = 5, 192
# More would be as long to compile as the whole forward.
_MOST_KINDS = 8
_LONGEST_REASON = 200
# Headers that are compiled once are worth their time from ten graphs on.
_ALWAYS = {"size_asserts": False, "aot_inductor.precompile_headers": False}
# A graph that runs once for a prompt or a token: what calls its kernels need not be fast.
_ONCE = {"aot_inductor.compile_wrapper_opt_level": "O0"}
# Decoding computes some thousand numbers between two products: threads that are woken for them cost more than they
# give, and then spin on the cores that the products want.
_DECODE = {**_ALWAYS, "cpp.threads": 1}


class Plan(NamedTuple):
    """How the graphs make a forward; a JSON value.

    Args:
        layers: for each layer its kind, and which results of the head it takes beside the first, the hidden state.
        op_calls: calls of ``torch.ops.exllama`` in each graph, by its name.
    """

    layers: list[tuple[int, list[int]]]
    op_calls: dict[str, int]


def options() -> dict[str, dict[str, Any]]:
    """Inductor's options for each sort of graph.

    The code of prompts reads the number of threads when it runs. What it is cut for is all cores, not that number.
    """
    return {
        "head": {**_DECODE, **_ONCE},
        "prefill": {**_ALWAYS, **_ONCE, "cpp.dynamic_threads": True, "cpp.threads": os.cpu_count() or 1},
        "decode": _DECODE,
        "tail": {**_DECODE, **_ONCE},
    }


def trace(parts: Split, around: Weights, weights: Sequence[Weights], *, fuse: bool) -> tuple[dict[str, Graph], Plan]:
    """Export the graphs of a model.

    Args:
        parts: the model.
        around: the weights around the layers.
        weights: those of each layer.
        fuse: whether products of one x become one op.

    Raises:
        SplitError: they cannot be exported, whatever in the model is the reason.
    """
    try:
        tracer = _Tracer(parts, around, weights)
        programs = tracer.programs()
    except SplitError:
        raise
    except Exception as error:  # of the model's code, and of torch.export, which share no base class
        raise SplitError(f"torch.export says: {' '.join(str(error).split())[:_LONGEST_REASON]}") from error
    chosen = options()
    graphs = {
        name: Graph(program, chosen[name.rpartition("-")[2]], fuse, title)
        for name, (program, title) in programs.items()
    }
    return graphs, Plan(tracer.layers, {name: _op_calls(program) for name, (program, _) in programs.items()})


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

    def programs(self) -> dict[str, tuple[ExportedProgram, str]]:
        """All graphs by name, each with what people read of it."""
        programs = {"head": (self.head, "embedding and masks")}
        for kind in range(len(self.kinds)):
            of = f" {kind + 1} of {len(self.kinds)}" if len(self.kinds) > 1 else ""
            programs[f"layer{kind}-prefill"] = (self.layer(kind, _TOKENS), f"decoder layer{of}, prefill")
            programs[f"layer{kind}-decode"] = (self.layer(kind, 1), f"decoder layer{of}, decode")
        return {**programs, "tail": (self.tail(), "last norm and output layer")}

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
