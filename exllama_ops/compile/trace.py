"""What an export graph proves of a model's quantized layers: who shares an input, whose input is whose output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from exllama_ops.layout.weight import Weight
from exllama_ops.nn import ExllamaLinear

_GEMMS = (torch.ops.exllama.gptq_gemm.default, torch.ops.exllama.gptq_gemm.no_autograd)

_aten = torch.ops.aten
# The result has the elements of the first argument in their order.
_SAME_ELEMENTS = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.alias.default,
)
# Looks at dtype and device alone.
_NO_USE = (_aten._assert_tensor_metadata.default,)


class UnprovenError(Exception):
    """Why something does not follow from the graph; the text is for the report of `freeze`."""


@dataclass(frozen=True)
class Call:
    """The one call of a layer.

    Args:
        layer: the name of the layer.
        gemm: its product in the graph.
        order: of the calls of all layers.
        given: the tensor that it is called with.
    """

    layer: str
    gemm: Node
    order: int
    given: Tensor

    @property
    def x(self) -> Hashable:
        """Equal for layers of as many features that take the same values, in one tensor or in several."""
        return _values(self.gemm.args[0])


@dataclass
class _Cone:
    """The nodes from the outputs of producers to the input of a layer, as far as they have its columns."""

    nodes: set[Node] = field(default_factory=set)
    producers: list[str] = field(default_factory=list)
    inputs: set[str] = field(default_factory=set)


class Trace:
    """The graph of a model's forward on example inputs, by a non-strict `torch.export.export`, made functional.

    Args:
        model: in any mode.
        args: positional arguments of an example.
        kwargs: keyword arguments of it.

    Raises:
        Exception: whatever torch.export raises for a model that it cannot trace.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, ExllamaLinear)}
        with torch.no_grad(), _inputs(layers) as given:
            exported = torch.export.export(model, args, dict(kwargs), strict=False).run_decompositions({})
        signature = exported.graph_signature
        self._names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        gemms: dict[int, list[Node]] = {id(layer.qweight): [] for layer in layers.values()}
        order = {}
        for number, node in enumerate(exported.graph.nodes):
            if node.op == "call_function" and node.target in _GEMMS:
                order[node] = number
                qweight = signature.inputs_to_buffers.get(_qweight_of(node).name)
                if qweight is not None:
                    gemms.setdefault(id(model.get_buffer(qweight)), []).append(node)
        owners = Counter(id(layer.qweight) for layer in layers.values())
        self.calls: dict[str, Call] = {}
        self.reasons: dict[str, str] = {}
        for name, layer in layers.items():
            nodes = gemms[id(layer.qweight)]
            reason = _reason_against(layer, nodes, owners[id(layer.qweight)])
            if reason is None and name not in given:
                reason = "the example calls its forward, and not the module"
            if reason:
                self.reasons[name] = reason
            else:
                self.calls[name] = Call(name, nodes[0], order[nodes[0]], given[name])
        self._layer_of = {call.gemm: call.layer for call in self.calls.values()}

    def producers(self, layer: str, features: int) -> list[str]:
        """The layers whose outputs become a layer's input, column by column, and are used for nothing else.

        Args:
            layer: its name, a key of `calls`.
            features: K of the layer.

        Raises:
            UnprovenError: it does not follow.
        """
        call = self.calls[layer]
        cone = _Cone()
        self._collect(call.gemm.args[0], features, cone)
        alien = cone.inputs - {f"{producer}.bias" for producer in cone.producers}
        if alien:
            raise UnprovenError(f"{', '.join(sorted(alien))} enters its input")
        for node in cone.nodes:
            other = {user for user in node.users if user.target not in _NO_USE} - cone.nodes - {call.gemm}
            if other:
                raise UnprovenError(f"what becomes its input is used by {self._described(other)} too")
        return cone.producers

    def _collect(self, value: Any, features: int, cone: _Cone) -> None:
        if not isinstance(value, Node) or value in cone.nodes:
            return
        tensor = value.meta.get("val")
        if isinstance(tensor, Tensor) and (tensor.dim() == 0 or tensor.shape[-1] == 1):
            return  # the same for every column
        if not isinstance(tensor, Tensor) or tensor.shape[-1] != features:
            raise UnprovenError(f"its input is made of other columns, from {self._described([value])}")
        cone.nodes.add(value)
        if value in self._layer_of:
            cone.producers.append(self._layer_of[value])
        elif value.op == "placeholder":
            cone.inputs.add(self._name(value))
        elif value.op == "call_function" and _is_element_wise(value.target):
            for argument in value.all_input_nodes:
                self._collect(argument, features, cone)
        else:
            raise UnprovenError(f"its input is made by {self._described([value])}")

    def _name(self, placeholder: Node) -> str:
        name: str = self._names.get(placeholder.name, placeholder.name)
        return name

    def _described(self, nodes: Iterable[Node]) -> str:
        """By what a user knows: names of aten's ops are another matter, and differ between versions of torch."""
        return ", ".join(sorted({self._name(node) if node.op == "placeholder" else _module_of(node) for node in nodes}))


@contextmanager
def _inputs(layers: Mapping[str, ExllamaLinear]) -> Iterator[dict[str, Tensor]]:
    """Collects what each layer was given in its last call while a forward is traced."""
    given: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        given[name] = args[0] if args else kwargs["x"]

    hooks = [layer.register_forward_pre_hook(partial(keep, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def _reason_against(layer: ExllamaLinear, calls: list[Node], owners: int) -> str | None:
    if type(layer) is not ExllamaLinear:
        return f"it is a {type(layer).__name__}, which may compute something else"
    parameters = ", ".join(name for name, _ in layer.named_parameters())
    if parameters:
        return f"it has a parameter: {parameters}"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "it has hooks"
    if len(calls) != 1:
        return f"the example calls it {len(calls)} times"
    if owners > 1 or len(_qweight_of(calls[0]).users) > 1:
        return "its weight is used outside of it too"
    return None


def _qweight_of(gemm: Node) -> Node:
    _, *weight = gemm.args
    qweight: Any = Weight.of(*weight, **gemm.kwargs).qweight  # type: ignore[arg-type]  # nodes in place of tensors
    assert isinstance(qweight, Node)
    return qweight


def _values(value: Any) -> Hashable:
    """A key of the values of a node, equal for copies and reshaped views of the same node."""
    if isinstance(value, Node) and value.target in _SAME_ELEMENTS:
        return _values(value.args[0])
    if isinstance(value, Node) and value.target is _aten._to_copy.default:
        return _values(value.args[0]), tuple(sorted((name, str(to)) for name, to in value.kwargs.items()))
    key: Hashable = value
    return key


def _module_of(node: Node) -> str:
    """The module in whose forward a node was traced."""
    if node.op == "output":
        return "the output"
    stack = node.meta.get("nn_module_stack")
    name = next(reversed(stack.values()))[0] if stack else ""
    return name or "the model itself"


def _is_element_wise(target: Any) -> bool:
    known = (*_SAME_ELEMENTS, _aten._to_copy.default)
    return target in known or torch.Tag.pointwise in getattr(target, "tags", ())
