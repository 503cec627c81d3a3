"""vLLM: the plugin that gives vLLM the checkpoints it refuses. vLLM finds it by an entry point, in each process."""

from __future__ import annotations

import logging

# The versions whose hooks the plugin was built on, or compared with.
_OLDEST, _NEWEST = "0.30", "0.33"

logger = logging.getLogger(f"vllm.{__name__}")


def register() -> None:
    """Teach vLLM the quantization method "exllama_ops". Calling it again changes nothing.

    vLLM calls it by the entry point ``vllm.general_plugins``. From then on vLLM loads every GPTQ, AWQ, AutoRound and
    compressed-tensors checkpoint that this library reads and vLLM itself refuses. ``--quantization exllama_ops`` asks
    for this library where vLLM would load the checkpoint too.

    An error here would end vLLM, whatever model it is to serve. So a vLLM that lacks a hook goes on without the plugin,
    and a warning names the versions that have it.

    Raises:
        ImportError: vLLM is not installed.
    """
    import vllm

    try:
        _check_hooks()
        from exllama_ops.integrations.vllm.config import register_config
        from exllama_ops.integrations.vllm.kernel import register_kernel
    except ImportError as error:
        logger.warning(
            "exllama_ops is a plugin for vLLM %s to %s. This is vLLM %s, which goes on without it: %s",
            *(_OLDEST, _NEWEST, vllm.__version__, error),
        )
        return
    register_config()
    register_kernel()


def _check_hooks() -> None:
    """What importing alone does not tell.

    Raises:
        ImportError: vLLM's loaders cannot be told to leave the packed tensors to this library.
    """
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    if not hasattr(QuantizationConfig, "get_checkpoint_weight_mapper"):
        raise ImportError("its QuantizationConfig has no get_checkpoint_weight_mapper")
