"""The format GPTQ: files and config -> `GptqWeight`, with everything checked on the way."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from exllama_ops.checkpoint.choice import MEANT_FIELDS
from exllama_ops.checkpoint.config import GptqConfig, ModuleConfig, parse_config, read_config
from exllama_ops.checkpoint.errors import CheckpointError
from exllama_ops.checkpoint.fields import read_quantization
from exllama_ops.checkpoint.files import TensorFiles, local_directory, place_of
from exllama_ops.checkpoint.from_files import (
    FileCheckpoint,
    FileModule,
    check_dtypes,
    check_no_other_weight,
    check_shapes,
    checked_modules,
    described_module,
    named_modules,
    tensor_error,
)
from exllama_ops.checkpoint.module import TENSORS, GptqModule
from exllama_ops.extras import require
from exllama_ops.layout import FORMATS, GptqWeight

NAME = "gptq"
METHODS: tuple[str, ...] = ("gptq",)


class GptqCheckpoint(FileCheckpoint):
    """A GPTQ checkpoint whose headers were read and checked; tensors are read on demand, one module at a time.

    Made by `open_gptq`.

    Args:
        path: the local directory.
        config: its quantization config.
        files: its tensors.
        quantization: the quantization config as the files have it.
        format: the name of the format, if its files are GPTQ's under another one.

    Attributes:
        format: "gptq", or the other name.
        path: the local directory.
        config: the parsed quantization config.
        quantization: the same as the files have it, with fields that are not read here.
        quantized: names of the quantized modules, in the order of the files.
        dense: names of the tensors that belong to no quantized module, in the order of the files.
        weight_bytes: bytes of all tensors.

    Raises:
        CheckpointError: the headers contradict the config or each other.
    """

    def __init__(
        self,
        path: Path,
        config: GptqConfig,
        files: TensorFiles,
        quantization: Mapping[str, Any] | None = None,
        *,
        format: str = NAME,
    ) -> None:
        self.format = format
        try:
            configs = config.for_modules(named_modules(files, ("qweight", "qzeros", "g_idx")))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        modules = checked_modules(configs, lambda name, kind: _check_module(files, config, name, kind))
        if not modules:
            raise CheckpointError(f"{path}: must have quantized modules, tensors NAME.qweight; found none")
        super().__init__(path, config, quantization or {}, files, modules)
        self._warned_of_zeros = False

    def module(self, name: str) -> GptqModule:
        """What the headers and the config say of one quantized module: its sizes, its tensors, their shapes and dtypes.

        Args:
            name: one of ``quantized``.

        Raises:
            CheckpointError: there is no such module.
        """
        return self._described(name).module

    def stream(self, device: torch.device | str = "cpu", *, progress: bool = True) -> Iterator[tuple[str, GptqWeight]]:
        """Read all quantized modules, one after the other.

        Args:
            device: where to put the weights.
            progress: show a progress bar on stderr, if that is a terminal.

        Yields:
            Module name and weight, in the order of the files; no weight is kept here.

        Raises:
            CheckpointError: as in `read`.
        """
        sizes = {name: self.summary(name).num_bytes for name in self.quantized}
        tqdm = require("tqdm").tqdm
        disable = None if progress else True
        with tqdm(desc="Reading", total=sum(sizes.values()), unit="B", unit_scale=True, disable=disable) as bar:
            for name, size in sizes.items():
                yield name, self.read(name, device)
                bar.update(size)

    def _found_contradiction(self, name: str, stored: int) -> None:
        if self._warned_of_zeros:
            return
        self._warned_of_zeros = True
        declared = self.config.checkpoint_format
        actual = "gptq_v2" if declared == "gptq" else "gptq"
        warnings.warn(
            f"{self.path}: checkpoint_format {declared} is declared, but symmetric zero points are stored as {stored}, "
            f"as in {actual} (first in tensor {name}.qzeros); such tensors are read as {actual}",
            stacklevel=4,
        )


def _check_module(files: TensorFiles, config: GptqConfig, name: str, kind: ModuleConfig | None) -> FileModule:
    """Check the headers of one module against its config."""
    names = {tensor: f"{name}.{tensor}" for tensor in TENSORS if f"{name}.{tensor}" in files.tensors}
    if kind is None:
        first = next(iter(names.values()))
        raise tensor_error(files, first, "must not exist: the quantization config says that it is not quantized")
    _check_presence(files, name, names, kind)
    if config.checkpoint_format == "gptq_p" and kind.bits == 3:
        raise CheckpointError(
            f"{files.tensors[names['qweight']].file}: module {name}: checkpoint_format gptq_p is supported for 2, 4 "
            "and 8 bits, where it equals gptq_v2; got 3 bits"
        )
    check_dtypes(files, names)

    bits, fmt = kind.bits, FORMATS[kind.bits]
    qweight = files.tensors[names["qweight"]].shape
    if len(qweight) != 2 or 0 in qweight or qweight[0] % fmt.block_words:
        raise tensor_error(
            files,
            names["qweight"],
            f"must have shape (K*bits/32, N), rows in runs of {fmt.block_words} for bits={bits}; got {qweight}",
        )
    K, N = qweight[0] * 32 // bits, qweight[1]
    if N % fmt.block_values:
        raise tensor_error(
            files, names["qweight"], f"must have N, a multiple of {fmt.block_values} for bits={bits}, columns; got {N}"
        )
    module = described_module(files, names, kind, K, N, config.zero_offset)
    check_shapes(files, names, module)
    return FileModule(module, names, kind.desc_act and not kind.static_groups, config.checkpoint_format)


def _check_presence(files: TensorFiles, name: str, names: Mapping[str, str], kind: ModuleConfig) -> None:
    """Check that a module has the tensors its config asks for."""
    first = next(iter(names.values()))
    where = files.tensors[first].file
    check_no_other_weight(files, name, first)
    if f"{name}.perm" in files.tensors:
        raise tensor_error(
            files,
            f"{name}.perm",
            "must not exist: it belongs to the state_dict of an ExllamaLinear, which is no GPTQ checkpoint; "
            "exllama_ops.save_gptq writes one from ExllamaLinear.to_weight()",
        )
    for tensor in ("qweight", "scales"):
        if tensor not in names:
            raise CheckpointError(f"{where}: tensor {name}.{tensor} is missing")
    if "qzeros" not in names and not kind.sym:
        raise CheckpointError(f"{where}: tensor {name}.qzeros is missing: only sym=true can do without; got sym=false")
    if "g_idx" not in names and kind.desc_act and kind.group_size != -1 and not kind.static_groups:
        raise CheckpointError(
            f"{where}: tensor {name}.g_idx is missing: only it says the groups of the rows with desc_act=true and "
            f"group_size={kind.group_size}"
        )


def reasons_against(directory: Path) -> list[str]:
    """Every reason why a directory holds no GPTQ checkpoint, by its configs alone."""
    try:
        read_config(directory, quiet=True)
    except CheckpointError as error:
        return list(error.reasons)
    return []


def open_directory(directory: Path, said: Mapping[str, Any] | None = None) -> GptqCheckpoint:
    """Open a local directory; `open_gptq` says what it raises and warns of."""
    quantization, source = read_quantization(directory, said)
    files = TensorFiles(directory, (said or {}).get(MEANT_FIELDS[0]))
    return GptqCheckpoint(directory, parse_config(quantization, source), files, quantization)


def open_gptq(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
) -> GptqCheckpoint:
    """Open a GPTQ checkpoint: read its config and the headers of its files, and check them against each other.

    Args:
        path_or_id: a directory with safetensors files and config.json or quantize_config.json, one of these files, or a
            hub id (``owner/name``), which is downloaded into the hub's cache.
        revision: branch, tag or commit of a hub id.
        quantization_config: what the files do not say of themselves, in the fields of their config: bits, group_size,
            sym, desc_act, checkpoint_format, dynamic. It wins over what they say.

    Returns:
        The checkpoint, nothing of its weights read yet.

    Raises:
        CheckpointError: not a GPTQ checkpoint, an unsupported kind of one, or a broken one; the text names the file and
            the tensor or field.
        ImportError: the extra ``hf`` is not installed.

    Warns:
        UserWarning: quantization_config, config.json and quantize_config.json contradict each other, or the index
            leaves tensors out.
    """
    place, said = place_of(path_or_id, quantization_config)
    # A hub id's configs come first: what is not GPTQ is refused before its weights are downloaded.
    read_config(local_directory(place, revision, configs_only=True), said, quiet=True)
    return open_directory(local_directory(place, revision), said)


def read_gptq(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, GptqWeight]:
    """Read all quantized weights of a GPTQ checkpoint, one at a time.

    Args:
        path_or_id: as in `open_gptq`.
        revision: as in `open_gptq`.
        quantization_config: as in `open_gptq`.
        device: where to put the weights.
        progress: show a progress bar on stderr, if that is a terminal.

    Returns:
        Module name -> weight, in the order of the files.

    Raises:
        CheckpointError: as in `open_gptq` and `GptqCheckpoint.read`.
        ImportError: as in `open_gptq`.
    """
    checkpoint = open_gptq(path_or_id, revision=revision, quantization_config=quantization_config)
    return dict(checkpoint.stream(device, progress=progress))
