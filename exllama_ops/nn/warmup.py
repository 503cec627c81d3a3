"""Everything that a first call would do, done before: native libraries built, Triton's kernels compiled and loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from exllama_ops import backends
from exllama_ops.backends import triton
from exllama_ops.layout.weight import Weight
from exllama_ops.nn.linear import ExllamaLinear

# One M for each kernel and tile that Triton's table chooses by M, and one for which sums are not split.
TOKENS = (1, 2, 5, 17, 33, 65, 2048)


def warmup(
    model_or_weights: nn.Module | Iterable[tuple[Tensor, Tensor, Tensor, Tensor, bool, int, bool, int]],
    *,
    dtype: torch.dtype = torch.float16,
    tokens: Sequence[int] = TOKENS,
    gradient: bool = False,
    autotune: bool = False,
) -> None:
    """Call gptq_gemm once for every weight, dtype and number of tokens that decides which kernel runs.

    Nothing is compiled while a CUDA graph is captured: a kernel that was not launched before raises an error there.
    `gptq_gemm_multi`, `gptq_dequantize` and `gptq_shuffle` have kernels of their own, which are not called here. The
    backend "exllama" takes layers together, and the graph of a compiled model alone knows which. Call such a model
    once, with as many tokens as are captured, before the capture.
    Results are thrown away; the device is not waited for.

    Args:
        model_or_weights: a model with `ExllamaLinear` layers, or the arguments of gptq_gemm after x, weight by weight.
        dtype: that of x.
        tokens: the numbers of tokens M. Name those that are captured: where sums are split, the kernels are others, and
            that depends on M and on the device.
        gradient: whether gptq_gemm_dx is called too.
        autotune: whether Triton's tiles for what is called are timed, of which the fastest serves from then on, in
            later processes too. It is kept in the folder that EXLLAMA_OPS_CACHE names, by default ~/.cache/exllama_ops.
            What was kept is not timed again. Results have the same bits with every tile.

    Raises:
        ValueError: there is no weight, an argument breaks a rule of gptq_gemm, or autotune is asked for where Triton
            does not compute the op.
        RuntimeError: autotune is asked for in a traced call, or while a CUDA graph is being captured.
    """
    if isinstance(model_or_weights, nn.Module):
        weights = [layer.op_arguments for layer in model_or_weights.modules() if isinstance(layer, ExllamaLinear)]
    else:
        weights = list(model_or_weights)
    if not weights:
        raise ValueError("warmup: model_or_weights has no weight: neither an ExllamaLinear nor arguments of gptq_gemm")
    count = len(fields(Weight))
    for arguments in weights:
        if len(arguments) != count:
            raise ValueError(
                f"warmup: a weight must be the {count} arguments of gptq_gemm after x; got {len(arguments)}"
            )
        weight = Weight.of(*arguments)
        with torch.no_grad():
            for M in tokens:
                calls = [("gptq_gemm", weight.qweight.new_zeros((M, weight.in_features), dtype=dtype))]
                if gradient:
                    calls.append(("gptq_gemm_dx", weight.qweight.new_zeros((M, weight.N), dtype=dtype)))
                for op, x in calls:
                    getattr(torch.ops.exllama, op)(x, *arguments)
                    if autotune and M > 0:
                        _tune(op, x, weight)


def _tune(op: str, x: Tensor, weight: Weight) -> None:
    key = x.device.type.upper()
    if key not in backends.PRIORITY or backends.serving(op, key) is not triton.BACKEND:
        raise ValueError(
            f"warmup: autotune chooses tiles of Triton's kernels, and on {x.device} Triton does not compute {op}: "
            "exllama_ops.backends.report() says why"
        )
    triton.BACKEND.tune(op, x, weight)
