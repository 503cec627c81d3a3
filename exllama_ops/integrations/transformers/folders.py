"""Folders as older tools wrote them: a quantization config and weights where transformers does not look."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exllama_ops.checkpoint.choice import INDEX_NAME, SINGLE_NAME, choose_files
from exllama_ops.checkpoint.disk import list_directory
from exllama_ops.checkpoint.fields import CONFIG_NAME, QUANTIZE_CONFIG_NAME, normalize, read_quantization


def looking_further(get_hf_quantizer: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function by which transformers finds out whether a model is quantized.

    Args:
        get_hf_quantizer: of transformers; its first argument is the model's config.

    Returns:
        The same, for a config that has been completed from the folder that it came from.
    """

    @functools.wraps(get_hf_quantizer)
    def wrapped(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(quantization_config, "checkpoint", None) is None:  # else it is open, and there is nothing to find
            _complete(config, quantization_config)
        return get_hf_quantizer(config, quantization_config, *args, **kwargs)

    return wrapped


def _complete(config: Any, argument: Any) -> None:
    """Write into a config what its folder says: how the model is quantized, and which files it is."""
    folder = Path(config.name_or_path) if config.name_or_path else None
    if folder is None or not folder.is_dir():
        return
    names = list_directory(folder)
    said = getattr(config, "quantization_config", None)
    if said is None and QUANTIZE_CONFIG_NAME not in names and argument is None:
        return
    if CONFIG_NAME in names and (said is None or isinstance(said, dict)):
        raw, source = read_quantization(folder, quiet=True)
        if raw:
            method = normalize(raw, source).get("quant_method", "gptq")
            config.quantization_config = {**raw, "quant_method": method}
    if SINGLE_NAME not in names and INDEX_NAME not in names and any(name.endswith(".safetensors") for name in names):
        choice = choose_files(folder, stacklevel=5)
        if choice.index_name is not None or len(choice.names) == 1:
            config.transformers_weights = choice.index_name or choice.names[0]
