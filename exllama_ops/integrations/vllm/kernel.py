"""This library's linear kernel among those that vLLM's own mixed-precision configs choose from."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.platforms import PlatformEnum

from exllama_ops.kernel import ExllamaLinearKernel
from exllama_ops.kernel.config import MPLinearLayerConfig

_PLATFORMS = (PlatformEnum.CPU, PlatformEnum.CUDA, PlatformEnum.ROCM)
_registered = False


class ExllamaOpsLinearKernel(ExllamaLinearKernel):
    """`exllama_ops.ExllamaLinearKernel` under a name that vLLM's own kernel of that name does not have.

    It is the last that vLLM asks. ``VLLM_DISABLED_KERNELS`` takes the names of those before it. The configs of vLLM
    that have zero points store them as they are.

    Args:
        c: what the layer is, a config of vLLM.
        w_q_param_name: as in `exllama_ops.ExllamaLinearKernel`, and so on.
        w_s_param_name: likewise.
        w_zp_param_name: likewise.
    """

    def __init__(self, c: Any, w_q_param_name: str, w_s_param_name: str, w_zp_param_name: str | None = None) -> None:
        config = MPLinearLayerConfig(
            full_weight_shape=c.full_weight_shape,
            partition_weight_shape=c.partition_weight_shape,
            weight_type=c.weight_type,
            act_type=c.act_type,
            group_size=c.group_size,
            zero_points=c.zero_points,
            zero_points_v2=True,
        )
        super().__init__(config, w_q_param_name, w_s_param_name, w_zp_param_name)


def register_kernel() -> None:
    """Offer the kernel to vLLM, once in a process."""
    global _registered
    if _registered:
        return
    _registered = True
    for platform in _PLATFORMS:
        register_linear_kernel(ExllamaOpsLinearKernel, platform, "mp")
