"""The ops: one file per contract (schema, checks, fake, autograd, public function). Importing it registers them."""

from torch._ops import OpOverload

from exllama_ops.ops import _library
from exllama_ops.ops.gptq_dequantize import gptq_dequantize
from exllama_ops.ops.gptq_gemm import gptq_gemm
from exllama_ops.ops.gptq_gemm_dx import gptq_gemm_dx
from exllama_ops.ops.gptq_gemm_multi import gptq_gemm_multi
from exllama_ops.ops.gptq_moe_gemm import gptq_moe_gemm
from exllama_ops.ops.gptq_moe_gemm_dx import gptq_moe_gemm_dx
from exllama_ops.ops.gptq_shuffle import gptq_shuffle
from exllama_ops.ops.gptq_unshuffle import gptq_unshuffle

__all__ = [
    "OPS_TO_SAVE",
    "gptq_dequantize",
    "gptq_gemm",
    "gptq_gemm_dx",
    "gptq_gemm_multi",
    "gptq_moe_gemm",
    "gptq_moe_gemm_dx",
    "gptq_shuffle",
    "gptq_unshuffle",
]

OPS_TO_SAVE: tuple[OpOverload, ...] = tuple(_library.overload(name) for name in _library.schemas() if "gemm" in name)
"""The products, for the list or policy of `torch.utils.checkpoint.create_selective_checkpoint_contexts`.

A policy is asked for ``gptq_gemm.default``. The overloads without autograd are what graphs of AOTAutograd have.
"""
