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
_TOKENS, _ROWS, _LENGTH = 5, 3, 192
# More would be as long to compile as the whole forward.
_MOST_KINDS = 8
_LONGEST_REASON = 200
# Headers that are compiled once take 7 seconds and save 1.6 for each graph. Most models have 3 graphs.
_ALWAYS = {
    "size_asserts": False,
    "aot_inductor.precompile_headers": False,
    "aot_inductor.enable_line_tables": False,
}
# A graph that runs once for a prompt or a token: what calls its kernels need not be fast.
_ONCE = {"aot_inductor.compile_wrapper_opt_level": "O0"}
# Decoding computes some thousand numbers between two products. Threads that are woken for them cost more than they
# give. Then they spin on the cores that the products want.
_DECODE = {**_ALWAYS, "cpp.threads": 1}


class Plan(NamedTuple):
    """How the graphs make a forward; a JSON value.

    Args:
        layers: for each layer its kind, and which results of the head it takes beside the first, the hidden state.
        hidden: the size of that, and its dtype.
        op_calls: calls of ``torch.ops.exllama`` in each graph, by its name.
    """

    layers: list[tuple[int, list[int]]]
    hidden: tuple[int, str]
    op_calls: dict[str, int]


def options() -> dict[str, dict[str, Any]]:
    """Inductor's options for each sort of graph.

    The code of prompts reads the number of threads when it runs. What it is cut for is all cores, not that number.
    """
    return {
        "around": {**_DECODE, **_ONCE},
        "prefill": {**_ALWAYS, **_ONCE, "cpp.dynamic_threads": True, "cpp.threads": os.cpu_count() or 1},
        "decode": _DECODE,
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
    return graphs, Plan(
        tracer.layers, tracer.hidden, {name: _op_calls(program) for name, (program, _) in programs.items()}
    )


class _Function(nn.Module):
    """A function of tensors as a module, which torch.export wants. What the function closes over is no part of it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self._function(*tensors)
        return result


class _Tracer:
    """Exports the graphs of a model: first the one around the layers, since its results are what the layers take.

    Attributes:
        layers: for each layer its kind, and which results it takes.
        kinds: for each kind the number of its first layer.
        hidden: the size of a hidden state, and its dtype.
    """

    def __init__(self, parts: Split, around: Weights, weights: Sequence[Weights]) -> None:
        self._parts, self._around, self._weights = parts, around, weights
        self._dims = {name: Dim(name, min=2) for name in ("tokens", "rows", "length")}
        self._cache = KeysAndValues(parts.cache.shapes, _LENGTH)
        self._calls: list[Call] = []
        self._slots: list[list[int]] = []
        size, dtype = parts.hidden
        self.hidden = (size, str(dtype).removeprefix("torch."))
        sizes: list[dict[int, str]] = [{1: "tokens"}, {}, {2: "length"}, {2: "length"}, {1: "rows"}]
        sizes += [{} for _ in around.tensors]
        self.around = self._exported(self._function_around, self._inputs_around(_TOKENS, _ROWS), sizes)
        self._slot_dims = _varying_sizes(self.around)
        _check_logits(self.around)
        self._run_around = self.around.module(check_guards=False)
        # A step asks for what comes before the layers or for what comes after them, and gives no tokens or no rows.
        self._results(0, 1)
        self.layers, self.kinds = self._sorted_layers()

    def programs(self) -> dict[str, tuple[ExportedProgram, str]]:
        """All graphs by name, each with what people read of it."""
        programs = {"around": (self.around, "embedding, masks, last norm and output layer")}
        for kind in range(len(self.kinds)):
            of = f" {kind + 1} of {len(self.kinds)}" if len(self.kinds) > 1 else ""
            programs[f"layer{kind}-prefill"] = (self.layer(kind, _TOKENS), f"decoder layer{of}, prefill")
            programs[f"layer{kind}-decode"] = (self.layer(kind, 1), f"decoder layer{of}, decode")
        return programs

    def layer(self, kind: int, tokens: int) -> ExportedProgram:
        """(hidden, start, keys, values, what it takes of the head, weights) -> (hidden,)."""
        index = self.kinds[kind]
        call, own = self._calls[index], self._weights[index]
        given = self._results(tokens, 0)
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

    def _inputs_around(self, tokens: int, rows: int) -> tuple[Tensor, ...]:
        device = self._cache.start.device
        ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        size, dtype = self._parts.hidden
        last = torch.zeros(1, rows, size, dtype=dtype, device=device)
        return (ids, self._cache.start, *self._cache.views(_LENGTH)[0], last, *self._around.tensors)

    def _results(self, tokens: int, rows: int) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = self._run_around(*self._inputs_around(tokens, rows))
        return results

    def _function_around(
        self, ids: Tensor, start: Tensor, keys: Tensor, values: Tensor, last: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        """The first hidden state, what the layers take beside it, and the logits."""
        cache = OneLayerCache(keys, values, start, len(self._weights))
        hidden, self._calls, logits = self._parts.around(ids, cache, last, self._around.named(weights))
        results, places = [hidden], {id(hidden): 0}
        self._slots = []
        for call in self._calls:
            for tensor in call.tensors:
                if id(tensor) not in places:
                    places[id(tensor)] = len(results)
                    results.append(tensor)
            self._slots.append([places[id(tensor)] for tensor in call.tensors])
        return (*results, logits)

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
        # A forward computes more than what is asked for. Checks of dtypes would keep all of it.
        for check in program.graph.find_nodes(
            op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
        ):
            program.graph.erase_node(check)
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
        return program


def _varying_sizes(around: ExportedProgram) -> list[dict[int, str]]:
    """The axes of each result but the logits whose size is that of the tokens or of the cache, by its name.

    Raises:
        SplitError: a size is computed from one of them.
    """
    nodes = {node.name: node.meta.get("val") for node in around.graph.nodes}
    ids, _, keys, *_ = (nodes[name] for name in around.graph_signature.user_inputs)
    names = {ids.shape[1].node.expr: "tokens", keys.shape[2].node.expr: "length"}
    varying = []
    for output in around.graph_signature.user_outputs[:-1]:
        sizes = {axis: size for axis, size in enumerate(nodes[output].shape) if not isinstance(size, int)}
        if unknown := [str(size) for size in sizes.values() if size.node.expr not in names]:
            raise SplitError(f"a layer takes a tensor with a size of {', '.join(unknown)}")
        varying.append({axis: names[size.node.expr] for axis, size in sizes.items()})
    return varying


def _check_logits(around: ExportedProgram) -> None:
    """See that what comes after the layers is computed of hidden states and weights alone.

    Raises:
        SplitError: it is not. A step gives no tokens to what comes after the layers.
    """
    nodes = {node.name: node for node in around.graph.nodes}
    of_tokens = set(around.graph_signature.user_inputs[:4])
    seen, waiting = set(), [nodes[around.graph_signature.user_outputs[-1]]]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        if node.name in of_tokens:
            raise SplitError("what comes after its layers depends on more than what they give")
        seen.add(node)
        waiting.extend(node.all_input_nodes)


def _op_calls(program: ExportedProgram) -> int:
    return sum(str(node.target).startswith("exllama.") for node in program.graph.nodes)
