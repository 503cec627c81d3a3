"""transformers: `load_model`, and `register`, after which ``from_pretrained`` runs GPTQ checkpoints on these layers."""

from __future__ import annotations

from contextlib import AbstractContextManager

from exllama_ops.integrations.transformers.load import load_model

__all__ = ["load_model", "register"]


def register() -> AbstractContextManager[object]:
    """Let transformers load quantized checkpoints with this library's layers, without optimum and gptqmodel.

    From then on ``from_pretrained``, ``pipeline`` and all that is built on them load GPTQ, AWQ, AutoRound and
    compressed-tensors checkpoints of 2, 3, 4 and 8 bits as models whose quantized layers are
    `exllama_ops.ExllamaLinear`. ``save_pretrained`` writes a GPTQ checkpoint. What this library does not read stays
    with transformers' own quantizers. Calling it again changes nothing.

    Returns:
        A context manager that undoes this call when it is left. Models that were loaded meanwhile keep working.

    Raises:
        ImportError: the extra "hf" is not installed.

    Example::

        register()
        model = AutoModelForCausalLM.from_pretrained("path/or/hub-id")
    """
    from exllama_ops.extras import require

    require("transformers")
    from exllama_ops.integrations.transformers.quantizer import Registration

    return Registration()
