"""Everything that a first call would do, done before: native libraries built, Triton's kernels compiled and loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

# One M for each kernel and tile that Triton's table chooses by M, and one for which sums are not split.
TOKENS = (1, 2, 5, 17, 33, 65, 2048)

_WEIGHT_ARGUMENTS = 8


def warmup(
    model_or_weights: nn.Module | Iterable[tuple[Tensor, Tensor, Tensor, Tensor, bool, int, bool, int]],
    *,
    dtype: torch.dtype = torch.float16,
    tokens: Sequence[int] = TOKENS,
    gradient: bool = False,
) -> None:
    """Call gptq_gemm once for every weight, dtype and number of tokens that decides which kernel runs.

    Nothing is compiled while a CUDA graph is captured: a kernel that was not launched before raises an error there.
    Results are thrown away; the device is not waited for.

    Args:
        model_or_weights: a model with `ExllamaLinear` layers, or the arguments of gptq_gemm after x, weight by weight.
        dtype: that of x.
        tokens: the numbers of tokens M. Name those that are captured: where sums are split, the kernels are others, and
            that depends on M and on the device.
        gradient: whether gptq_gemm_dx is called too.

    Raises:
        ValueError: there is no weight, or an argument breaks a rule of gptq_gemm.
    """
    if isinstance(model_or_weights, nn.Module):
        from exllama_ops.nn import ExllamaLinear

        weights = [layer.op_arguments for layer in model_or_weights.modules() if isinstance(layer, ExllamaLinear)]
    else:
        weights = list(model_or_weights)
    if not weights:
        raise ValueError("warmup: model_or_weights has no weight: neither an ExllamaLinear nor arguments of gptq_gemm")
    for weight in weights:
        if len(weight) != _WEIGHT_ARGUMENTS:
            raise ValueError(
                f"warmup: a weight must be the {_WEIGHT_ARGUMENTS} arguments of gptq_gemm after x; got {len(weight)}"
            )
        qweight, bit = weight[0], weight[5]
        K, N = qweight.shape[0] * 32 // bit, qweight.shape[1]
        with torch.no_grad():
            for M in tokens:
                torch.ops.exllama.gptq_gemm(qweight.new_zeros((M, K), dtype=dtype), *weight)
                if gradient:
                    torch.ops.exllama.gptq_gemm_dx(qweight.new_zeros((M, N), dtype=dtype), *weight)
