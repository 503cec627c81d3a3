"""What a GPTQ checkpoint has on disk: the tensors of a weight, the quantization config, a file of tensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exllama_ops.checkpoint.choice import SINGLE_NAME
from exllama_ops.checkpoint.dynamic import exact_rule
from exllama_ops.checkpoint.errors import CheckpointError
from exllama_ops.checkpoint.zeros import v2_to_v1
from exllama_ops.extras import require
from exllama_ops.layout import GptqWeight
from exllama_ops.layout.groups import row_groups

# bits, group_size and K of a module.
Kind = tuple[int, int, int]


def file_tensors(name: str, weight: GptqWeight, checkpoint_format: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a file has of one weight, with their names."""
    g_idx = weight.g_idx
    if g_idx is None:
        # Other tools require the tensor.
        g_idx = row_groups(weight.in_features, weight.scales.shape[0], weight.group_size, torch.device("cpu"))
    yield f"{name}.qweight", weight.qweight
    yield f"{name}.qzeros", v2_to_v1(weight.qzeros, weight.bits) if checkpoint_format == "gptq" else weight.qzeros
    yield f"{name}.scales", weight.scales
    yield f"{name}.g_idx", g_idx
    if weight.bias is not None:
        yield f"{name}.bias", weight.bias


def quantization_config(
    layers: Mapping[str, Kind], sym: bool, desc_act: bool, checkpoint_format: str
) -> dict[str, Any]:
    """The most common bits and group size for all, and a `dynamic` rule for each module that differs."""
    per_channel = all(group_size == K for _, group_size, K in layers.values())
    kinds = {name: (bits, -1 if per_channel else size) for name, (bits, size, _) in layers.items()}
    (bits, group_size), _ = Counter(kinds.values()).most_common(1)[0]
    dynamic = {
        f"+:{exact_rule(name)}": {"bits": kind[0], "group_size": kind[1]}
        for name, kind in kinds.items()
        if kind != (bits, group_size)
    }
    return {
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": desc_act,
        "static_groups": False,
        "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in layers),
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


@contextmanager
def writing(caller: str, path: Path) -> Iterator[None]:
    """What the system refuses and what no file can hold becomes a CheckpointError."""
    refused = (OSError, ValueError, TypeError, RecursionError, require("safetensors").SafetensorError)
    try:
        yield
    except refused as error:
        raise CheckpointError(f"{caller}: {path}: cannot be written: {error}") from error


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, and wait until it is on the disk."""
    storages: set[int] = set()
    written: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, such as the one g_idx of fused projections.
        written[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(written[name].untyped_storage().data_ptr())
    require("safetensors.torch").save_file(written, file, metadata={"format": "pt"})


def shard_names(count: int) -> list[str]:
    """The names of the files of a checkpoint that has this many."""
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE_NAME]


def shard_index(shards: Mapping[str, Iterable[str]], total_bytes: int) -> dict[str, Any]:
    """The index of a checkpoint: file -> its tensors, turned around."""
    weight_map = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    return {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON file."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
