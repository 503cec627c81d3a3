"""The graph pass that turns products of the same activations into one `gptq_gemm_multi`."""

from __future__ import annotations

import inspect
import logging
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.node import map_arg

from exllama_ops import backends, ops
from exllama_ops.layout.weight import Weight
from exllama_ops.ops import gptq_gemm

_log = logging.getLogger(__name__)

# The pass, and the ops: what their fakes and gradients were is in cached graphs, by whose keys they are only names.
_SOURCES = (__file__, *(str(path) for path in sorted(Path(ops.__file__).parent.glob("*.py"))))

# What stands between the input of a block and the x of its projections, and what autocast puts there.
_RESHAPES_AND_CASTS = frozenset(
    ("reshape", "view", "flatten", "contiguous", "to", "_to_copy", "type", "float", "half", "bfloat16")
)
# Where Dynamo and export have the fake tensor of a node.
_VALUES = ("example_value", "val")
_WRITING_OPERATORS = frozenset(
    (
        operator.iadd, operator.iand, operator.iconcat, operator.ifloordiv, operator.ilshift, operator.imatmul,
        operator.imod, operator.imul, operator.ior, operator.ipow, operator.irshift, operator.isub, operator.itruediv,
        operator.ixor, operator.setitem, operator.delitem,
    )
)  # fmt: skip


class FuseSharedInput(CustomGraphPass):
    """Turn calls of `gptq_gemm` on the same x into one call of `gptq_gemm_multi` and a split of its columns.

    The calls must agree in their options and number of groups, and take the same g_idx node or none. Nothing between
    them may write to a tensor, since no call moves across a write. x is the same if it is the same node, or the
    same reshapes and casts of one. Weights are arguments before and after. The pass reads no values, so one graph
    serves all layers that Dynamo gives it, and weights that are loaded later.

    The backend "exllama" runs it; on its own it is a pass for ``torch._inductor.config.pre_grad_custom_pass``, or for
    any graph with ``example_value`` or ``val`` in the meta of its nodes. What it did is logged under
    ``TORCH_LOGS="+exllama_ops"``.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for calls in _calls_that_agree(graph):
            if len(calls) > 1:
                _fuse(graph, calls)

    def uuid(self) -> bytes:
        """What a compiled graph depends on beside the graph, for the keys of Inductor's caches."""
        served = {key: _serves_multi(key) for key in backends.PRIORITY}
        return get_hash_for_files(_SOURCES, extra=repr(served))


@dataclass(frozen=True)
class _Call:
    """A gptq_gemm in a graph; x and the tensors of the weight are nodes of it."""

    node: fx.Node
    x: fx.Node
    weight: Weight

    @classmethod
    def of(cls, node: fx.Node) -> _Call:
        x, *weight = inspect.signature(gptq_gemm).bind(*node.args, **node.kwargs).args
        return cls(node, x, Weight.of(*weight))

    @property
    def own_tensors(self) -> tuple[Any, ...]:
        """The nodes of the tensors that gptq_gemm_multi takes of each part."""
        return self.weight.qweight, self.weight.qzeros, self.weight.scales

    def reason_against(self) -> str | None:
        """Why the call cannot be one of several."""
        x, *tensors = map(_value_of, (self.x, *self.weight.tensors))
        if x is None or any(tensor is None for tensor in tensors):
            return "the graph does not say the shapes of its arguments"
        if not all(isinstance(size, int) for tensor in tensors for size in tensor.shape):
            return "the sizes of the weight are symbols"
        if not _serves_multi(x.device.type.upper()):
            return f"the kernel of gptq_gemm on {x.device.type} has no gptq_gemm_multi beside it"
        return None

    def row_order(self) -> Hashable:
        """What calls with the same order of rows have in common: the node, or that there is no order."""
        row_order: Any = self.weight.row_order
        return row_order if _value_of(row_order).shape[0] else None


def _value_of(node: object) -> Any:
    """The fake tensor of a node."""
    if not isinstance(node, fx.Node):
        return None
    value = next((node.meta[name] for name in _VALUES if name in node.meta), None)
    return value if isinstance(value, Tensor) else None


def _serves_multi(dispatch_key: str) -> bool:
    """Whether gptq_gemm_multi is as fast as the calls that it would replace, being of the same backend."""
    if dispatch_key not in backends.PRIORITY:
        return False
    return backends.serving("gptq_gemm_multi", dispatch_key) is backends.serving("gptq_gemm", dispatch_key)


