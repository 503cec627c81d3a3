"""What `ExllamaLinear.weight` is: the dense weight, for code that reads it, computed only where it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree

if TYPE_CHECKING:
    from exllama_ops.nn.packed_module import PackedModule

_PACKED = (
    "packed in the buffers of an ExllamaLinear, and cannot be written to as a dense one. layer.dequantize() is a dense "
    "copy of it, layer.to_weight() is the GPTQ weight, and layer.set_packed(prepare(weight)) puts another one in"
)


class DenseWeight(Tensor):
    """The dense weight (N, K) of a layer that holds a packed one, to read as ``layer.weight``.

    Code of models asks a layer for ``weight.dtype`` or ``weight.device``, which costs nothing here. An expression such
    as ``weight @ x`` dequantizes the whole weight each time, and keeps nothing. A view of it is a view of such a copy.

    Args:
        layer: the layer whose weight this is. The dtype is its ``weight_dtype``.

    Raises:
        RuntimeError: an operation would write to the weight.
    """

    # transformers initializes every weight that lacks this mark.
    _is_hf_initialized = True
    _layer: PackedModule

    @staticmethod
    def __new__(cls: type[DenseWeight], layer: PackedModule) -> DenseWeight:
        shape, strides = (layer.out_features, layer.in_features), (1, layer.out_features)
        weight: DenseWeight = Tensor._make_wrapper_subclass(
            cls, shape, strides, dtype=layer.weight_dtype, device=layer.qweight.device
        )
        weight._layer = layer
        return weight

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if op is torch.ops.aten.detach.default:
            return cls(args[0]._layer)
        given = [*zip(op._schema.arguments, args, strict=False)]
        given += [(argument, kwargs.get(argument.name)) for argument in op._schema.arguments]
        # A TypeError would turn w += 1 into w = w + 1.
        if any(argument.is_write and isinstance(value, cls) for argument, value in given):
            raise RuntimeError(f"{op}: the weight is {_PACKED}")
        return op(*_pytree.tree_map(_computed, args), **_pytree.tree_map(_computed, kwargs))

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(f"weight.data = value: the weight is {_PACKED}")

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return dense_weight(self._layer).__dlpack__(*args, **kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RuntimeError(f"weight[...] = value: the weight is {_PACKED}")

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"DenseWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, layer={self._layer})"


def _computed(value: Any) -> Any:
    return dense_weight(value._layer) if isinstance(value, DenseWeight) else value


def dense_weight(layer: PackedModule) -> Tensor:
    """The weight (N, K) in ``layer.weight_dtype``, rounded once, whatever dtype the scales have."""
    qweight, qzeros, scales, *rest = layer.op_arguments
    wide = scales if scales.dtype == layer.weight_dtype else scales.float()
    weight: Tensor = torch.ops.exllama.gptq_dequantize(qweight, qzeros, wide, *rest)
    return weight.t().to(layer.weight_dtype)
