"""What every checkpoint offers, whatever its format, and what a format brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from exllama_ops.layout import GptqWeight
from exllama_ops.layout.lazy import LazyWeights


@dataclass(frozen=True)
class ModuleSummary:
    """What configs and headers say of one quantized module, before any of its tensors is read.

    Args:
        in_features: K.
        out_features: N.
        bits: 2, 3, 4 or 8.
        group_size: rows of a group, at least 1 (K for one group).
        num_groups: G, rows of scales.
        sym: whether the config says that every zero point is ``2**(bits - 1)``.
        act_order: whether the groups may be other than runs of rows, so that a ``g_idx`` says them.
        zero_format: how zero points are stored: "gptq" (minus 1), "gptq_v2" (as they are), or the format's own name.
        bias: whether there is one.
        num_bytes: of all its tensors in the files.
    """

    in_features: int
    out_features: int
    bits: int
    group_size: int
    num_groups: int
    sym: bool
    act_order: bool
    zero_format: str
    bias: bool
    num_bytes: int


@runtime_checkable
class Checkpoint(Protocol):
    """An opened checkpoint: names and sizes are known, and tensors are read when they are asked for.

    `exllama_ops.open_checkpoint` makes one. A format's class inherits from this one, which brings `weights`.

    Attributes:
        format: the format's name, such as "gptq".
        path: the local directory.
        config: the quantization config, in the format's own type.
        quantization: the same as the files have it: not parsed, with the fields that nothing here reads; {} if none.
        quantized: names of the quantized modules, in the order of the files.
        dense: names of the tensors that belong to no quantized module, in the order of the files.
        weight_bytes: bytes of all tensors.
    """

    format: str
    path: Path
    config: Any
    quantization: Mapping[str, Any]
    quantized: tuple[str, ...]
    dense: tuple[str, ...]
    weight_bytes: int

    def summary(self, name: str) -> ModuleSummary:
        """What configs and headers say of one quantized module.

        Args:
            name: one of ``quantized``.

        Raises:
            CheckpointError: there is no such module.
        """
        ...

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor of the files, from their headers.

        Args:
            name: one of ``dense``, or any other tensor of the files.

        Raises:
            CheckpointError: there is no such tensor.
        """
        ...

    def tensor_dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor of the files, from their headers.

        Args:
            name: one of ``dense``, or any other tensor of the files.

        Raises:
            CheckpointError: there is no such tensor, or its dtype is none of PyTorch's.
        """
        ...

    def read(self, name: str, device: torch.device | str = "cpu") -> GptqWeight:
        """Read one quantized module.

        Args:
            name: one of ``quantized``.
            device: where to put the tensors.

        Returns:
            The weight, in memory of its own: ``W[k, n] = scales[g, n] * (q[k, n] - z[g, n])``, whatever the file has.

        Raises:
            CheckpointError: there is no such module, or its data is wrong.
        """
        ...

    def read_tensor(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor as it is in the file, in memory of its own.

        Args:
            name: one of ``dense``, or any other tensor of the files.
            device: where to put it.

        Raises:
            CheckpointError: there is no such tensor, or its file is broken.
        """
        ...

    def weights(self) -> Mapping[str, GptqWeight]:
        """All quantized modules, as `convert` and `save_gptq` take them. Each access reads a weight and keeps none."""
        return LazyWeights(self.quantized, self.read)


class Format(Protocol):
    """A format of checkpoints: what a module has that is an entry of ``exllama_ops.checkpoint.opening.FORMATS``."""

    NAME: str
    METHODS: tuple[str, ...]
    """What a config of this format may have as its quant_method. None if it has no such field."""

    def reasons_against(self, directory: Path, /) -> list[str]:
        """Every reason why a directory holds no checkpoint of this format. None means that the format takes it.

        It reads the JSON files alone. For a hub id nothing else has been downloaded yet.
        """
        ...

    def open_directory(self, directory: Path, /) -> Checkpoint:
        """Open a directory that the format takes.

        Raises:
            CheckpointError: the checkpoint is broken; the text names the file and the tensor or field.
        """
        ...
