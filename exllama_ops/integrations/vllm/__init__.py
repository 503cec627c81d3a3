"""vLLM: the plugin that gives vLLM the checkpoints it refuses. vLLM finds it by an entry point, in each process."""

from __future__ import annotations


def register() -> None:
    """Teach vLLM the quantization method "exllama_ops". Calling it again changes nothing.

    vLLM calls it by the entry point ``vllm.general_plugins``. From then on vLLM loads every GPTQ, AWQ, AutoRound and
    compressed-tensors checkpoint that this library reads and vLLM itself refuses. ``--quantization exllama_ops`` asks
    for this library where vLLM would load the checkpoint too.

    Raises:
        ImportError: vLLM is not installed.
    """
    from exllama_ops.integrations.vllm.config import register_config
    from exllama_ops.integrations.vllm.kernel import register_kernel

    register_config()
    register_kernel()
