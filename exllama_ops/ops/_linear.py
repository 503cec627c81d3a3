"""Autograd of the ops that are linear in their first argument, by their adjoints.

A Python autograd kernel costs as much as the call, in compiled code too if the compiled graph contains the op that
owns it. So each of these ops has a second overload, ``no_autograd``, with the same schema and kernels. The autograd
kernel of the default overload calls it, and AOTAutograd compiles it. The function of the op's name calls it too, where
the autograd kernel would do no more. A TorchDispatchMode that looks at ops by their names sees the default overload.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.flop_counter import register_flop_formula

from exllama_ops.layout.weight import OfOpArguments, Weight
from exllama_ops.ops import _library, _vmap

_OPTIONS = "Tensor g_idx, bool use_exllama, int bit, bool use_v2_format=False, int group_size=0"
WEIGHT_ARGUMENTS = f"Tensor qweight, Tensor qzeros, Tensor scales, {_OPTIONS}"
WEIGHTS_ARGUMENTS = f"Tensor[] qweight, Tensor[] qzeros, Tensor[] scales, {_OPTIONS}"
EXPERTS_ARGUMENTS = WEIGHT_ARGUMENTS.replace("Tensor g_idx, ", "Tensor g_idx, Tensor expert_offsets, ")

NO_AUTOGRAD = "no_autograd"

# Asked in each call, in which it would take as long to find them as to call them.
_grad_enabled = torch.is_grad_enabled
_transformed = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack

_TRACING = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def define_linear_op(
    name: str,
    arguments: str,
    *,
    adjoint: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    kind: OfOpArguments = Weight,
    vmap: Callable[..., Any] = _vmap.in_one_call,
) -> Callable[..., Tensor]:
    """Define ``exllama::name`` and its overload without autograd, their gradient, batching rule and FLOP formula.

    Args:
        name: of the op; its first argument is the one it is linear in.
        arguments: of its schema; the first, and those of a weight or of several.
        adjoint: maps a gradient of the result, dense and contiguous, and the weight to one of the first argument.
        fake: the fake of both overloads.
        kind: what the arguments after the first are, tensors or lists of them first.
        vmap: the batching rule, of `exllama_ops.ops._vmap`.

    Returns:
        The op as a function: what tracers see is ``exllama::name``.
    """
    names = (name, f"{name}.{NO_AUTOGRAD}")
    for overload in names:
        _library.define_op(overload, arguments, "Tensor", fake=fake)
    op, without_autograd = (_library.overload(overload) for overload in names)
    _library.register_kernel(names[0], "Autograd", _autograd_kernel(op, without_autograd, adjoint, kind))
    _library.no_gradient(names[1])
    for overload in names:
        _library.register_kernel(overload, "ZeroTensor", _on_zeros(_library.overload(overload)))
        _library.register_vmap(overload, vmap)
    packet = op.overloadpacket
    register_flop_formula(packet)(functools.partial(_flops, kind))
    # The former name of the overload without autograd: policies of checkpointing and Inductor's caches may hold it.
    setattr(torch.ops.exllama, f"_{name}", packet)

    def call(first: Tensor, *weight: Any) -> Tensor:
        seen = torch.compiler.is_compiling() or _transformed() or _has_derivative(first) or _modes()
        result: Tensor = (packet if seen else without_autograd)(first, *weight)
        return result

    return call


def _has_derivative(first: Tensor) -> bool:
    """Whether autograd is to know what becomes of a first argument."""
    try:
        return (first.requires_grad and _grad_enabled()) or forward_ad._current_level >= 0
    except AttributeError:  # None and other things that are no tensor, which the op refuses
        return False


def _is_watched() -> bool:
    """Whether ops are seen by a mode that is none of tracing: selective checkpointing, a counter, a debugger."""
    tracing = sum(torch._C._get_dispatch_mode(key) is not None for key in _TRACING)
    return _modes() > tracing


def _flops(
    kind: OfOpArguments,
    first_shape: torch.Size,
    qweight: torch.Size | Sequence[torch.Size],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """2 M K N of each weight, for any of the ops. The arguments are shapes where the op has tensors.

    A row of x meets one of several experts, so that a stack of them counts once.
    """
    del out_shape
    shapes = [qweight] if isinstance(qweight, torch.Size) else qweight
    bits = kind.of(qweight, *args, **kwargs).bits
    return sum(2 * first_shape[0] * (shape[-2] * 32 // bits) * shape[-1] for shape in shapes)


def _on_zeros(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel for ZeroTensors, by which autograd spares itself zeros: torch's own would hand over expanded ones."""

    def filled(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(tensor.shape) if tensor._is_zerotensor() else tensor

    def fill_and_compute(*args: Any) -> Tensor:
        return op(*tree_map_only(Tensor, filled, args))

    return fill_and_compute


def _autograd_kernel(
    op: Callable[..., Tensor],
    without_autograd: Callable[..., Tensor],
    adjoint: Callable[..., Tensor],
    kind: OfOpArguments,
) -> Callable[..., Tensor]:
    num_tensors = len(kind.TENSORS)

    def by_its_name(first: Tensor, *weight: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return op(first, *weight)

    def below_autograd(first: Tensor, *weight: Any) -> Tensor:
        return by_its_name(first, *weight) if _is_watched() else without_autograd(first, *weight)

    # A torch.autograd.Function works for the transforms of torch.func only where it is called outside of the
    # dispatcher. A kernel is called for one of them at a time, which is what the class under it is for. The weight is
    # one tuple, in which autograd sees no tensors: it gets no gradient.
    class Linear(_SingleLevelFunction):
        _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

        @staticmethod
        def forward(first: Tensor, weight: tuple[Any, ...], modes: tuple[bool, bool] | None) -> Tensor:
            if modes is None:
                return below_autograd(first, *weight)
            # A Function has switched both off, and the transforms that come next need them as they were.
            with torch.set_grad_enabled(modes[0]), forward_ad._set_fwd_grad_enabled(modes[1]):
                return by_its_name(first, *weight)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            weight = inputs[1]
            tensors, ctx.structure = tree_flatten(weight[:num_tensors])
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.options = weight[num_tensors:]

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor, *no_tangents: None) -> Tensor:
            # Switched off too: a second tangent would be lost.
            with forward_ad._set_fwd_grad_enabled(True):
                return op(tangent, *_saved_weight(ctx))

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return adjoint(_plain(grad), *_saved_weight(ctx)), None, None

    apply: Callable[..., Tensor] = Linear.apply  # type: ignore[attr-defined]

    def autograd_kernel(first: Tensor, *weight: Any) -> Tensor:
        if _transformed():
            with enable_single_level_autograd_function():
                return apply(first, weight, (_grad_enabled(), torch._C._is_fwd_grad_enabled()))
        # While a graph is traced, Python does not know of tangents.
        if _has_derivative(first) or type(first) is not Tensor:
            return apply(first, weight, None)
        return (below_autograd if _modes() else without_autograd)(first, *weight)

    return autograd_kernel


def _plain(tensor: Tensor) -> Tensor:
    """A gradient as the ops take it: autograd has expanded, transposed and sparse ones too."""
    return (tensor if tensor.layout is torch.strided else tensor.to_dense()).contiguous()


def _saved_weight(ctx: Any) -> tuple[Any, ...]:
    return *tree_unflatten(ctx.saved_tensors, ctx.structure), *ctx.options
