"""The ops: one file per contract (schema, checks, fake, autograd, public function). Importing it registers them."""

from exllama_ops.ops.gptq_dequantize import gptq_dequantize
from exllama_ops.ops.gptq_gemm import gptq_gemm
from exllama_ops.ops.gptq_gemm_dx import gptq_gemm_dx
from exllama_ops.ops.gptq_gemm_multi import gptq_gemm_multi
from exllama_ops.ops.gptq_shuffle import gptq_shuffle
from exllama_ops.ops.gptq_unshuffle import gptq_unshuffle

__all__ = ["gptq_dequantize", "gptq_gemm", "gptq_gemm_dx", "gptq_gemm_multi", "gptq_shuffle", "gptq_unshuffle"]
