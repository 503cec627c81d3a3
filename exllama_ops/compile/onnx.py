"""Quantized models as ONNX programs: products as onnxruntime's `MatMulNBits`, or in plain ONNX ops."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from exllama_ops.extras import require
from exllama_ops.layout.groups import row_groups
from exllama_ops.layout.pack import unpack_rows, unpack_zeros
from exllama_ops.layout.weight import Parts, Weight

_gemm = torch.ops.exllama.gptq_gemm.default
_gemm_multi = torch.ops.exllama.gptq_gemm_multi.default
_aten = torch.ops.aten

_MATMUL_NBITS_WIDTHS = (2, 4, 8)
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256  # of MatMulNBits in onnxruntime; only some widths take more
_FLOAT32_PRODUCTS = 1  # its accuracy_level


def onnx_program(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> torch.onnx.ONNXProgram:
    """Export a model whose quantized weights are constants, with `gptq_gemm` and `gptq_gemm_multi` in ONNX's terms.

    Each product becomes ``Cast(MatMulNBits(Cast(x[:, perm], float32), B, scales, zeros), x.dtype)``, domain
    com.microsoft, with weights in that op's layout as initializers; the model and its weights stay as they are:

    * bits: 2, 4 and 8 as they are, 3 in fields of 4; the next width where a v1 zero point is 2**bits.
    * groups: of any multiple of 16 rows, in blocks of the largest power of two that divides it, at most 256. A partial
      last group is padded.
    * activation order: a Gather of x before the product, of x with a column of zeros if the weight is filled.

    MatMulNBits cannot express other group sizes, a raw g_idx, and 8-bit zero points of 256. Such a product is
    ``MatMul(x, (q - zeros[g]) * scales[g])`` in plain ONNX ops, in float32, with a byte for each q in the file.

    Sums are float32, rounded once to the dtype of x, and scales are float32, which holds all of their dtypes exactly.
    x may be float32, float16 or bfloat16. Whether a runtime has the model's other ops in that dtype is up to it
    (onnxruntime's CPU lacks most in bfloat16).

    Args:
        model: called with the example in the mode that it is in; ``.eval()`` first for inference.
        args: positional arguments of an example.
        kwargs: keyword arguments of it.
        dynamic_shapes: as `torch.export.export` takes them.

    Returns:
        The program: ``.save(path)`` writes it, `onnxruntime` runs it.

    Raises:
        ImportError: the extra "onnx" is not installed.
        ValueError: a weight is no constant of the model, or another op of ours is in its graph.
        Exception: what torch.export and torch.onnx.export raise where they cannot trace or translate the model.

    Source: `exllama_ops.reference.gptq_gemm`; MatMulNBits in onnxruntime's docs/ContribOperators.md.
    """
    require("onnxscript", "onnx")
    kwargs = dict(kwargs or {})
    # A translation table sees no data, which only the first export has; the second sees ONNX's layout alone.
    graph = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes).module(check_guards=False)
    assert isinstance(graph, GraphModule)
    _replace_products(graph)
    program = torch.export.export(graph, args, kwargs, dynamic_shapes=dynamic_shapes)
    result = torch.onnx.export(program, dynamo=True, verbose=False)
    assert result is not None
    return result


def _replace_products(module: GraphModule) -> None:
    """Products of ours in an export graph -> modules that ONNX can express; nothing uses the weights of ours then."""
    graph = module.graph
    modules: dict[tuple[Any, ...], str] = {}  # a weight that is used twice is one module
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "exllama":
            continue
        if node.target not in (_gemm, _gemm_multi):
            raise ValueError(f"onnx_program: {node.target} has no form in ONNX; gptq_gemm and gptq_gemm_multi have")
        x, *arguments = _arguments(node)
        multi = node.target is _gemm_multi
        # Their tensors are nodes of the graph.
        weights = Parts.of(*arguments).weights if multi else [Weight.of(*arguments)]
        constant = partial(_constant, module, node)
        products = []
        with graph.inserting_before(node):
            row_order: Any = weights[0].row_order
            if weights[0].shuffled and constant(row_order).numel():
                x = _gathered(graph, x, row_order, weights[0].map(constant))
            for weight in weights:
                key = weight.map(attrgetter("target")).arguments
                if key not in modules:
                    modules[key] = f"exllama_product_{len(modules)}"
                    module.add_submodule(modules[key], _product(weight.map(constant)))
                products.append(graph.call_module(modules[key], (x,)))
            result = graph.call_function(_aten.cat.default, (products, 1)) if multi else products[0]
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    module.recompile()


def _gathered(graph: Graph, x: Any, row_order: Node, weight: Weight) -> Node:
    """The columns of x in the order of the words' rows."""
    if weight.is_filled:
        # -1, which names none, becomes the column of zeros.
        x = graph.call_function(_aten.constant_pad_nd.default, (x, [1, 0]))
        named = graph.call_function(_aten.slice.Tensor, (row_order, 0, 0, weight.K))
        row_order = graph.call_function(_aten.add.Tensor, (named, 1))
    return graph.call_function(_aten.index_select.default, (x, 1, row_order))


def _arguments(node: Node) -> list[Any]:
    """All arguments of a call in the order of the schema, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    rest = node.target._schema.arguments[len(node.args) :]
    return [*node.args, *(node.kwargs.get(argument.name, argument.default_value) for argument in rest)]


def _constant(module: GraphModule, user: Node, node: Node) -> Tensor:
    if node.op != "get_attr":
        raise ValueError(f"onnx_program: {user.target} takes {node.name}, which must be a constant of the model")
    value = attrgetter(str(node.target))(module)
    assert isinstance(value, Tensor)
    return value.detach()


def _product(weight: Weight) -> nn.Module:
    q = unpack_rows(weight.qweight, weight.bits, "shuffled" if weight.shuffled else "checkpoint")
    zeros, scales = unpack_zeros(weight.qzeros, weight.bits, use_v2_format=weight.zero_offset == 0), weight.scales
    K, G, size = weight.K, weight.G, weight.group_size or weight.K // weight.G
    block = min(size & -size, _LARGEST_BLOCK)
    largest = max(2**weight.bits - 1, int(zeros.max()))
    width = next((width for width in _MATMUL_NBITS_WIDTHS if largest < 2**width), None)
    if weight.g_idx is not None or width is None or block < _SMALLEST_BLOCK:
        return _PlainProduct(q, zeros, scales, weight.row_groups())
    blocks = row_groups(-(-K // block), G, size // block, q.device)
    return _MatMulNBits(q, zeros.index_select(0, blocks), scales.index_select(0, blocks), width, block)


class _MatMulNBits(nn.Module):
    """``x @ W`` by com.microsoft::MatMulNBits.

    Args:
        q: (K, N) int32.
        zeros: (ceil(K / block), N) int32.
        scales: like zeros, floating point.
        bits: of a field in the op's layout.
        block: rows that share a scale, a power of two.
    """

    B: Tensor
    scales: Tensor
    zeros: Tensor
    _attributes: dict[str, Any]

    def __init__(self, q: Tensor, zeros: Tensor, scales: Tensor, bits: int, block: int) -> None:
        super().__init__()
        K, N = q.shape
        blocks = nn.functional.pad(q.t(), (0, -K % block)).unflatten(1, (-1, block))
        self.register_buffer("B", _bytes(blocks, bits))
        self.register_buffer("scales", scales.float().t().flatten())
        self.register_buffer("zeros", _bytes(zeros.t(), bits).flatten())
        self._out_features = N
        self._attributes = {"K": K, "N": N, "bits": bits, "block_size": block, "accuracy_level": _FLOAT32_PRODUCTS}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x.float(), self.B, self.scales, self.zeros),
            self._attributes,
            dtype=torch.float32,
            shape=(x.shape[0], self._out_features),
            version=1,
        )
        return out.to(x.dtype)


class _PlainProduct(nn.Module):
    """``x @ W`` in ops that ONNX has.

    Args:
        q: (K, N) int32.
        zeros: (G, N) int32.
        scales: (G, N) floating point.
        groups: (K,) int32, the row of zeros and scales for each row of q.
    """

    q: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor

    def __init__(self, q: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> None:
        super().__init__()
        self.register_buffer("q", q.to(torch.uint8))
        self.register_buffer("zeros", zeros.float())
        self.register_buffer("scales", scales.float())
        self.register_buffer("groups", groups)

    def forward(self, x: Tensor) -> Tensor:
        zeros, scales = (table.index_select(0, self.groups) for table in (self.zeros, self.scales))
        return (x.float() @ ((self.q.float() - zeros) * scales)).to(x.dtype)


def _bytes(values: Tensor, bits: int) -> Tensor:
    """(..., n) integers -> (..., ceil(n * bits / 8)) uint8, the first value in the lowest bits."""
    per_byte = 8 // bits
    fields = nn.functional.pad(values, (0, -values.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=values.device)
    packed: Tensor = (fields << shifts).sum(-1)
    return packed.to(torch.uint8)
