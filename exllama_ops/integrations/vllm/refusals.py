"""Why vLLM itself would refuse a checkpoint, asked of vLLM's own rules."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.quantization import auto_gptq
from vllm.model_executor.layers.quantization.utils.marlin_utils import verify_marlin_supported

from exllama_ops.checkpoint import Checkpoint, CheckpointError, ModuleSummary, open_checkpoint
from exllama_ops.checkpoint.files import is_hub_id
from exllama_ops.checkpoint.hub import fetch_headers


def reasons(raw: Mapping[str, Any], hf_config: Any) -> list[str]:
    """Every reason for which vLLM would refuse a GPTQ checkpoint; none if it would run it, or if that is not known.

    Args:
        raw: the quantization config of the files.
        hf_config: of the model, which knows where the files are.
    """
    if str(raw.get("quant_method", "")).lower() != "gptq":
        return []
    try:
        auto_gptq.AutoGPTQConfig.from_config(dict(raw))
    except (ValueError, KeyError) as error:
        return [_first_line(error)]
    found: dict[str, None] = {}
    for kind, summary in _kinds(hf_config).items():
        if reason := _reason_against(summary):
            found[f"{kind}: {reason}"] = None
    return list(found)


def _kinds(hf_config: Any) -> dict[str, ModuleSummary]:
    """One layer for each kind of them in the files, as far as headers tell; none if there are no files yet."""
    model = getattr(hf_config, "_name_or_path", "") or ""
    try:
        if is_hub_id(model):
            with tempfile.TemporaryDirectory() as folder:
                return _first_of_each(open_checkpoint(fetch_headers(model, None, Path(folder))))
        return _first_of_each(open_checkpoint(model))
    except (CheckpointError, ImportError):
        return {}


def _first_of_each(checkpoint: Checkpoint) -> dict[str, ModuleSummary]:
    kinds: dict[tuple[Any, ...], tuple[str, ModuleSummary]] = {}
    for name in checkpoint.quantized:
        summary = checkpoint.summary(name)
        kinds.setdefault((summary.in_features, summary.bits, summary.group_size, summary.sym), (name, summary))
    return dict(kinds.values())


def _reason_against(summary: ModuleSummary) -> str:
    """Why vLLM would refuse a layer; empty if it would not."""
    kind = auto_gptq.AutoGPTQConfig.TYPE_MAP.get((summary.bits, summary.sym))
    if kind is None:
        return f"bits={summary.bits}, sym={summary.sym} is no type of vLLM's"
    group_size = -1 if summary.group_size == summary.in_features else summary.group_size
    if group_size > 0 and summary.in_features % group_size:
        return f"the last of its groups of {group_size} is partial, as it has {summary.in_features} inputs"
    try:
        verify_marlin_supported(quant_type=kind, group_size=group_size)
        choose_mp_linear_kernel(
            MPLinearLayerConfig(
                full_weight_shape=(summary.in_features, summary.out_features),
                partition_weight_shape=(summary.in_features, summary.out_features),
                weight_type=kind,
                act_type=torch.bfloat16,
                group_size=group_size,
                zero_points=False,
            )
        )
    except (ValueError, AssertionError) as error:
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
