"""Writing a GPTQ checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from exllama_ops.checkpoint.choice import INDEX_NAME, SINGLE_NAME
from exllama_ops.checkpoint.disk import list_directory
from exllama_ops.checkpoint.dynamic import exact_rule
from exllama_ops.checkpoint.errors import CheckpointError
from exllama_ops.checkpoint.fields import CONFIG_NAME, QUANTIZE_CONFIG_NAME
from exllama_ops.checkpoint.module import TENSORS
from exllama_ops.checkpoint.zeros import are_constant, v2_to_v1
from exllama_ops.extras import require
from exllama_ops.layout import GptqWeight
from exllama_ops.layout.groups import num_groups, row_groups

_OWN_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def save_gptq(
    path: str | os.PathLike[str],
    weights: Mapping[str, GptqWeight],
    tensors: Mapping[str, Tensor] | None = None,
    *,
    sym: bool,
    desc_act: bool,
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq_v2",
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a GPTQ checkpoint that `open_gptq` and other tools read.

    Files are written under temporary names and then renamed, config.json last. So the directory never holds what looks
    like a checkpoint and is not whole. A former checkpoint in it is replaced.

    Args:
        path: the directory, made if there is none.
        weights: module name -> weight; it may be lazy, as ``Checkpoint.weights()`` is.
        tensors: name -> any other tensor of the model.
        sym: whether all zero points are ``2**(bits - 1)``.
        desc_act: whether weights may have a ``g_idx``.
        checkpoint_format: "gptq_v2", zero points as they are, or "gptq", minus 1 by the rule of GPTQModel.
        config: contents of config.json, to which ``quantization_config`` is added.
        max_shard_bytes: the most that a file holds, unless a single tensor is larger.

    Raises:
        CheckpointError: the arguments contradict each other, and the text names the module or tensor. Or the directory
            cannot be written, and nothing of what was begun stays there.
        ImportError: the extra ``hf`` is not installed.
    """
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"save_gptq: checkpoint_format must be 'gptq' or 'gptq_v2'; got {checkpoint_format!r}")
    if not weights:
        raise CheckpointError("save_gptq: weights must hold at least one module; got none")
    layers: dict[str, tuple[int, int, int]] = {}
    shards = _ShardWriter(Path(path), max_shard_bytes)
    try:
        for name, weight in weights.items():
            _check(name, weight, sym, desc_act)
            layers[name] = (weight.bits, weight.group_size, weight.in_features)
            for tensor_name, tensor in file_tensors(name, weight, checkpoint_format):
                shards.add(tensor_name, tensor)
        for tensor_name, tensor in (tensors or {}).items():
            module, _, kind = tensor_name.rpartition(".")
            if module in layers and kind in (*TENSORS, "weight"):
                raise CheckpointError(f"save_gptq: tensor {tensor_name}: {module} is quantized and has its own")
            shards.add(tensor_name, tensor)
        shards.flush()

        quantization = quantization_config(layers, sym, desc_act, checkpoint_format)
        shards.write_json(QUANTIZE_CONFIG_NAME, quantization)
        shards.write_json(CONFIG_NAME, {**(config or {}), "quantization_config": quantization})
        shards.publish()
    finally:
        shards.discard()


def _check(name: str, weight: GptqWeight, sym: bool, desc_act: bool) -> None:
    if weight.g_idx is not None and not desc_act:
        raise CheckpointError(f"save_gptq: module {name} has a g_idx (activation order), but desc_act=False")
    middle = 2 ** (weight.bits - 1)
    if sym and not are_constant(weight.qzeros.cpu(), middle, weight.bits):
        raise CheckpointError(f"save_gptq: sym=True says that all zero points are {middle}; those of {name} are not")
    G, groups = weight.scales.shape[0], num_groups(weight.in_features, weight.group_size)
    if groups != G:
        raise CheckpointError(
            f"save_gptq: scales of {name} must have ceil(K / group_size) = {groups} rows for K={weight.in_features}, "
            f"group_size={weight.group_size}; got {G} (a shard of a weight cannot be saved)"
        )


