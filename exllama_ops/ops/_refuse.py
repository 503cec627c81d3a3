"""What is refused by name where torch itself would not say what is wrong: other layouts, and a plain ONNX export."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

# The dispatch keys of tensors that are not dense. Their kernels refuse; those of dense tensors need not look.
NOT_DENSE = (
    *("SparseCPU", "SparseCUDA", "SparseXPU", "SparseMeta"),
    *("SparseCsrCPU", "SparseCsrCUDA", "SparseCsrXPU", "SparseCsrMeta"),
    *("NestedTensorCPU", "NestedTensorCUDA", "NestedTensorXPU", "NestedTensorMeta"),
    "AutogradNestedTensor",  # of jagged ones, which are Python's below it
    *("QuantizedCPU", "QuantizedCUDA", "QuantizedXPU"),
    "MkldnnCPU",
)


def other_layouts(op: torch._ops.OpOverload) -> Callable[..., None]:
    """A kernel that raises ValueError if an argument of an op is not a dense tensor, and does nothing else."""

    def refuse(*args: Any) -> None:
        for name, value in _named(op, args):
            if isinstance(value, Tensor) and (got := _other_layout(value)):
                raise ValueError(f"{op._opname}: {name} must be a dense tensor; got {got}")

    return refuse


def _named(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    for argument, value in zip(op._schema.arguments, args, strict=False):
        if isinstance(value, (list, tuple)):
            yield from ((f"{argument.name}[{i}]", entry) for i, entry in enumerate(value))
        else:
            yield argument.name, value


def _other_layout(tensor: Tensor) -> str | None:
    if tensor.layout is not torch.strided:
        return f"layout {tensor.layout}"
    if tensor.is_nested:
        return "a nested one"
    return f"dtype {tensor.dtype}" if tensor.is_quantized else None


def onnx_export(op: torch._ops.OpOverload) -> None:
    """Raise NotImplementedError if torch.onnx.export traces an op that its caller brings no translation for."""
    onnx = sys.modules.get("torch.onnx")
    if onnx is None or not onnx.is_in_onnx_export():
        return
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        table = frame.f_locals.get("custom_translation_table")
        if table and any(getattr(target, "namespace", None) == op.namespace for target in table):
            return
        frame = frame.f_back
    raise NotImplementedError(
        f"{op._opname}: torch.onnx.export has no translation of this op; exllama_ops.compile.onnx.onnx_program exports "
        "the model, with its quantized products as MatMulNBits"
    )
