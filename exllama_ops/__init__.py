"""exllama_ops: GPTQ kernels for 2, 3, 4 and 8 bits as PyTorch custom ops.

Importing the package registers ``torch.ops.exllama.*`` and touches no device. The parts that need the extra "hf"
(`load_model`, `open_gptq`, ...) are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from exllama_ops import backends
from exllama_ops.backends.batch_invariant import is_batch_invariant, set_batch_invariant
from exllama_ops.backends.cpu import get_cpu_matmul_precision, set_cpu_matmul_precision
from exllama_ops.layout import GptqWeight, PackedWeight
from exllama_ops.ops import (
    OPS_TO_SAVE,
    gptq_dequantize,
    gptq_gemm,
    gptq_gemm_dx,
    gptq_gemm_multi,
    gptq_moe_gemm,
    gptq_moe_gemm_dx,
    gptq_shuffle,
    gptq_unshuffle,
)
from exllama_ops.prepare import prepare

if TYPE_CHECKING:
    from exllama_ops.checkpoint import (
        Checkpoint,
        CheckpointError,
        GptqModule,
        ModuleSummary,
        open_checkpoint,
        open_gptq,
        read_gptq,
        save_gptq,
    )
    from exllama_ops.compile.freeze import freeze
    from exllama_ops.integrations.generation import CompiledGenerator
    from exllama_ops.integrations.layered import LayeredForward
    from exllama_ops.integrations.slot import GptqSlot
    from exllama_ops.integrations.stops import stop_tokens
    from exllama_ops.integrations.transformers import load_model
    from exllama_ops.kernel import ExllamaLinearKernel
    from exllama_ops.nn import ExllamaExperts, ExllamaLinear, convert, quantize
    from exllama_ops.nn.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "OPS_TO_SAVE",
    "Checkpoint",
    "CheckpointError",
    "CompiledGenerator",
    "ExllamaExperts",
    "ExllamaLinear",
    "ExllamaLinearKernel",
    "GptqModule",
    "GptqSlot",
    "GptqWeight",
    "LayeredForward",
    "ModuleSummary",
    "PackedWeight",
    "convert",
    "freeze",
    "get_cpu_matmul_precision",
    "gptq_dequantize",
    "gptq_gemm",
    "gptq_gemm_dx",
    "gptq_gemm_multi",
    "gptq_moe_gemm",
    "gptq_moe_gemm_dx",
    "gptq_shuffle",
    "gptq_unshuffle",
    "is_batch_invariant",
    "load_model",
    "open_checkpoint",
    "open_gptq",
    "prepare",
    "quantize",
    "read_gptq",
    "save_gptq",
    "set_batch_invariant",
    "set_cpu_matmul_precision",
    "stop_tokens",
    "warmup",
]

backends.register()

_LAZY = {
    "Checkpoint": "exllama_ops.checkpoint",
    "CheckpointError": "exllama_ops.checkpoint",
    "CompiledGenerator": "exllama_ops.integrations.generation",
    "ExllamaExperts": "exllama_ops.nn",
    "ExllamaLinear": "exllama_ops.nn",
    "ExllamaLinearKernel": "exllama_ops.kernel",
    "GptqModule": "exllama_ops.checkpoint",
    "GptqSlot": "exllama_ops.integrations.slot",
    "LayeredForward": "exllama_ops.integrations.layered",
    "ModuleSummary": "exllama_ops.checkpoint",
    "convert": "exllama_ops.nn",
    "freeze": "exllama_ops.compile.freeze",
    "load_model": "exllama_ops.integrations.transformers",
    "open_checkpoint": "exllama_ops.checkpoint",
    "open_gptq": "exllama_ops.checkpoint",
    "quantize": "exllama_ops.nn",
    "read_gptq": "exllama_ops.checkpoint",
    "save_gptq": "exllama_ops.checkpoint",
    "stop_tokens": "exllama_ops.integrations.stops",
    "warmup": "exllama_ops.nn.warmup",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
