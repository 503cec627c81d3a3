"""`open_checkpoint`: the first format that takes a folder opens it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exllama_ops.checkpoint import autoround, awq, compressed_tensors, gptq
from exllama_ops.checkpoint.base import Checkpoint, Format
from exllama_ops.checkpoint.config import read_config
from exllama_ops.checkpoint.disk import list_directory
from exllama_ops.checkpoint.errors import CheckpointError, shown
from exllama_ops.checkpoint.fields import read_quantization
from exllama_ops.checkpoint.files import local_directory, place_of

# In the order in which they are asked. A format is one file of this folder.
FORMATS: tuple[Format, ...] = (gptq, autoround, awq, compressed_tensors)

GGUF_SUFFIX = ".gguf"
GGUF_HINT = "`exllama-ops convert FILE.gguf DST` writes a GPTQ checkpoint from one"


def open_checkpoint(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Open a quantized checkpoint of any format that is read here.

    Args:
        path_or_id: a directory, its safetensors file or config.json, or a hub id (``owner/name``), which is downloaded
            into the hub's cache.
        revision: branch, tag or commit of a hub id.
        quantization_config: what the files of a GPTQ checkpoint do not say of themselves, as in `open_gptq`.

    Returns:
        The checkpoint. Its config and headers are read and checked, its weights are not read yet.

    Raises:
        CheckpointError: no format takes the folder. The text has the reasons of the format whose quant_method the
            folder has, or else of each format. Or the checkpoint is broken, and the text names the file and the tensor
            or field.
        ImportError: the extra ``hf`` is not installed.

    Warns:
        UserWarning: what `exllama_ops.open_gptq` warns of.
    """
    if os.fspath(path_or_id).endswith(GGUF_SUFFIX):
        raise CheckpointError(f"{os.fspath(path_or_id)}: is a GGUF file; {GGUF_HINT}")
    # The JSON files of a hub id come first. What no format takes is refused before its weights are downloaded.
    place, said = place_of(path_or_id, quantization_config)
    directory = local_directory(place, revision, configs_only=True)
    if said is not None:
        method = read_quantization(directory, quiet=True)[0].get("quant_method")
        other = next((candidate.NAME for candidate in FORMATS[1:] if method in candidate.METHODS), None)
        if other is not None:
            raise CheckpointError(
                f"{directory}: is a checkpoint of {other}, whose config says all: give the folder alone; got "
                f"{', '.join(said)}"
            )
        read_config(directory, said, quiet=True)
        return gptq.open_directory(local_directory(place, revision), said)
    refusals: dict[str, list[str]] = {}
    for candidate in FORMATS:
        reasons = candidate.reasons_against(directory)
        if not reasons:
            return candidate.open_directory(local_directory(place, revision))
        refusals[candidate.NAME] = reasons
    told = _told(directory, refusals)
    raise CheckpointError(f"{directory}: no checkpoint format takes it. {' | '.join(told)}", told)


def _told(directory: Path, refusals: dict[str, list[str]]) -> list[str]:
    """The reasons of the formats that a directory may be meant to have, and what can be done."""
    if any(name.endswith(GGUF_SUFFIX) for name in list_directory(directory)):
        return [f"It has GGUF files; {GGUF_HINT}"]
    try:
        raw, source = read_quantization(directory, quiet=True)
        method = raw.get("quant_method") or gptq.NAME
    except CheckpointError:
        method = gptq.NAME
    known = [name for candidate in FORMATS for name in candidate.METHODS]
    told = [
        f"{candidate.NAME}: {'; '.join(refusals[candidate.NAME])}"
        for candidate in FORMATS
        if not candidate.METHODS or method in candidate.METHODS
    ]
    if method not in known:
        names = ", ".join(candidate.NAME for candidate in FORMATS if candidate.METHODS)
        told.insert(0, f"{source}: quant_method must be one of {names}; got {shown(method)}")
    return told
