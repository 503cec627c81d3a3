"""The linear-kernel layer: what an engine such as vLLM calls to run one quantized layer.

Its names, its arguments and the order of its calls are those of vLLM's MPLinearKernel interface. Moving from there is a
change of import::

    kernel = ExllamaLinearKernel(config, "qweight", "scales", "qzeros", "g_idx")
    kernel.process_weights_after_loading(layer)
    y = kernel.apply_weights(layer, x, bias)

What belongs to one engine alone has its place in ``exllama_ops/integrations/<engine>/``.
"""

from exllama_ops.kernel.config import MPLinearLayerConfig
from exllama_ops.kernel.exllama import ExllamaLinearKernel
from exllama_ops.kernel.scalar_types import (
    ScalarType,
    WeightType,
    uint2,
    uint2b2,
    uint3,
    uint3b4,
    uint4,
    uint4b8,
    uint8,
    uint8b128,
)

__all__ = [
    "ExllamaLinearKernel",
    "MPLinearLayerConfig",
    "ScalarType",
    "WeightType",
    "uint2",
    "uint2b2",
    "uint3",
    "uint3b4",
    "uint4",
    "uint4b8",
    "uint8",
    "uint8b128",
]
