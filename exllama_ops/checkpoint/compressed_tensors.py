"""The format compressed-tensors, "pack-quantized": GPTQ's words, transposed, under a config of groups and targets.

Source: compressed-tensors 0.20.1, and 0.12.2 for what older files have: a ``weight_g_idx``, and words of ten 3-bit
values with two bits to spare.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exllama_ops.checkpoint.compressed_tensors_config import CompressedTensorsConfig, parse_compressed_tensors
from exllama_ops.checkpoint.config import ModuleConfig
from exllama_ops.checkpoint.errors import CheckpointError
from exllama_ops.checkpoint.fields import read_method
from exllama_ops.checkpoint.files import TensorFiles
from exllama_ops.checkpoint.from_files import (
    FileCheckpoint,
    FileModule,
    check_dtypes,
    check_no_other_weight,
    checked_modules,
    described_module,
    named_modules,
    tensor_error,
)
from exllama_ops.checkpoint.module import GptqModule
from exllama_ops.layout import pack_columns, pack_rows
from exllama_ops.layout.checks import fills_words, words_rule

NAME = "compressed-tensors"
METHODS: tuple[str, ...] = ("compressed-tensors",)

# GPTQ's tensor -> the same of a module in this format.
_TENSORS = {
    "qweight": "weight_packed",
    "qzeros": "weight_zero_point",
    "scales": "weight_scale",
    "g_idx": "weight_g_idx",
    "bias": "bias",
}
# What a quantized cache of keys and values adds to a module.
_CACHE_TENSORS = tuple(f"{cache}_{kind}" for cache in "qkv" for kind in ("scale", "zero_point"))
# 3-bit values of a word, where it has two bits to spare.
_PADDED_VALUES = 10


class CompressedTensorsCheckpoint(FileCheckpoint):
    """A checkpoint of compressed-tensors in the format pack-quantized, whose headers were read and checked.

    Opening it reads the shape of each weight too, which is a tensor in these files.

    Args:
        path: the local directory.
        config: its quantization config.
        files: its tensors.
        quantization: the quantization config as the files have it.

    Raises:
        CheckpointError: the headers contradict the config or each other.

    Warns:
        UserWarning: the cache of keys and values is quantized, which is left out.
    """

    format = NAME

    def __init__(
        self, path: Path, config: CompressedTensorsConfig, files: TensorFiles, quantization: Mapping[str, Any]
    ) -> None:
        names = named_modules(files, ("weight_packed",))
        try:
            configs = config.for_modules(names)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        shapes = files.read(f"{name}.weight_shape" for name in names if f"{name}.weight_shape" in files.tensors)
        modules = checked_modules(
            configs, lambda name, kind: _check_module(files, name, kind, shapes.get(f"{name}.weight_shape"))
        )
        if not modules:
            raise CheckpointError(f"{path}: must have quantized modules, tensors NAME.weight_packed; found none")
        skipped: frozenset[str] = frozenset()
        if quantization.get("kv_cache_scheme"):
            skipped = frozenset(tensor for tensor in files.tensors if tensor.rpartition(".")[2] in _CACHE_TENSORS)
            warnings.warn(
                f"{path}: kv_cache_scheme is left out: keys and values are kept as they are computed", stacklevel=4
            )
        super().__init__(path, config, quantization, files, modules, skipped)

    def _repack(self, module: GptqModule, tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        bits = module.bits
        qweight, qzeros = tensors["qweight"], tensors.get("qzeros")
        if qweight.shape[1] == _num_words(module.in_features, bits):
            repacked = tensors | {"qweight": qweight.t().contiguous()}
        else:
            repacked = tensors | {"qweight": pack_rows(_padded_values(qweight, module.in_features).t(), bits)}
        if qzeros is not None:
            if qzeros.shape[0] == _num_words(module.out_features, bits):
                repacked["qzeros"] = qzeros.t().contiguous()
            else:
                repacked["qzeros"] = pack_columns(_padded_values(qzeros.t(), module.out_features), bits)
        repacked["scales"] = tensors["scales"].t().contiguous()
        # As a module has it that was made for an order and never calibrated.
        if "g_idx" in tensors and bool((tensors["g_idx"] == -1).all()):
            del repacked["g_idx"]
        return repacked


def _num_words(values: int, bits: int) -> int:
    return -(-values * bits // 32)


def _padded_values(words: Tensor, count: int) -> Tensor:
    """Words (R, W) of ten 3-bit values each -> the first ``count`` values of each row, (R, count)."""
    values = [words >> (3 * field) & 7 for field in range(_PADDED_VALUES)]
    return torch.stack(values, -1).flatten(1)[:, :count]


def _check_module(files: TensorFiles, name: str, kind: ModuleConfig | None, stored: Tensor | None) -> FileModule:
    """Check the headers of one module against its config; ``stored`` is its weight_shape."""
    names = {tensor: f"{name}.{own}" for tensor, own in _TENSORS.items() if f"{name}.{own}" in files.tensors}
    packed = names["qweight"]
    if kind is None:
        raise tensor_error(files, packed, "must not exist: the quantization config says that it is not quantized")
    check_no_other_weight(files, name, packed)
    where = files.tensors[packed].file
    if "scales" not in names:
        raise CheckpointError(f"{where}: tensor {name}.weight_scale is missing")
    if "qzeros" not in names and not kind.sym:
        raise CheckpointError(f"{where}: tensor {name}.weight_zero_point is missing: symmetric is false")
    check_dtypes(files, names)

    bits, shape = kind.bits, files.tensors[packed].shape
    if len(shape) != 2 or 0 in shape:
        raise tensor_error(files, packed, f"must have shape (N, ceil(K*bits/32)), one layer; got {shape}")
    N = shape[0]
    said = [N, shape[1] * 32 // bits] if stored is None else stored.flatten().tolist()
    if len(said) != 2 or said[0] != N:
        raise tensor_error(files, f"{name}.weight_shape", f"must be (N, K) with N={N}; got {tuple(said)}")
    K = int(said[1])
    for size, value in (("K", K), ("N", N)):
        if not fills_words(value, bits):
            raise tensor_error(files, packed, f"cannot be stored as GPTQ: {words_rule(size, value, bits)}")
    # Zero points that the file has are what it stores, whatever its config says of them.
    module = described_module(files, names, replace(kind, sym=kind.sym and "qzeros" not in names), K, N, 0)
    _check_shapes(files, names, module)
    others = () if stored is None else (f"{name}.weight_shape",)
    return FileModule(module, names, kind.desc_act, "gptq_v2", others)


def _check_shapes(files: TensorFiles, names: Mapping[str, str], module: GptqModule) -> None:
    K, N, G, bits = module.in_features, module.out_features, module.G, module.bits
    formulas: dict[str, tuple[str, list[tuple[int, ...]]]] = {
        "qweight": ("(N, ceil(K*bits/32))", [(N, _num_words(K, bits))]),
        "qzeros": ("(ceil(N*bits/32), ceil(K/group_size))", [(_num_words(N, bits), G)]),
        "scales": ("(N, ceil(K/group_size))", [(N, G)]),
        "g_idx": ("(K,)", [(K,)]),
        "bias": ("(N,)", [(N,)]),
    }
    if bits == 3:
        formulas["qweight"][1].append((N, -(-K // _PADDED_VALUES)))
        formulas["qzeros"][1].append((-(-N // _PADDED_VALUES), G))
    for tensor, name in names.items():
        formula, allowed = formulas[tensor]
        shape = files.tensors[name].shape
        if shape not in allowed:
            raise tensor_error(
                files,
                name,
                f"must have shape {formula} = {' or '.join(map(str, allowed))} for K={K}, N={N}, bits={bits}, "
                f"group_size={module.group_size}; got {shape}",
            )


def reasons_against(directory: Path) -> list[str]:
    """Every reason why a directory holds no such checkpoint that is read here, by its configs alone."""
    try:
        _read(directory, quiet=True)
    except CheckpointError as error:
        return list(error.reasons)
    return []


def open_directory(directory: Path) -> CompressedTensorsCheckpoint:
    """Open a local directory.

    Raises:
        CheckpointError: as in `parse_compressed_tensors` and `CompressedTensorsCheckpoint`.
    """
    raw, config = _read(directory)
    return CompressedTensorsCheckpoint(directory, config, TensorFiles(directory), raw)


def _read(directory: Path, *, quiet: bool = False) -> tuple[dict[str, Any], CompressedTensorsConfig]:
    raw, source = read_method(directory, METHODS, quiet=quiet)
    return raw, parse_compressed_tensors(raw, source)
