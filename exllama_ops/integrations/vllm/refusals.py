"""Why vLLM itself would refuse a checkpoint, asked of vLLM's own rules."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms import current_platform

from exllama_ops.checkpoint import Checkpoint, CheckpointError, ModuleSummary, compressed_tensors, open_checkpoint
from exllama_ops.checkpoint.compressed_tensors_config import parse_compressed_tensors
from exllama_ops.checkpoint.files import is_hub_id
from exllama_ops.checkpoint.hub import fetch_headers

# What a config calls itself -> vLLM's name of it, where they differ.
_NAMES = {"auto-round": "inc"}

logger = init_logger(f"vllm.{__name__}")


def reasons(raw: Mapping[str, Any], hf_config: Any) -> list[str]:
    """Every reason for which vLLM would refuse a quantized checkpoint.

    A layer of each kind in the files is made of vLLM's own config, without memory, as far as vLLM decides how to run
    it. Whatever it raises there ends it when it makes the model. Experts are asked for as if they were layers of their
    own.

    Args:
        raw: the quantization config of the files.
        hf_config: of the model, which knows where the files are.

    Returns:
        The reasons. None if vLLM would run it, if that is not known, or if this library cannot read the files either.
    """
    method = str(raw.get("quant_method", "")).lower()
    try:
        kinds = _kinds(hf_config, method, raw)
    except (CheckpointError, ImportError) as error:
        logger.info_once("exllama_ops leaves this checkpoint to vLLM: %s", error)
        return []
    try:
        config = _config_of(method, raw)
    except Exception as error:
        return [_first_line(error)]
    found: dict[str, None] = {}
    for name, summary in kinds.items():
        if reason := _reason_against(config, name, summary):
            found[f"{name}: {reason}"] = None
    return list(found)


def _config_of(method: str, raw: Mapping[str, Any]) -> Any:
    """vLLM's own config of a checkpoint.

    Raises:
        Exception: vLLM does not take the config, here or on this platform.
    """
    name = _NAMES.get(method, method)
    kind = get_quantization_config(name)
    current_platform.verify_quantization(name)
    config = kind.from_config(dict(raw))
    capability = current_platform.get_device_capability()
    if capability is not None and capability.to_int() < config.get_min_capability():
        raise ValueError(f"{name} needs compute capability {config.get_min_capability()}; got {capability.to_int()}")
    return config


def _kinds(hf_config: Any, method: str, raw: Mapping[str, Any]) -> dict[str, ModuleSummary]:
    """One layer for each kind of them in the files, as far as headers tell; none if there are no files yet.

    Raises:
        CheckpointError: this library cannot read the files.
        ImportError: the extra ``hf`` is not installed.
    """
    model = getattr(hf_config, "_name_or_path", "") or ""
    if not model:
        return {}
    if not is_hub_id(model):
        return _first_of_each(open_checkpoint(model))
    if method in compressed_tensors.METHODS:
        # Their headers do not tell the shapes, so all would be downloaded. Of them the config says what can be read.
        parse_compressed_tensors(raw, model)
        return {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _first_of_each(open_checkpoint(fetch_headers(model, None, Path(folder))))
    except CheckpointError as error:
        logger.info_once("exllama_ops asks vLLM of the config of this checkpoint alone: %s", _first_line(error))
        return {}


def _first_of_each(checkpoint: Checkpoint) -> dict[str, ModuleSummary]:
    kinds: dict[tuple[Any, ...], tuple[str, ModuleSummary]] = {}
    for name in checkpoint.quantized:
        summary = checkpoint.summary(name)
        kinds.setdefault((summary.in_features, summary.bits, summary.group_size, summary.sym), (name, summary))
    return dict(kinds.values())


def _reason_against(config: Any, name: str, summary: ModuleSummary) -> str:
    """Why vLLM would refuse a layer; empty if it would not."""
    K, N = summary.in_features, summary.out_features
    if K % summary.group_size:
        return f"the last of its groups of {summary.group_size} is partial, as it has {K} inputs"
    refused = _error_of(config, name, K, N)
    # Parameters know their part of the whole, which nothing does before vLLM has started. There a dense layer ends too.
    if refused is None or _first_line(refused) == _first_line(_error_of(None, name, K, N)):
        return ""
    return _first_line(refused)


def _error_of(config: Any, name: str, K: int, N: int) -> Exception | None:
    """What vLLM raises when it makes a layer of a config, or a dense layer of None."""
    try:
        with torch.device("meta"):
            layer = LinearBase(K, N, params_dtype=torch.bfloat16, quant_config=config, prefix=name, disable_tp=True)
            layer.quant_method.create_weights(layer, K, [N], K, N, torch.bfloat16, weight_loader=_load_nothing)
    except Exception as error:
        return error
    return None


def _load_nothing(*arguments: Any) -> None:
    """Stands for a loader of weights."""


def _first_line(error: Exception | None) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