def _calls_that_agree(graph: fx.Graph) -> list[list[_Call]]:
    groups: dict[Hashable, list[_Call]] = {}
    # Since the last write: a reshape or cast -> the first one that computed the same, and that one by what it is.
    same_as: dict[fx.Node, fx.Node] = {}
    known: dict[Hashable, fx.Node] = {}
    writes = 0
    for node in graph.nodes:
        if _is_gptq_gemm(node):
            call = _Call.of(node)
            reason = call.reason_against()
            if reason is not None:
                _log.debug("%s stays alone: %s", node, reason)
                continue
            groups_of_each = _value_of(call.weight.scales).shape[0]
            key = (writes, same_as.get(call.x, call.x), call.row_order(), call.weight.options, groups_of_each)
            groups.setdefault(key, []).append(call)
        elif _may_write(node):
            writes += 1
            same_as.clear()
            known.clear()
        elif _name_of(node) in _RESHAPES_AND_CASTS:
            arguments = map_arg((node.args, node.kwargs), lambda arg: same_as.get(arg, arg))
            same_as[node] = known.setdefault((node.op, node.target, repr(arguments)), node)
    return list(groups.values())


def _is_gptq_gemm(node: fx.Node) -> bool:
    packet = torch.ops.exllama.gptq_gemm
    return node.op == "call_function" and node.target in (packet, packet.default)


def _name_of(node: fx.Node) -> str:
    """The name of the op or method of a node, whatever calls it."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.partition("::")[2]
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _may_write(node: fx.Node) -> bool:
    """Whether a node may write to a tensor that is there already; True for everything that is not known."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if "out" in node.kwargs:
        return True
    name, target = _name_of(node), node.target
    if node.op == "call_method":
        return (name.endswith("_") and not name.startswith("__")) or name.startswith("__i") or name == "__setitem__"
    if node.op != "call_function":
        return True
    if isinstance(target, OpOverload):
        return target._schema.is_mutable
    if isinstance(target, OpOverloadPacket):
        return any(getattr(target, overload)._schema.is_mutable for overload in target.overloads())
    if target in _WRITING_OPERATORS:
        return True
    if getattr(target, "__module__", None) in ("_operator", "builtins", "math"):
        return False
    if any(getattr(home, name, None) is target for home in (torch, torch.nn.functional, torch._C._nn)):
        return name.endswith("_") or _is_in_place(node)
    return True


def _is_in_place(node: fx.Node) -> bool:
    """Whether a function of torch.nn.functional is asked to overwrite its input."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a function in C, which has no such argument
        return False
    return bool(bound.arguments.get("inplace", False))


def _fuse(graph: fx.Graph, calls: Sequence[_Call]) -> None:
    """Put one call where the first of several stands."""
    first = calls[0].node
    together = [call for call in calls if _can_stand_before(call, first)]
    if len(together) < 2:
        return
    x, shared = calls[0].x, calls[0].weight
    columns = [_value_of(call.weight.qweight).shape[1] for call in together]
    lists = [list(tensors) for tensors in zip(*(call.own_tensors for call in together), strict=True)]
    with graph.inserting_before(first):
        arguments: Any = (x, *lists, shared.row_order, *shared.options)
        multi = graph.call_function(torch.ops.exllama.gptq_gemm_multi, arguments)
        split = graph.call_function(torch.split_with_sizes, (multi, columns, 1))
        # Callers of gptq_gemm may count on a contiguous result. Of one row this is no copy, and of more Inductor makes
        # it part of the kernel that reads the result.
        parts = [
            graph.call_method("contiguous", (graph.call_function(operator.getitem, (split, i)),))
            for i in range(len(together))
        ]
    _describe(multi, split, parts, _value_of(x), together, columns)
    for call, part in zip(together, parts, strict=True):
        call.node.replace_all_uses_with(part)
        graph.erase_node(call.node)
    names = ", ".join(call.node.name for call in together)
    _log.debug("one gptq_gemm_multi of %s columns takes the place of %s", columns, names)


def _can_stand_before(call: _Call, first: fx.Node) -> bool:
    """Whether the weight of a call is there when the first call runs; attributes are brought there."""
    late = [node for node in call.own_tensors if first < node]
    if any(node.op != "get_attr" for node in late):
        _log.debug("%s stays alone: its weight is computed after %s", call.node, first)
        return False
    for node in late:
        first.prepend(node)
    return True


def _describe(
    multi: fx.Node, split: fx.Node, parts: Sequence[fx.Node], x: Tensor, calls: Sequence[_Call], columns: Sequence[int]
) -> None:
    """Meta of the new nodes, for the passes that follow."""
    result = x.new_empty((x.shape[0], sum(columns)))
    column_views = result.split(columns, 1)
    multi.meta, split.meta = _meta(calls[0].node, result), _meta(calls[0].node, column_views)
    for part, call, view in zip(parts, calls, column_views, strict=True):
        part.meta = dict(call.node.meta)
        column_view = part.args[0]
        assert isinstance(column_view, fx.Node)
        column_view.meta = _meta(call.node, view)


def _meta(replaced: fx.Node, value: Tensor | Sequence[Tensor]) -> dict[str, Any]:
    """Meta of a node that comes for another, whose result is another one."""
    return {**replaced.meta, **{name: value for name in _VALUES if name in replaced.meta}}
