"""The format of AutoAWQ, version GEMM: 4 bits, packed along columns in an order of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exllama_ops.checkpoint.config import GptqConfig, ModuleConfig, parse_config
from exllama_ops.checkpoint.errors import CheckpointError, shown
from exllama_ops.checkpoint.fields import SYNONYMS, read_method
from exllama_ops.checkpoint.files import TensorFiles
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
from exllama_ops.checkpoint.module import GptqModule
from exllama_ops.layout import FORMATS, pack_rows

NAME = "awq"
METHODS: tuple[str, ...] = ("awq",)

BITS = 4
# The column, of the 8 of a word, that each field of it holds. AutoAWQ 0.2.9, ``awq/utils/packing_utils.py``.
COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)

_TENSORS = ("qweight", "qzeros", "scales", "bias")


class AwqCheckpoint(FileCheckpoint):
    """A checkpoint in the layout of AutoAWQ GEMM, whose headers were read and checked.

    The tensors say which modules are quantized; ``modules_to_not_convert`` is not looked at. Zero points are stored as
    they are.

    Args:
        path: the local directory.
        config: its quantization config, in GPTQ's terms.
        files: its tensors.
        quantization: the quantization config as the files have it.
        format: the name of the format, if its files are AutoAWQ's under another one.

    Raises:
        CheckpointError: the headers contradict the config or each other.
    """

    def __init__(
        self,
        path: Path,
        config: GptqConfig,
        files: TensorFiles,
        quantization: Mapping[str, Any],
        *,
        format: str = NAME,
    ) -> None:
        self.format = format
        try:
            configs = config.for_modules(named_modules(files, ("qweight", "qzeros")))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        modules = checked_modules(configs, lambda name, kind: _check_module(files, name, kind))
        if not modules:
            raise CheckpointError(f"{path}: must have quantized modules, tensors NAME.qweight; found none")
        super().__init__(path, config, quantization, files, modules)

    def _repack(self, module: GptqModule, tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        repacked = tensors | {"qweight": rows_of_columns(tensors["qweight"])}
        if "qzeros" in tensors:
            repacked["qzeros"] = in_order(tensors["qzeros"])
        return repacked


def rows_of_columns(qweight: Tensor) -> Tensor:
    """AutoAWQ's words along columns (K, N / 8) -> GPTQ's words along rows (K / 8, N)."""
    K, words = qweight.shape
    fields = len(COLUMNS)
    packed = torch.empty(K // fields, words, fields, dtype=torch.int32, device=qweight.device)
    for field, column in enumerate(COLUMNS):
        packed[:, :, column] = pack_rows(qweight >> (BITS * field) & 15, BITS)
    return packed.flatten(1)


def in_order(words: Tensor) -> Tensor:
    """Words along columns in AutoAWQ's order -> the same in GPTQ's."""
    ordered = torch.zeros_like(words)
    for field, column in enumerate(COLUMNS):
        ordered |= (words >> (BITS * field) & 15) << (BITS * column)
    return ordered


def _check_module(files: TensorFiles, name: str, kind: ModuleConfig | None) -> FileModule:
    """Check the headers of one module against its config."""
    names = {tensor: f"{name}.{tensor}" for tensor in _TENSORS if f"{name}.{tensor}" in files.tensors}
    first = next(iter(names.values()))
    where = files.tensors[first].file
    if kind is None:
        raise tensor_error(files, first, "must not exist: the quantization config says that it is not quantized")
    if kind.bits != BITS:
        raise CheckpointError(f"{where}: module {name}: bits must be {BITS} in the layout of AutoAWQ; got {kind.bits}")
    check_no_other_weight(files, name, first)
    for tensor in ("qweight", "scales"):
        if tensor not in names:
            raise CheckpointError(f"{where}: tensor {name}.{tensor} is missing")
    if "qzeros" not in names and not kind.sym:
        raise CheckpointError(
            f"{where}: tensor {name}.qzeros is missing: only zero_point=false, or sym=true, can do without"
        )
    check_dtypes(files, names)

    shape = files.tensors[names["qweight"]].shape
    if len(shape) != 2 or 0 in shape or shape[0] % FORMATS[BITS].block_values:
        raise tensor_error(
            files,
            names["qweight"],
            f"must have shape (K, N/8), K a multiple of {FORMATS[BITS].block_values}; got {shape}",
        )
    K, N = shape[0], shape[1] * len(COLUMNS)
    # Zero points that the file has are what it stores, whatever its config says of them.
    module = described_module(files, names, replace(kind, sym=kind.sym and "qzeros" not in names), K, N, 0)
    check_shapes(files, {tensor: stored for tensor, stored in names.items() if tensor != "qweight"}, module)
    return FileModule(module, names, act_order=False, zero_format="gptq_v2")


def parse_awq(raw: Mapping[str, Any], source: str) -> GptqConfig:
    """Parse the quantization config of AutoAWQ.

    Args:
        raw: as in the JSON file, with the names of AutoAWQ or those of transformers. Missing ``version`` means "gemm",
            missing ``zero_point`` True.
        source: what error messages call it.

    Returns:
        The same as a GPTQ config.

    Raises:
        CheckpointError: a field is missing, contradicts another or is not supported; the text names it.
    """
    said = (raw.get(name) for name in ("version", *SYNONYMS["checkpoint_format"]))
    version = next((str(name).lower() for name in said if name is not None), "gemm")
    if version != "gemm":
        raise CheckpointError(
            f"{source}: version must be 'gemm', the one layout of AutoAWQ that is read here; got {shown(version)}. "
            "Quantize the model with version='GEMM'"
        )
    zero_point = raw.get("zero_point", True)
    if not isinstance(zero_point, bool):
        raise CheckpointError(f"{source}: zero_point must be true or false; got {shown(zero_point)}")
    fields = {name: raw[name] for name in (*SYNONYMS["bits"], *SYNONYMS["group_size"], "dynamic") if name in raw}
    config = parse_config(fields | {"sym": not zero_point, "checkpoint_format": "gptq_v2"}, source)
    if config.bits != BITS:
        raise CheckpointError(f"{source}: bits must be {BITS} in the layout of AutoAWQ; got {config.bits}")
    return config


def reasons_against(directory: Path) -> list[str]:
    """Every reason why a directory holds no checkpoint of AutoAWQ, by its configs alone."""
    try:
        _read(directory, quiet=True)
    except CheckpointError as error:
        return list(error.reasons)
    return []


def open_directory(directory: Path) -> AwqCheckpoint:
    """Open a local directory.

    Raises:
        CheckpointError: as in `parse_awq` and `AwqCheckpoint`.
    """
    raw, config = _read(directory)
    return AwqCheckpoint(directory, config, TensorFiles(directory), raw)


def _read(directory: Path, *, quiet: bool = False) -> tuple[dict[str, Any], GptqConfig]:
    raw, source = read_method(directory, METHODS, quiet=quiet)
    return raw, parse_awq(raw, source)
