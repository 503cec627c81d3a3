"""The ops in Triton, by their names."""

from __future__ import annotations

from exllama_ops.backends.triton.dequantize import gptq_dequantize
from exllama_ops.backends.triton.gemm import gptq_gemm, gptq_gemm_multi
from exllama_ops.backends.triton.gemm_dx import gptq_gemm_dx, gptq_moe_gemm_dx
from exllama_ops.backends.triton.moe_gemm import gptq_moe_gemm
from exllama_ops.backends.triton.shuffle import gptq_shuffle, gptq_unshuffle

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
