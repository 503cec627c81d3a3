"""A throw-away format in one file: every value in a byte of its own, and zero points that are not packed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exllama_ops.checkpoint import Checkpoint, CheckpointError, ModuleSummary
from exllama_ops.layout import GptqWeight, pack_columns, pack_rows, unpack_columns, unpack_rows

NAME = "plain"
METHODS = ()


class PlainCheckpoint(Checkpoint):
    def __init__(self, path: Path) -> None:
        self.format = NAME
        self.path = path
        self.config = json.loads((path / "plain.json").read_text())
        self.quantization = {}
        self._tensors = load_file(path / "plain.bin")
        self.quantized = tuple(self.config)
        members = {f"{name}.{kind}" for name in self.quantized for kind in ("q", "z", "s", "order", "bias")}
        self.dense = tuple(name for name in self._tensors if name not in members)
        self.weight_bytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def summary(self, name: str) -> ModuleSummary:
        (K, N), G = self._tensors[f"{name}.q"].shape, len(self._tensors[f"{name}.s"])
        bits, group_size = self.config[name]
        order, bias = f"{name}.order" in self._tensors, f"{name}.bias" in self._tensors
        num_bytes = sum(tensor.nbytes for key, tensor in self._tensors.items() if key.rpartition(".")[0] == name)
        return ModuleSummary(K, N, bits, group_size, G, False, order, "gptq_v2", bias, num_bytes)

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor_dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, device: torch.device | str = "cpu") -> GptqWeight:
        if name not in self.config:
            raise CheckpointError(f"{self.path}: no module {name}")
        bits, group_size = self.config[name]
        order, bias = self._tensors.get(f"{name}.order"), self._tensors.get(f"{name}.bias")
        return GptqWeight(
            qweight=pack_rows(self._tensors[f"{name}.q"], bits).to(device),
            qzeros=pack_columns(self._tensors[f"{name}.z"], bits).to(device),
            scales=self._tensors[f"{name}.s"].to(device, copy=True),
            g_idx=None if order is None else order.to(device, copy=True),
            bits=bits,
            group_size=group_size,
            bias=None if bias is None else bias.to(device, copy=True),
        )

    def read_tensor(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        return self._tensors[name].to(device, copy=True)


def reasons_against(directory: Path) -> list[str]:
    return [] if (directory / "plain.json").exists() else ["there must be a plain.json; found none"]


def open_directory(directory: Path) -> PlainCheckpoint:
    return PlainCheckpoint(directory)


def write(directory: Path, source: Checkpoint) -> Path:
    """The same weights in this format."""
    directory.mkdir(exist_ok=True)
    tensors = {name: source.read_tensor(name) for name in source.dense}
    config = {}
    for name, weight in source.weights().items():
        config[name] = (weight.bits, weight.group_size)
        tensors[f"{name}.q"] = unpack_rows(weight.qweight, weight.bits).to(torch.uint8)
        tensors[f"{name}.z"] = unpack_columns(weight.qzeros, weight.bits).to(torch.uint8)
        tensors[f"{name}.s"] = weight.scales
        if weight.g_idx is not None:
            tensors[f"{name}.order"] = weight.g_idx
        if weight.bias is not None:
            tensors[f"{name}.bias"] = weight.bias
    save_file(tensors, directory / "plain.bin")
    (directory / "plain.json").write_text(json.dumps(config))
    model_config = json.loads((source.path / "config.json").read_text())
    del model_config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(model_config))
    return directory
