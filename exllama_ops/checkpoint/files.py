"""The safetensors files of a checkpoint: which they are, what they hold, and reading it tensor by tensor."""

from __future__ import annotations

import ctypes
import json
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from exllama_ops.checkpoint.choice import MEANT_FIELDS, choose_files
from exllama_ops.checkpoint.disk import file_type, open_file
from exllama_ops.checkpoint.errors import CheckpointError, shown
from exllama_ops.checkpoint.fields import CONFIG_NAME, QUANTIZE_CONFIG_NAME
from exllama_ops.checkpoint.stacks import unstacked
from exllama_ops.extras import require
from exllama_ops.huge_pages import empty_in_huge_pages

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_CONFIGS = ["*.json"]
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "tokenizer*"]

# As the headers of safetensors name them. Others, such as floats of 4 and 6 bits, are in no layer that computes here.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}

# A file begins with the bytes of its header, which come after this many.
_LENGTH_BYTES = 8


def place_of(
    path_or_id: str | os.PathLike[str], said: Mapping[str, Any] | None
) -> tuple[str | os.PathLike[str], Mapping[str, Any] | None]:
    """A path to a file as the directory of its checkpoint.

    Args:
        path_or_id: a directory, a hub id, a safetensors file, an index or a config.
        said: of the quantization config, as in `fields.read_quantization`.

    Returns:
        The directory or hub id, and what is said. That names the file too, where the directory alone does not.

    Raises:
        CheckpointError: it is another kind of file.
    """
    path = Path(path_or_id)
    if not os.fspath(path_or_id):
        raise CheckpointError("the path must be an existing directory or a hub id (owner/name); got an empty one")
    if file_type(path) != stat.S_IFREG:
        return path_or_id, said
    if path.name in (CONFIG_NAME, QUANTIZE_CONFIG_NAME) or path.name.endswith(".safetensors.index.json"):
        return path.parent, said
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: must be a directory, a hub id (owner/name), a .safetensors file or config.json; got another file"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen = choose_files(path.parent).names
    except CheckpointError:
        chosen = []
    return path.parent, said if path.name in chosen else {**(said or {}), MEANT_FIELDS[0]: path.stem}


def is_hub_id(path_or_id: str | os.PathLike[str]) -> bool:
    """Whether it names a model of the hub, which nothing here has the name of."""
    is_path = isinstance(path_or_id, os.PathLike) or file_type(Path(path_or_id)) is not None
    return not is_path and _HUB_ID.fullmatch(os.fspath(path_or_id)) is not None


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
    if not is_hub_id(path_or_id):
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
    """What a file's header says of one tensor.

    Args:
        file: that has it.
        dtype: as in the header: "I32", "F16", ...
        shape: of the tensor.
        start: where its data begins in the file.
        num_bytes: size of its data.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class TensorFiles:
    """The tensors of a directory of safetensors files.

    Making one reads the headers. Reading a tensor copies its bytes from where the header says that they are. A mapping
    of the file would count every page that was ever read as memory of the process.

    Args:
        directory: where the files are; `choice.choose_files` says which are read.
        meant: the name of the file to read, without its suffix; None for what the directory says.

    Attributes:
        tensors: name -> what the header says, in the order of the files and of the data in them. Those of experts in
            stacks are there one by one.
        stacks: the number of experts by the name of a stack; see `stacks.unstacked`.

    Raises:
        CheckpointError: no safetensors, or a file that is broken, missing or contradicts the index.
    """

    def __init__(self, directory: Path, meant: str | None = None) -> None:
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        self._headers: dict[Path, bytes] = {}
        names, _, weight_map = choose_files(directory, meant, stacklevel=4)
        strays: list[str] = []
        for file_name in names:
            file = directory / file_name
            infos, self._headers[file] = _header(file)
            for name, info in infos.items():
                if weight_map is None and name in self.tensors:
                    other = self.tensors[name].file.name
                    raise CheckpointError(f"{file}: tensor {name} must be in one file; {other} has it too")
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
        self.tensors, self.stacks = unstacked(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """What the header says of one tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.directory}: no tensor {shown(name)}; there are {len(self.tensors)}")
        return info

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor.

        Raises:
            CheckpointError: there is no such tensor, or its dtype is none of PyTorch's.
        """
        return _dtype(name, self.info(name))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors on the CPU, in memory of their own, each file opened once.

        Raises:
            CheckpointError: a file is gone or changed, or a dtype is none of PyTorch's.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        result: dict[str, Tensor] = {}
        for file, members in by_file.items():
            header = self._headers[file]
            with open_file(file) as opened:
                try:
                    # What is there now has its tensors where the header says, if it has the same header.
                    if opened.read(len(header)) != header:
                        raise CheckpointError(
                            f"{file}: tensor {members[0]} is not what it was when the checkpoint was opened"
                        )
                    for name in members:
                        result[name] = _tensor(opened, name, self.tensors[name])
                except OSError as error:
                    raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
        return result


def _dtype(name: str, info: TensorInfo) -> torch.dtype:
    dtype = _DTYPES.get(info.dtype)
    if dtype is None:
        raise CheckpointError(f"{info.file}: tensor {name} must have a dtype of {', '.join(_DTYPES)}; got {info.dtype}")
    return dtype


def _tensor(file: BinaryIO, name: str, info: TensorInfo) -> Tensor:
    """Read one tensor of an opened file."""
    dtype = _dtype(name, info)
    data = empty_in_huge_pages(info.num_bytes)
    try:
        tensor = data.view(dtype).reshape(info.shape)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes that are more than PyTorch counts to
        raise CheckpointError(f"{info.file}: tensor {name} cannot be made: {error}") from error
    if info.num_bytes:
        file.seek(info.start)
        # The memory of the tensor as a buffer, without NumPy, which PyTorch may be installed without.
        memory = (ctypes.c_char * info.num_bytes).from_address(data.data_ptr())
        if file.readinto(memory) != info.num_bytes:  # type: ignore[attr-defined]  # BinaryIO lacks it
            size = os.fstat(file.fileno()).st_size
            raise CheckpointError(
                f"{info.file}: must be a complete safetensors file: tensor {name} ends after the file; got {size} bytes"
            )
    return tensor


@contextmanager
def _checked(file: BinaryIO, path: Path) -> Iterator[Any]:
    """An opened file as safetensors opens it; whatever it raises until it is closed becomes a CheckpointError."""
    safetensors = require("safetensors")
    # The library opens by name. Linux has one for what was opened, and checked, here.
    name = Path(f"/proc/self/fd/{file.fileno()}")
    try:
        with safetensors.safe_open(name if name.exists() else path, framework="pt") as handle:
            yield handle
    except BaseException as error:
        # A panic of the library's Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        size = os.fstat(file.fileno()).st_size
        raise CheckpointError(f"{path}: must be a complete safetensors file: {error}; got {size} bytes") from error


def _header(file: Path) -> tuple[dict[str, TensorInfo], bytes]:
    """What a file has, in the order of its data, and the bytes that it begins with, which say so.

    The library has checked that the header is well-formed, and that its tensors fill the rest of the file.
    """
    with open_file(file) as opened:
        with _checked(opened, file) as handle:
            names = handle.offset_keys()
            length = opened.read(_LENGTH_BYTES)
            text = opened.read(int.from_bytes(length, "little"))
            entries = json.loads(text)
            data = len(length) + len(text)
            infos = {}
            for name in names:
                start, stop = entries[name]["data_offsets"]
                shape = tuple(entries[name]["shape"])
                infos[name] = TensorInfo(file, entries[name]["dtype"], shape, data + start, stop - start)
        return infos, length + text
