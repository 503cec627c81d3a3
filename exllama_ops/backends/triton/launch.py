"""The one place where kernels are launched."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

# Integers that Triton compiles kernels for by their divisibility, which is what wide loads need. The others are
# named in each kernel's do_not_specialize.
_SPECIALIZED = ("K", "N")
_MAX_INT32 = 2**31 - 1

_launched: set[Any] = set()

T = TypeVar("T")


def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels multiply and store numbers of ``dtype`` in: itself on a device.

    Triton's interpreter truncates to bfloat16 where a device rounds to nearest, and multiplies its bits as integers in
    tl.dot. There it is float32, and torch rounds the result.
    """
    return torch.float32 if is_interpreting() and dtype == torch.bfloat16 else dtype


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured from the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def compile_options(constants: Mapping[str, Any]) -> dict[str, Any]:
    """What Triton is told of every kernel, beside the warps and stages of its tile."""
    return {
        # Sums are written as fma where they are to be fused: their bits do not depend on the compiler's choice.
        "enable_fp_fusion": False,
        # The assertions on orders and offsets, and no others: Triton would add its own for integer overflow.
        "debug": bool(constants.get("HAS_ROW_ORDER") or constants.get("E")),
        "sanitize_overflow": False,
    }


def _each(argument: T | tuple[T, ...]) -> tuple[T, ...]:
    return argument if isinstance(argument, tuple) else (argument,)


def variant_of(
    kernel: Any,
    tensors: Mapping[str, Tensor | tuple[Tensor, ...]],
    sizes: Mapping[str, int | tuple[int, ...]],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
) -> tuple[Any, ...]:
    """Equal for launches of a kernel that Triton compiles once: all that it looks at in their arguments."""
    pointers = [tensor for of_name in tensors.values() for tensor in _each(of_name)]
    integers = [size for of_name in sizes.values() for size in _each(of_name)]
    return (
        kernel.__name__,
        pointers[0].device,
        num_warps,
        num_stages,
        *((tensor.dtype, tensor.data_ptr() % 16 == 0, _has_32_bit_offsets(tensor)) for tensor in pointers),
        *(size <= _MAX_INT32 for size in integers),
        *(size % 16 == 0 for name in _SPECIALIZED if name in sizes for size in _each(sizes[name])),
        *constants.values(),
    )


def _has_32_bit_offsets(tensor: Tensor) -> bool:
    """Whether Triton compiles AMD's buffer instructions for a tensor, which reach that far."""
    if torch.version.hip is None or not triton.knobs.amd.use_buffer_ops:
        return False
    return tensor.untyped_storage().nbytes() <= _MAX_INT32


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Mapping[str, Tensor | tuple[Tensor, ...]],
    sizes: Mapping[str, int | tuple[int, ...]],
    constants: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 1,
) -> None:
    """Launch a kernel on the device of its tensors, on the current stream.

    Raises:
        RuntimeError: a CUDA graph is being captured, and this variant of the kernel was not launched before. It would
            be compiled and loaded, which a capture does not survive.
    """
    device = _each(next(iter(tensors.values())))[0].device
    variant = variant_of(kernel, tensors, sizes, constants, num_warps, num_stages)
    if variant not in _launched and is_capturing(device):
        raise RuntimeError(
            f"exllama_ops: the Triton kernel {kernel.__name__} for {constants} is not compiled yet, and a CUDA graph "
            "is being captured: call exllama_ops.warmup, or the op itself, before"
        )
    with contextlib.nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index):
        kernel[grid](
            **tensors,
            **sizes,
            **constants,
            num_warps=num_warps,
            num_stages=num_stages,
            **compile_options(constants),
        )
    _launched.add(variant)
