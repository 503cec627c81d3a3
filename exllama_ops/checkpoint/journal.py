"""Files of a checkpoint that is written bit by bit: what is finished is written down, so that another process goes on.

Until all files are there they have names that no reader of checkpoints takes. ``.convert.json`` says which are whole,
and of which source. config.json comes last, so a process may be killed at any time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from exllama_ops.checkpoint.choice import INDEX_NAME
from exllama_ops.checkpoint.disk import list_directory, read_json
from exllama_ops.checkpoint.errors import CheckpointError
from exllama_ops.checkpoint.fields import CONFIG_NAME, QUANTIZE_CONFIG_NAME
from exllama_ops.checkpoint.on_disk import Kind, shard_index, shard_names, write_json, write_tensors, writing
from exllama_ops.progress import Notify

NAME = "convert"

_PREFIX = ".convert"
_JOURNAL = ".convert.json"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Shard:
    """What one file has.

    Args:
        items: the modules and dense tensors of the source that it has.
        tensors: names of its tensors.
        num_bytes: of its tensors.
        sha256: of the file.
        layers: bits, group size and K of its modules.
        sym: whether all zero points of its modules are ``2**(bits - 1)``.
        desc_act: whether one of its modules has an activation order.
    """

    items: list[str]
    tensors: list[str]
    num_bytes: int
    sha256: str
    layers: dict[str, Kind]
    sym: bool
    desc_act: bool


@dataclass
class OpenShard:
    """What the next file is to have; the fields are those of `Shard`."""

    items: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Kind] = field(default_factory=dict)
    sym: bool = True
    desc_act: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Journal:
    """A directory that a checkpoint is written into, with what an earlier process has finished there.

    Args:
        directory: new, empty, or one where the same task was stopped.
        task: what is written and how; JSON that is equal for the same task alone.
        notify: takes the steps.

    Attributes:
        shards: the files that are there and whole.

    Raises:
        CheckpointError: the directory has something else, or another task.
    """

    def __init__(self, directory: Path, task: Mapping[str, Any], notify: Notify) -> None:
        self._directory = directory
        self._task = task
        self.shards: list[Shard] = []
        check_free(directory)
        with writing(NAME, directory):
            directory.mkdir(parents=True, exist_ok=True)
        if _JOURNAL in list_directory(directory):
            self._go_on(notify)
        else:
            self._write()

    def add(self, shard: OpenShard) -> None:
        """Write a file, and write down that it is there."""
        file = self._file(len(self.shards))
        unfinished = file.with_name(f"{file.name}.tmp")
        with writing(NAME, self._directory):
            write_tensors(unfinished, shard.tensors)
            digest = _sha256(unfinished)
            _sync(unfinished)
            unfinished.replace(file)
        names = list(shard.tensors)
        self.shards.append(Shard(shard.items, names, shard.num_bytes, digest, shard.layers, shard.sym, shard.desc_act))
        self._write()

    def publish(self, config: Mapping[str, Any], write_others: Callable[[Path], None]) -> None:
        """Give all files their names. config.json is the last.

        Args:
            config: contents of config.json, with its quantization_config.
            write_others: writes the files of the tokenizer and the like into a directory.
        """
        names = shard_names(len(self.shards))
        with writing(NAME, self._directory):
            write_others(self._directory)
            # safetensors makes files that only their owner reads.
            mode = (self._directory / _JOURNAL).stat().st_mode
            for number, name in enumerate(names):
                if self._file(number).exists():
                    self._file(number).chmod(mode)
                    self._file(number).replace(self._directory / name)
            if len(names) > 1:
                members = {name: shard.tensors for name, shard in zip(names, self.shards, strict=True)}
                self._replace_json(INDEX_NAME, shard_index(members, sum(shard.num_bytes for shard in self.shards)))
            self._replace_json(QUANTIZE_CONFIG_NAME, config["quantization_config"])
            self._replace_json(CONFIG_NAME, config)
            for name in list_directory(self._directory):
                if name.startswith(_PREFIX):
                    (self._directory / name).unlink()

    def _go_on(self, notify: Notify) -> None:
        """Take what is there and whole."""
        journal = self._directory / _JOURNAL
        found = read_json(journal)
        if found.get("task") != self._task:
            raise CheckpointError(
                f"{NAME}: {self._directory}: must have the same conversion that is to go on; the one there was stopped "
                "with another source or other options. Remove the folder, or name another one"
            )
        try:
            shards = [
                Shard(**shard | {"layers": {name: tuple(kind) for name, kind in shard["layers"].items()}})
                for shard in found["shards"]
            ]
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{journal}: must be as {NAME} wrote it: remove the folder, or name another one"
            ) from error
        names = shard_names(len(shards))
        for number, shard in enumerate(shards):
            notify("checking the files that are there", number, len(shards))
            # A process that was stopped while it published has given some files their names.
            for file in (self._file(number), self._directory / names[number]):
                if file.exists() and _sha256(file) == shard.sha256:
                    break
            else:
                break
            self.shards.append(shard)

    def _file(self, number: int) -> Path:
        return self._directory / f"{_PREFIX}-{number:05}"

    def _write(self) -> None:
        with writing(NAME, self._directory):
            self._replace_json(_JOURNAL, {"task": self._task, "shards": [asdict(shard) for shard in self.shards]})

    def _replace_json(self, name: str, value: Mapping[str, Any]) -> None:
        unfinished = self._directory / f"{_PREFIX}-{name}.tmp"
        write_json(unfinished, value)
        _sync(unfinished)
        unfinished.replace(self._directory / name)


def check_free(directory: Path) -> None:
    """Check that a directory is new or empty, or has a conversion that was stopped.

    Raises:
        CheckpointError: it has something else; the text names it.
    """
    if not directory.is_dir():
        return
    names = list_directory(directory)
    others = [name for name in names if not name.startswith(_PREFIX)]
    if others and _JOURNAL not in names:
        raise CheckpointError(
            f"{NAME}: {directory}: must be new or empty, or have a conversion that was stopped; it has {others[0]}"
            f"{f' and {len(others) - 1} more' if others[1:] else ''}"
        )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(file: Path) -> None:
    """Wait until a file is on the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
