"""The arithmetic of the ops in plain PyTorch: the spec that every kernel is held to.

One function per op, with the op's name and arguments. The functions check their arguments, so they can be called
directly, and are functional except for ``gptq_shuffle``, whose contract is to write.

Products and sums are taken in float64 and rounded once to float32 and then to the result's dtype. Each product
``x * scale * (q - z)`` of half-precision factors is exact there, and nothing a user sets for float32 matmuls (TF32,
bfloat16) touches it. So the result is the exact sum up to ``2**-24 + K * 2**-53`` of |x| |W| and one rounding.
"""

from exllama_ops.reference.gptq_dequantize import gptq_dequantize
from exllama_ops.reference.gptq_gemm import gptq_gemm
from exllama_ops.reference.gptq_gemm_dx import gptq_gemm_dx
from exllama_ops.reference.gptq_gemm_multi import gptq_gemm_multi
from exllama_ops.reference.gptq_moe_gemm import gptq_moe_gemm
from exllama_ops.reference.gptq_moe_gemm_dx import gptq_moe_gemm_dx
from exllama_ops.reference.gptq_shuffle import gptq_shuffle
from exllama_ops.reference.gptq_unshuffle import gptq_unshuffle

__all__ = [
    "gptq_dequantize",
    "gptq_gemm",
    "gptq_gemm_dx",
    "gptq_gemm_multi",
    "gptq_moe_gemm",
    "gptq_moe_gemm_dx",
    "gptq_shuffle",
    "gptq_unshuffle",
]
