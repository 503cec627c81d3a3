"""Writing a GPTQ checkpoint."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from exllama_ops.checkpoint.choice import INDEX_NAME
from exllama_ops.checkpoint.disk import list_directory
from exllama_ops.checkpoint.errors import CheckpointError
from exllama_ops.checkpoint.fields import CONFIG_NAME, QUANTIZE_CONFIG_NAME
from exllama_ops.checkpoint.module import TENSORS
from exllama_ops.checkpoint.on_disk import (
    Kind,
    file_tensors,
    quantization_config,
    shard_index,
    shard_names,
    write_json,
    write_tensors,
    writing,
)
from exllama_ops.checkpoint.zeros import are_constant
from exllama_ops.layout import GptqWeight
from exllama_ops.layout.groups import num_groups

NAME = "save_gptq"

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
        config: contents of config.json, to which ``quantization_config`` is added. Servers look up the class of a model
            by its ``architectures``.
        max_shard_bytes: the most that a file holds, unless a single tensor is larger.

    Raises:
        CheckpointError: the arguments contradict each other, and the text names the module or tensor. Or the directory
            cannot be written, and nothing of what was begun stays there.
        ImportError: the extra ``hf`` is not installed.

    Warns:
        UserWarning: config names no architectures.
    """
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"save_gptq: checkpoint_format must be 'gptq' or 'gptq_v2'; got {checkpoint_format!r}")
    if not weights:
        raise CheckpointError("save_gptq: weights must hold at least one module; got none")
    if config is not None and not config.get("architectures"):
        warnings.warn(
            "save_gptq: config should name the model's class, as architectures=[type(model).__name__], which servers "
            f"ask for; got {config.get('architectures')!r}",
            stacklevel=2,
        )
    layers: dict[str, Kind] = {}
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


def _is_own(name: str) -> bool:
    """Whether a file of this name belongs to a former checkpoint, which is replaced."""
    return name in (CONFIG_NAME, QUANTIZE_CONFIG_NAME, INDEX_NAME) or _OWN_FILES.fullmatch(name) is not None


class _ShardWriter:
    """Collects tensors into files of bounded size under temporary names, and gives them their names in one go."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        with writing(NAME, directory):
            directory.mkdir(parents=True, exist_ok=True)
        for name in list_directory(directory):
            if _is_own(name) and (directory / name).is_dir():
                raise CheckpointError(f"save_gptq: {directory / name}: must be a file, to be replaced; got a directory")
        self._directory = directory
        self._max_bytes = max_bytes
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
        file = self._temporary_path(f"shard-{len(self._shards)}")
        self._shards.append((file, list(self._open)))
        with writing(NAME, self._directory):
            write_tensors(file, self._open)
        self._open = {}
        self._open_bytes = 0

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        file = self._temporary_path(name)
        self._temporary[name] = file
        with writing(NAME, self._directory / name):
            write_json(file, value)

    def publish(self) -> None:
        """Rename all files; until config.json, the last, is there, the directory is no checkpoint."""
        names = shard_names(len(self._shards))
        if len(names) > 1:
            members = dict(zip(names, (tensors for _, tensors in self._shards), strict=True))
            self.write_json(INDEX_NAME, shard_index(members, self._total_bytes))
        with writing(NAME, self._directory):
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
