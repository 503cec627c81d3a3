"""Converting a checkpoint of any format that is read here into GPTQ, file by file."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exllama_ops.checkpoint.base import Checkpoint
from exllama_ops.checkpoint.disk import list_directory, read_json
from exllama_ops.checkpoint.dynamic import exact_rule
from exllama_ops.checkpoint.errors import CheckpointError
from exllama_ops.checkpoint.fields import CONFIG_FIELDS, CONFIG_NAME
from exllama_ops.checkpoint.journal import NAME, Journal, OpenShard
from exllama_ops.checkpoint.on_disk import file_tensors, quantization_config
from exllama_ops.checkpoint.zeros import are_constant
from exllama_ops.progress import Notify, ignore

FORMATS = ("gptq_v2", "gptq")
MAX_SHARD_BYTES = 2_000_000_000

# What belongs to a model beside its weights: tokenizer, chat template, generation config, processors, code, licence.
_OTHERS = re.compile(r".*\.(json|jinja|model|txt|tiktoken|py)|tokenizer.*|LICENSE.*", re.IGNORECASE)
_CONFIGS = re.compile(r"(quant|quantize|quantization)_config\.json|.*\.index\.json|config\.json", re.IGNORECASE)
# The first block that a module lies in, such as "model.layers.0.".
_BLOCK = re.compile(r".*?\.\d+\.")


@dataclass(frozen=True)
class Conversion:
    """What a conversion has written.

    Args:
        path: the directory.
        checkpoint_format: "gptq_v2" or "gptq".
        modules: how many quantized modules it has.
        tensors: how many other tensors.
        files: how many files with weights.
        files_kept: how many of them an earlier process had finished.
        num_bytes: of all tensors.
    """

    path: Path
    checkpoint_format: str
    modules: int
    tensors: int
    files: int
    files_kept: int
    num_bytes: int


def convert_checkpoint(
    source: Checkpoint,
    destination: str | os.PathLike[str],
    *,
    checkpoint_format: str = "gptq_v2",
    config: Mapping[str, Any] | None = None,
    write_others: Callable[[Path], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    notify: Notify = ignore,
) -> Conversion:
    """Write a checkpoint as GPTQ, exactly, with about one file of it in memory.

    A process that was stopped, also by SIGKILL, leaves no config.json. The same call then goes on: files that are there
    and whole are kept.

    Args:
        source: of any format, as `open_checkpoint` opens it.
        destination: a new or empty directory outside of the source, or one where the same conversion was stopped.
        checkpoint_format: "gptq_v2", zero points as they are, or "gptq", minus 1 by the rule of GPTQModel.
        config: contents of config.json; None for those of the source.
        write_others: writes tokenizer and the like into a directory; None copies those of the source.
        max_shard_bytes: the most that a file holds, unless a single module is larger.
        notify: takes the steps.

    Returns:
        What was written.

    Raises:
        CheckpointError: the destination is not as it must be, cannot be written, or the source is broken.
        ImportError: the extra ``hf`` is not installed.
    """
    if checkpoint_format not in FORMATS:
        raise CheckpointError(f"{NAME}: checkpoint_format must be one of {FORMATS}; got {checkpoint_format!r}")
    directory = Path(destination)
    _check_apart(source.path, directory)
    if config is None:
        config = read_json(source.path / CONFIG_NAME)
    journal = Journal(directory, _task(source, checkpoint_format, max_shard_bytes), notify)
    kept = len(journal.shards)
    _write_shards(source, journal, checkpoint_format, max_shard_bytes, notify)

    layers = {name: kind for shard in journal.shards for name, kind in shard.layers.items()}
    quantization = quantization_config(
        layers,
        all(shard.sym for shard in journal.shards),
        any(shard.desc_act for shard in journal.shards),
        checkpoint_format,
    )
    dense: dict[str, Any] = {f"-:{exact_rule(name)}": {} for name in _dense_neighbours(source)}
    if dense:
        quantization["dynamic"] = quantization.get("dynamic", {}) | dense
    rest = {name: value for name, value in config.items() if name not in CONFIG_FIELDS}
    journal.publish(rest | {"quantization_config": quantization}, write_others or _copier(source.path))
    return Conversion(
        directory,
        checkpoint_format,
        len(source.quantized),
        len(source.dense),
        len(journal.shards),
        kept,
        sum(shard.num_bytes for shard in journal.shards),
    )


def _check_apart(source: Path, destination: Path) -> None:
    """Check that neither of two paths lies in the other, links followed."""
    here, there = Path(os.path.realpath(source)), Path(os.path.realpath(destination))
    if here == there or here in there.parents or there in here.parents:
        raise CheckpointError(f"{NAME}: {destination}: must lie outside of the checkpoint that is read; got {source}")


def _task(source: Checkpoint, checkpoint_format: str, max_shard_bytes: int) -> dict[str, Any]:
    """What tells a conversion from others: the files of the source, and how they are written."""
    files = [source.path / name for name in list_directory(source.path)] if source.path.is_dir() else [source.path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return {
        "source": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "quantization_config": dict(source.quantization),
        "checkpoint_format": checkpoint_format,
        "max_shard_bytes": max_shard_bytes,
    }


def _write_shards(
    source: Checkpoint, journal: Journal, checkpoint_format: str, max_shard_bytes: int, notify: Notify
) -> None:
    """Write what is not there yet. A file ends where the next module does not fit, whoever began to write."""
    there = {item for shard in journal.shards for item in shard.items}
    names = [*source.quantized, *source.dense]
    quantized = set(source.quantized)
    step = f"converting {source.format} to {checkpoint_format}"
    shard = OpenShard()
    for number, name in enumerate(names):
        if name in there:
            continue
        notify(step, number, len(names), name)
        weight = source.read(name) if name in quantized else None
        tensors = (
            {name: source.read_tensor(name)} if weight is None else dict(file_tensors(name, weight, checkpoint_format))
        )
        if shard.items and shard.num_bytes + sum(tensor.nbytes for tensor in tensors.values()) > max_shard_bytes:
            journal.add(shard)
            shard = OpenShard()
        shard.items.append(name)
        shard.tensors |= tensors
        if weight is not None:
            shard.layers[name] = (weight.bits, weight.group_size, weight.in_features)
            shard.sym &= are_constant(weight.qzeros, 2 ** (weight.bits - 1), weight.bits)
            shard.desc_act |= weight.g_idx is not None
    if shard.items:
        journal.add(shard)
        notify(step, len(names), len(names))


def _dense_neighbours(source: Checkpoint) -> list[str]:
    """Dense matrices within the blocks of the quantized modules: other tools take these for quantized ones too."""
    blocks = {block.group() for name in source.quantized if (block := _BLOCK.match(name))}
    names = [name.removesuffix(".weight") for name in source.dense if name.endswith(".weight")]
    return [
        name
        for name in names
        if (block := _BLOCK.match(name)) and block.group() in blocks and len(source.tensor_shape(f"{name}.weight")) == 2
    ]


def _copier(source: Path) -> Callable[[Path], None]:
    """Copies what belongs to a model beside its weights and its quantization."""

    def copy(directory: Path) -> None:
        for name in list_directory(source):
            if _OTHERS.fullmatch(name) and not _CONFIGS.fullmatch(name) and (source / name).is_file():
                shutil.copyfile(source / name, directory / name)

    return copy
