"""Which of a directory's safetensors files are the model: rules in an order, and a warning where one was needed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from exllama_ops.checkpoint.disk import list_directory, read_json
from exllama_ops.checkpoint.errors import CheckpointError, shown
from exllama_ops.checkpoint.fields import CONFIG_NAME, QUANTIZE_CONFIG_NAME

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Fields of a config for the file that is meant, its name without the suffix.
MEANT_FIELDS = ("model_file_base_name", "model_basename")

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_ADAPTER = re.compile(r"adapter(_model)?\b.*")
# The weights as their makers had them, beside those of transformers; and what macOS and editors leave.
_OTHERS = re.compile(r"consolidated\b.*|original\b.*|\..*")
_AUTOGPTQ = re.compile(r"gptq_model-\d+bit-.*\.safetensors")
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")


class Choice(NamedTuple):
    """The files to read, in their order, and the name and contents (tensor -> file) of the index if there is one."""

    names: list[str]
    index_name: str | None = None
    weight_map: Mapping[str, str] | None = None


def choose_files(directory: Path, meant: str | None = None, *, stacklevel: int = 1) -> Choice:
    """Choose the safetensors files that are the model.

    The file or index that a config names comes first. Then an index whose files are all there, model.safetensors, the
    one file that an index does not name, the name that AutoGPTQ gives, and a full set of numbered files. An only file
    is the model whatever its name is. Adapters are never the model.

    Args:
        directory: where they are.
        meant: the name of the file without its suffix; None for what the configs say.
        stacklevel: of the warning, as in `warnings.warn`.

    Raises:
        CheckpointError: there is none, or no rule tells which one is meant; the text lists them.

    Warns:
        UserWarning: what was chosen, if something else was left out.
    """
    names = list_directory(directory)
    found = [name for name in names if name.endswith((_SUFFIX, _INDEX_SUFFIX)) and not _ADAPTER.fullmatch(name)]
    if not found:
        raise CheckpointError(f"{directory}: must have its weights in safetensors files; found {_instead(names)}")
    found = [name for name in found if not _OTHERS.fullmatch(name)] or found
    files = [name for name in found if name.endswith(_SUFFIX)]
    choice = _choose(directory, files, [name for name in found if name not in files], meant)
    left_out = [name for name in found if name not in (*choice.names, choice.index_name)]
    if left_out and set(choice.names) <= set(names):
        told = ", ".join(choice.names) if choice.index_name is None else f"the index {choice.index_name}"
        warnings.warn(
            f"{directory}: the weights are those of {told}; left out: {', '.join(left_out)}", stacklevel=stacklevel + 1
        )
    return choice


def _choose(directory: Path, files: list[str], indices: list[str], meant: str | None) -> Choice:
    maps = {name: _weight_map(directory / name) for name in indices}
    there = set(list_directory(directory))
    whole = {name: members for name, members in maps.items() if members and set(members.values()) <= there}
    members = {file for weight_map in whole.values() for file in weight_map.values()}

    name = meant or _said_name(directory)
    if name is not None:
        file, index = f"{name}{_SUFFIX}", f"{name}{_INDEX_SUFFIX}"
        if file in files and file not in members and (meant is not None or index not in whole):
            return _file(file)
        if index in whole and file not in files:
            return _index(index, whole[index])
        if meant is not None and file not in members:
            raise CheckpointError(f"{directory / file}: must be a file with the weights of a model; got none")
    alone = [file for file in files if file not in members]
    if len(whole) == 1 and SINGLE_NAME not in alone:
        return _index(*next(iter(whole.items())))
    if whole:
        found = [*whole, *(file for file in alone if file == SINGLE_NAME)]
        raise CheckpointError(
            f"{directory}: must have {SINGLE_NAME} or one index; got {', '.join(found)}: name the file that is meant, "
            "as DIR/FILE"
        )
    if SINGLE_NAME in files:
        return _file(SINGLE_NAME)
    if maps:
        named = {file for weight_map in maps.values() for file in weight_map.values()}
        unnamed = [file for file in files if file not in named]
        # Where no other file is there, reading tells which one of the index is missing.
        return _file(unnamed[0]) if len(unnamed) == 1 else _index(*next(iter(maps.items())))
    return _without_index(directory, files)


def _without_index(directory: Path, files: list[str]) -> Choice:
    by_autogptq = [file for file in files if _AUTOGPTQ.fullmatch(file)]
    if len(files) == 1 or len(by_autogptq) == 1:
        return _file((by_autogptq or files)[0])
    numbered = [match for file in files if (match := _NUMBERED.fullmatch(file))]
    sets = {(match[1], int(match[3])) for match in numbered}
    if len(numbered) == len(files) and sets == {(numbered[0][1], len(files))}:
        return Choice(files)
    raise CheckpointError(
        f"{directory}: several safetensors files need an index ({INDEX_NAME}) or one must be {SINGLE_NAME}; got "
        f"{', '.join(files)}: name the one that is meant, as DIR/FILE"
    )


def _file(name: str) -> Choice:
    return Choice([name])


def _index(name: str, weight_map: Mapping[str, str]) -> Choice:
    return Choice(sorted(set(weight_map.values())), name, weight_map)


def _instead(names: list[str]) -> str:
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    adapters = [name for name in names if name.endswith(_SUFFIX)]
    if adapters:
        return f"only {', '.join(adapters)}, an adapter: open the model that it adapts"
    return f"only pickle files, which can run code when read: {', '.join(pickles)}" if pickles else "none"


def _said_name(directory: Path) -> str | None:
    """The name that a config gives to the file, if it gives one that a file of this directory can have."""
    for name in (CONFIG_NAME, QUANTIZE_CONFIG_NAME):
        if name in list_directory(directory):
            values: Any = read_json(directory / name)
            values = values.get("quantization_config") if name == CONFIG_NAME else values
            for field in MEANT_FIELDS if isinstance(values, dict) else ():
                said = values.get(field)
                if isinstance(said, str) and said and said == Path(said).name:
                    return said.removesuffix(_SUFFIX)
    return None


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