def file_tensors(name: str, weight: GptqWeight, checkpoint_format: str) -> Iterator[tuple[str, Tensor]]:
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
    layers: Mapping[str, tuple[int, int, int]], sym: bool, desc_act: bool, checkpoint_format: str
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


def _is_own(name: str) -> bool:
    """Whether a file of this name belongs to a former checkpoint, which is replaced."""
    return name in (CONFIG_NAME, QUANTIZE_CONFIG_NAME, INDEX_NAME) or _OWN_FILES.fullmatch(name) is not None


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """What the system refuses and what no file can hold becomes a CheckpointError."""
    refused = (OSError, ValueError, TypeError, RecursionError, require("safetensors").SafetensorError)
    try:
        yield
    except refused as error:
        raise CheckpointError(f"save_gptq: {directory}: cannot be written: {error}") from error


class _ShardWriter:
    """Collects tensors into files of bounded size under temporary names, and gives them their names in one go."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        with _writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        for name in list_directory(directory):
            if _is_own(name) and (directory / name).is_dir():
                raise CheckpointError(f"save_gptq: {directory / name}: must be a file, to be replaced; got a directory")
        self._directory = directory
        self._max_bytes = max_bytes
        self._save_file = require("safetensors.torch").save_file
        self._open: dict[str, Tensor] = {}
        self._open_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total_bytes = 0
        self._temporary: dict[str, Path] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.nbytes
        if self._open and self._open_bytes + size > self._max_bytes:
            self.flush()
        self._open[name] = tensor
        self._open_bytes += size
        self._total_bytes += size

    def flush(self) -> None:
        """Write what was collected as one shard."""
        storages: set[int] = set()
        for name, tensor in self._open.items():
            tensor = tensor.detach().cpu().contiguous()
            # safetensors refuses tensors that share memory, such as the one g_idx of fused projections.
            self._open[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
            storages.add(self._open[name].untyped_storage().data_ptr())
        file = self._temporary_path(f"shard-{len(self._shards)}")
        self._shards.append((file, list(self._open)))
        with _writing(self._directory):
            self._save_file(self._open, file, metadata={"format": "pt"})
        self._open = {}
        self._open_bytes = 0

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        file = self._temporary_path(name)
        self._temporary[name] = file
        with _writing(self._directory / name):
            file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def publish(self) -> None:
        """Rename all files; until config.json, the last, is there, the directory is no checkpoint."""
        count = len(self._shards)
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE_NAME]
        if count > 1:
            named = zip(names, self._shards, strict=True)
            weight_map = {tensor: name for name, (_, members) in named for tensor in members}
            self.write_json(INDEX_NAME, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})
        with _writing(self._directory):
            for name in (CONFIG_NAME, QUANTIZE_CONFIG_NAME):
                (self._directory / name).unlink(missing_ok=True)
            for name in list_directory(self._directory):
                if _is_own(name):
                    (self._directory / name).unlink()
            # safetensors makes files that only their owner reads; config.json has the mode that this process gives one.
            mode = self._temporary[CONFIG_NAME].stat().st_mode
            for name, (file, _) in zip(names, self._shards, strict=True):
                file.chmod(mode)
                file.replace(self._directory / name)
            for name in (INDEX_NAME, QUANTIZE_CONFIG_NAME, CONFIG_NAME):
                if name in self._temporary:
                    self._temporary[name].replace(self._directory / name)

    def discard(self) -> None:
        """Remove what was not published."""
        for file in [*self._temporary.values(), *(file for file, _ in self._shards)]:
            with suppress(OSError):  # what could not be written may not be there, and the error is under way
                file.unlink()

    def _temporary_path(self, name: str) -> Path:
        return self._directory / f".{name}.{os.getpid()}.tmp"
