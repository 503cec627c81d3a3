"""A checkpoint of the hub by its JSON files and headers alone, for those who look before they download."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from exllama_ops.checkpoint.errors import CheckpointError
from exllama_ops.checkpoint.files import local_directory
from exllama_ops.extras import require

# A tensor that has a shape, and no header does.
_SHAPE = ".weight_shape"


def fetch_headers(name: str, revision: str | None, directory: Path) -> Path:
    """Fill a directory with the JSON files of a hub id, and with safetensors files that have a header and no data.

    Such a file has the size of the whole one, and takes no room where the system keeps holes. Opening it as a
    checkpoint tells all that headers say. Reading a tensor from it gives zeros. Other files are empty.

    Args:
        name: the hub id.
        revision: its branch, tag or commit.
        directory: to fill.

    Returns:
        The directory. That of the hub's cache where it has weights and the hub cannot be asked, or where the shapes are
        tensors themselves, as in compressed-tensors: all is downloaded then.

    Raises:
        CheckpointError: the hub cannot be asked, and the cache has no weights.
        ImportError: huggingface_hub is not installed.
    """
    cached = local_directory(name, revision, configs_only=True)
    api = require("huggingface_hub").HfApi()
    try:
        for file in api.list_repo_files(name, revision=revision):
            target = directory / file
            if target.name != file:
                continue  # what lies in a folder of its own is not the model
            if file.endswith(".json"):
                shutil.copyfile(cached / file, target)
            elif file.endswith(".safetensors"):
                tensors = api.parse_safetensors_file_metadata(name, file, revision=revision).tensors
                if any(tensor.endswith(_SHAPE) for tensor in tensors):
                    return local_directory(name, revision)
                _write_hollow(target, tensors)
            else:
                target.touch()
    except Exception as error:  # the hub's errors share no base class
        if any(cached.glob("*.safetensors")):
            return cached
        raise CheckpointError(f"{name}: its headers could not be fetched from the hub: {error}") from error
    return directory


def _write_hollow(target: Path, tensors: dict[str, object]) -> None:
    """Write a safetensors file with a header and a hole."""
    fields = ("dtype", "shape", "data_offsets")
    entries = {name: {field: getattr(info, field) for field in fields} for name, info in tensors.items()}
    header = json.dumps(entries).encode()
    size = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    with target.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        os.truncate(file.fileno(), 8 + len(header) + size)
