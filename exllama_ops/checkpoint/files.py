"""The safetensors files of a checkpoint: which they are, what they hold, and reading it tensor by tensor."""

from __future__ import annotations

import math
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from exllama_ops.checkpoint.disk import file_type, list_directory, open_file, read_json
from exllama_ops.checkpoint.errors import CheckpointError, shown
from exllama_ops.extras import require

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_CONFIGS = ["*.json"]
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "tokenizer*"]
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def local_directory(path_or_id: str | os.PathLike[str], revision: str | None, *, configs_only: bool = False) -> Path:
    """The directory that a path or hub id names, downloaded into the hub's cache if it is an id.

    Args:
        path_or_id: a directory, or a hub id such as ``owner/name``.
        revision: branch, tag or commit of a hub id.
        configs_only: leave the weights and the tokenizer out of the download.

    Raises:
        CheckpointError: there is no such directory, or the download failed.
        ImportError: a hub id needs huggingface_hub.
    """
    path = Path(path_or_id)
    kind = file_type(path)
    if kind == stat.S_IFDIR:
        if revision is not None:
            raise CheckpointError(f"{path}: revision is for hub ids, and this is a local directory; got {revision!r}")
        return path
    name = os.fspath(path_or_id)
    if kind is not None or isinstance(path_or_id, os.PathLike) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: must be an existing directory or a hub id (owner/name); it is neither")
    hub = require("huggingface_hub")
    patterns = _HUB_CONFIGS if configs_only else _HUB_FILES
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's errors share no base class
        raise CheckpointError(
            f"{name}: no such directory here, and it could not be downloaded from the hub: {error}\n"
            f"Without a network: run `hf download {name} --local-dir DIR` on a machine that has one, and give DIR."
        ) from error


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor; ``dtype`` as in the header: "I32", "F16", ..."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the data: the first number of a dtype's name is its width in bits; "BOOL" takes a byte."""
        width = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(width.group()) if width else 8) // 8


class TensorFiles:
    """The tensors of a directory of safetensors files.

    Making one reads the headers. Reading a tensor maps its file for as long as the tensor lives. A mapping that was
    kept would count every page that was ever read as memory of the process.

    Args:
        directory: where the files are.

    Attributes:
        tensors: name -> what the header says, in the order of the files and of the data in them.

    Raises:
        CheckpointError: no safetensors, or a file that is broken, missing or contradicts the index.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        names, weight_map = _file_names(directory)
        strays: list[str] = []
        for file_name in names:
            for name, info in _header(directory / file_name).items():
                if weight_map is None or weight_map.get(name) == file_name:
                    self.tensors[name] = info
                else:
                    strays.append(f"{name} of {file_name}")
        for name, file_name in (weight_map or {}).items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"{directory / file_name}: tensor {name} is missing: the index says that this file has it"
                )
        if strays:
            warnings.warn(f"{directory}: not in the index, so ignored: {', '.join(strays)}", stacklevel=4)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Map tensors on the CPU, each file opened once; a tensor keeps its mapping until it is freed.

        Raises:
            CheckpointError: a file is gone or changed.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        result: dict[str, Tensor] = {}
        for file, members in by_file.items():
            with _open(file) as handle:
                held = set(handle.keys())
                for name in members:
                    tensor = handle.get_tensor(name) if name in held else None
                    if tensor is None or tuple(tensor.shape) != self.tensors[name].shape:
                        raise CheckpointError(
                            f"{file}: tensor {name} is not what it was when the checkpoint was opened"
                        )
                    result[name] = tensor
        return result


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """A file as safetensors opens it; whatever it raises until it is closed becomes a CheckpointError."""
    safetensors = require("safetensors")
    with open_file(file) as opened:
        # The library opens by name. Linux has one for what was opened, and checked, here.
        name = Path(f"/proc/self/fd/{opened.fileno()}")
        try:
            with safetensors.safe_open(name if name.exists() else file, framework="pt") as handle:
                yield handle
        except CheckpointError:
            raise
        except BaseException as error:
            # A panic of the library's Rust is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            size = os.fstat(opened.fileno()).st_size
            raise CheckpointError(f"{file}: must be a complete safetensors file: {error}; got {size} bytes") from error


def _header(file: Path) -> dict[str, TensorInfo]:
    with _open(file) as handle:
        slices = {name: handle.get_slice(name) for name in handle.offset_keys()}
        return {name: TensorInfo(file, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def _file_names(directory: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """The files to read, and the index (tensor -> file) if there is one."""
    names = list_directory(directory)
    present = [name for name in names if name.endswith(".safetensors")]
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    if SINGLE_NAME in present and indices:
        raise CheckpointError(f"{directory}: must have {SINGLE_NAME} or an index; got both it and {indices[0]}")
    if len(indices) > 1:
        raise CheckpointError(f"{directory}: must have one index; got {', '.join(indices)}")
    if indices:
        weight_map = _weight_map(directory / indices[0])
        return sorted(set(weight_map.values())), weight_map
    if SINGLE_NAME in present:
        return [SINGLE_NAME], None
    if len(present) > 1:
        raise CheckpointError(
            f"{directory}: several safetensors files need an index ({INDEX_NAME}) or one must be {SINGLE_NAME}; got "
            f"{', '.join(present)}"
        )
    if not present:
        pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
        found = f"only pickle files, which can run code when read: {', '.join(pickles)}" if pickles else "none"
        raise CheckpointError(f"{directory}: must have its weights in safetensors files; found {found}")
    return present, None


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map must be a JSON object; got {shown(weight_map)}")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or file != Path(file).name:
            raise CheckpointError(
                f"{index}: weight_map must map each tensor to a file name of this directory; got "
                f"{shown(file)} for {shown(tensor)}"
            )
    return weight_map
