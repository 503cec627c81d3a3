"""`open_checkpoint`: the first format that takes a folder opens it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from exllama_ops.checkpoint import gptq
from exllama_ops.checkpoint.base import Checkpoint, Format
from exllama_ops.checkpoint.config import read_config
from exllama_ops.checkpoint.errors import CheckpointError
from exllama_ops.checkpoint.files import local_directory, place_of

# In the order in which they are asked. A format is one file of this folder.
FORMATS: tuple[Format, ...] = (gptq,)


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
        CheckpointError: no format takes the folder, and the text has every format with its reasons. Or the checkpoint
            is broken, and the text names the file and the tensor or field.
        ImportError: the extra ``hf`` is not installed.

    Warns:
        UserWarning: what `exllama_ops.open_gptq` warns of.
    """
    # The JSON files of a hub id come first. What no format takes is refused before its weights are downloaded.
    place, said = place_of(path_or_id, quantization_config)
    directory = local_directory(place, revision, configs_only=True)
    if said is not None:
        read_config(directory, said, quiet=True)
        return gptq.open_directory(local_directory(place, revision), said)
    refusals: list[str] = []
    for candidate in FORMATS:
        reasons = candidate.reasons_against(directory)
        if not reasons:
            return candidate.open_directory(local_directory(place, revision))
        refusals.append(f"{candidate.NAME}: {'; '.join(reasons)}")
    raise CheckpointError(f"{directory}: no checkpoint format takes it. {' | '.join(refusals)}")
