"""Autograd of the ops that are linear in their first argument, by their adjoints.

A Python autograd kernel costs as much as the call, in compiled code too if the compiled graph contains the op that
owns it. So each public op has a private twin with the same schema and kernels but without autograd. The public op's
autograd kernel calls the twin, the twin is what AOTAutograd compiles, and the function of the op's name calls it where
the autograd kernel would do no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import register_flop_formula

from exllama_ops.ops import _library

_OPTIONS = "Tensor g_idx, bool use_exllama, int bit, bool use_v2_format=False, int group_size=0"
WEIGHT_ARGUMENTS = f"Tensor qweight, Tensor qzeros, Tensor scales, {_OPTIONS}"
WEIGHTS_ARGUMENTS = f"Tensor[] qweight, Tensor[] qzeros, Tensor[] scales, {_OPTIONS}"
# Of either, those that are tensors or lists of them.
_NUM_WEIGHT_TENSORS = 4


def define_linear_op(
    name: str, arguments: str, *, adjoint: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Define ``exllama::name``, its twin ``exllama::_name``, its gradient and its FLOP formula.

    Args:
        name: the public op; its first argument is the one it is linear in.
        arguments: of its schema; the first, and those of a weight or of several.
        adjoint: maps a gradient of the result, of any strides, and the weight to one of the first argument.
        fake: the fake of both twins.

    Returns:
        The op as a function: what tracers see is ``exllama::name``.
    """
    for twin in (name, f"_{name}"):
        _library.define_op(twin, arguments, "Tensor", fake=fake)
        register_flop_formula(_packet(twin))(_flops)
    _library.no_gradient(f"_{name}")
    _library.register_kernel(name, "Autograd", _autograd_kernel(f"_{name}", adjoint))
    op, without_autograd = _packet(name), _packet(f"_{name}").default

    def call(first: Tensor, *weight: Any) -> Tensor:
        seen = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or _has_derivative(first)
        result: Tensor = op(first, *weight) if seen else without_autograd(first, *weight)
        return result

    return call


def _has_derivative(first: Tensor) -> bool:
    """Whether autograd is to know what becomes of a first argument."""
    return (first is not None and first.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def _packet(name: str) -> Any:
    return getattr(torch.ops.exllama, name)


def _flops(
    first_shape: torch.Size,
    qweight: torch.Size | Sequence[torch.Size],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """2 M K N of each weight, for any of the ops. The arguments are shapes where the op has tensors."""
    del out_shape
    bits = kwargs["bit"] if "bit" in kwargs else args[4]
    shapes = [qweight] if isinstance(qweight, torch.Size) else qweight
    return sum(2 * first_shape[0] * (rows * 32 // bits) * N for rows, N in shapes)


def _autograd_kernel(twin: str, adjoint: Callable[..., Tensor]) -> Callable[..., Tensor]:
    forward_op = _packet(twin).default

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(first: Tensor, *weight: Any) -> Tensor:
            result: Tensor = forward_op(first, *weight)
            return result

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            _, *weight = inputs
            tensors, ctx.structure = tree_flatten(weight[:_NUM_WEIGHT_TENSORS])
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.options = weight[_NUM_WEIGHT_TENSORS:]

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor, *weight_tangents: None) -> Tensor:
            result: Tensor = forward_op(tangent.contiguous(), *_saved_weight(ctx))
            return result

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return adjoint(grad, *_saved_weight(ctx)), *(None,) * (_NUM_WEIGHT_TENSORS + len(ctx.options))

    def autograd_kernel(first: Tensor, *weight: Any) -> Tensor:
        if _has_derivative(first):
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(
                    f"{twin[1:]}: the gradient transforms of torch.func are not supported; torch.autograd is"
                )
            return Linear.apply(first, *weight)  # type: ignore[no-untyped-call, no-any-return]
        result: Tensor = forward_op(first, *weight)
        return result

    return autograd_kernel


def _saved_weight(ctx: Any) -> tuple[Any, ...]:
    return *tree_unflatten(ctx.saved_tensors, ctx.structure), *ctx.options
