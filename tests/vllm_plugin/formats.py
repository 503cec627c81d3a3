"""The formats of checkpoints that vLLM knows, written from the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from exllama_ops import GptqWeight, save_gptq
from exllama_ops.layout import unpack_columns, unpack_rows

if TYPE_CHECKING:
    from vllm_plugin.cases import Kind


def write_gptq(
    kind: Kind, path: Path, weights: dict[str, GptqWeight], tensors: dict[str, Tensor], fields: dict[str, Any]
) -> None:
    """The format of GPTQ, in either version."""
    save_gptq(
        path, weights, tensors, sym=kind.sym, desc_act=kind.act_order, config=fields | {"dtype": "float16"},
        checkpoint_format=kind.checkpoint_format,
    )  # fmt: skip


def write_autoround(
    kind: Kind, path: Path, weights: dict[str, GptqWeight], tensors: dict[str, Tensor], fields: dict[str, Any]
) -> None:
    """The tensors of GPTQ's first format under a config of AutoRound."""
    write_gptq(kind._replace(checkpoint_format="gptq"), path, weights, tensors, fields)
    said = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int"}
    said |= {"bits": kind.bits, "group_size": kind.group_size, "sym": kind.sym}
    _write_config(path, fields | {"quantization_config": said})
    (path / "quantize_config.json").unlink(missing_ok=True)


def write_awq(
    kind: Kind, path: Path, weights: dict[str, GptqWeight], tensors: dict[str, Tensor], fields: dict[str, Any]
) -> None:
    """Words along columns, in an order of their own."""
    stored = dict(tensors)
    for name, weight in weights.items():
        stored[f"{name}.qweight"] = _awq_words(unpack_rows(weight.qweight, 4))
        stored[f"{name}.qzeros"] = _awq_words(unpack_columns(weight.qzeros, 4))
        stored[f"{name}.scales"] = weight.scales
    said = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": kind.group_size, "zero_point": True}
    _write_files(path, stored, fields | {"quantization_config": said})


def _awq_words(values: Tensor) -> Tensor:
    """Values of 4 bits (R, N) -> words (R, N / 8), in the order in which AutoAWQ has the columns of a word."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for field, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        words |= values[:, column::8].long() << (4 * field)
    return words.to(torch.int32)


def write_compressed(
    kind: Kind, path: Path, weights: dict[str, GptqWeight], tensors: dict[str, Tensor], fields: dict[str, Any]
) -> None:
    """GPTQ's second format, transposed."""
    stored = dict(tensors)
    for name, weight in weights.items():
        stored[f"{name}.weight_packed"] = weight.qweight.t().contiguous()
        stored[f"{name}.weight_scale"] = weight.scales.t().contiguous()
        stored[f"{name}.weight_shape"] = torch.tensor([weight.out_features, weight.in_features])
        if not kind.sym:
            stored[f"{name}.weight_zero_point"] = weight.qzeros.t().contiguous()
        if weight.g_idx is not None:
            stored[f"{name}.weight_g_idx"] = weight.g_idx
    channel = kind.group_size == -1
    said = {"num_bits": kind.bits, "type": "int", "symmetric": kind.sym, "dynamic": False}
    said |= {"strategy": "channel" if channel else "group", "group_size": None if channel else kind.group_size}
    said |= {"actorder": "group" if kind.act_order else None}
    group = {"targets": ["Linear"], "weights": said, "input_activations": None, "output_activations": None}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    config |= {"ignore": ["lm_head"], "quantization_status": "compressed"}
    _write_files(path, stored, fields | {"quantization_config": config})


def _write_files(path: Path, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    _write_config(path, fields)


def _write_config(path: Path, fields: dict[str, Any]) -> None:
    (path / "config.json").write_text(json.dumps(fields | {"dtype": "float16"}))


WRITERS: dict[str, Callable[..., None]] = {
    "gptq": write_gptq,
    "auto-round": write_autoround,
    "awq": write_awq,
    "compressed-tensors": write_compressed,
}
