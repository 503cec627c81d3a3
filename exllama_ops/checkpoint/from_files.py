"""What the formats in safetensors files share: modules whose tensors are read, put into GPTQ's layout and decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exllama_ops.checkpoint.base import Checkpoint, ModuleSummary
from exllama_ops.checkpoint.config import ModuleConfig
from exllama_ops.checkpoint.errors import CheckpointError, Reasons, shown
from exllama_ops.checkpoint.files import TensorFiles
from exllama_ops.checkpoint.module import GptqModule, TensorError
from exllama_ops.layout import GptqWeight

# As the headers of safetensors name them.
_INT_DTYPES = {"I32": torch.int32}
_FLOAT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class FileModule:
    """One quantized module of the files.

    Args:
        module: what it is once its tensors are in GPTQ's layout.
        names: tensor of ``module`` -> its name in the files.
        act_order: whether its config says that groups are not runs of rows.
        zero_format: as in `ModuleSummary`.
        others: names of its tensors in the files that ``module`` lacks, such as one that has its shape.
    """

    module: GptqModule
    names: Mapping[str, str]
    act_order: bool
    zero_format: str
    others: tuple[str, ...] = ()


class FileCheckpoint(Checkpoint):
    """A checkpoint in safetensors files. A format's class says how the tensors of a module are put into GPTQ's layout.

    Args:
        path: the local directory.
        config: its quantization config, parsed.
        quantization: the same as the files have it.
        files: its tensors.
        modules: its quantized modules, in the order of the files.
        skipped: names of tensors that belong to nothing that is read.
    """

    def __init__(
        self,
        path: Path,
        config: Any,
        quantization: Mapping[str, Any],
        files: TensorFiles,
        modules: Mapping[str, FileModule],
        skipped: frozenset[str] = frozenset(),
    ) -> None:
        self.path = path
        self.config = config
        self.quantization: Mapping[str, Any] = dict(quantization)
        self._files = files
        self._modules = dict(modules)
        members = {name for module in modules.values() for name in (*module.names.values(), *module.others)}
        self.quantized: tuple[str, ...] = tuple(modules)
        self.dense: tuple[str, ...] = tuple(name for name in files.tensors if name not in members | skipped)
        self.stacks: Mapping[str, int] = files.stacks
        self.weight_bytes: int = sum(info.num_bytes for info in files.tensors.values())

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.path)!r}, quantized={len(self.quantized)} modules, "
            f"dense={len(self.dense)} tensors, weight_bytes={self.weight_bytes})"
        )

    def summary(self, name: str) -> ModuleSummary:
        """What the config and the headers say of one quantized module. Whether rows have an order is the config's word.

        Args:
            name: one of ``quantized``.

        Raises:
            CheckpointError: there is no such module.
        """
        described = self._described(name)
        module = described.module
        return ModuleSummary(
            in_features=module.in_features,
            out_features=module.out_features,
            bits=module.bits,
            group_size=module.group_size,
            num_groups=module.G,
            sym=module.sym,
            act_order=described.act_order and "g_idx" in module.tensors and module.G > 1,
            zero_format=described.zero_format,
            bias="bias" in module.tensors,
            num_bytes=sum(self._files.tensors[tensor].num_bytes for tensor in described.names.values()),
        )

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor of the files, from their headers.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self._files.info(name).shape

    def tensor_dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor of the files, from their headers.

        Raises:
            CheckpointError: there is no such tensor, or its dtype is none of PyTorch's.
        """
        return self._files.dtype(name)

    def read(self, name: str, device: torch.device | str = "cpu") -> GptqWeight:
        """Read one quantized module.

        Args:
            name: one of ``quantized``.
            device: where to put the tensors.

        Returns:
            The weight, its zero points in the v2 convention and ``g_idx`` None without activation order. It owns its
            memory.

        Raises:
            CheckpointError: no such module, or its data is wrong: an order out of range, scales that are NaN or
                infinite.

        Warns:
            UserWarning: the zero points of a symmetric module contradict the declared format; once per checkpoint.
        """
        described = self._described(name)
        stored = self._files.read(described.names.values())
        tensors = {tensor: stored[file_name] for tensor, file_name in described.names.items()}
        try:
            decoded = described.module.decode(self._repack(described.module, tensors), lambda tensor: tensor.to(device))
        except TensorError as error:
            raise tensor_error(self._files, described.names[error.tensor], error.rule) from error
        if decoded.contradiction is not None:
            self._found_contradiction(name, decoded.contradiction)
        return decoded.weight

    def read_tensor(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor as it is in the file, with memory of its own.

        Args:
            name: one of ``dense``, or any other tensor of the files.
            device: where to put it.

        Raises:
            CheckpointError: no such tensor, or its file is broken.
        """
        self._files.info(name)
        return self._files.read([name])[name].to(device)

    def _described(self, name: str) -> FileModule:
        described = self._modules.get(name)
        if described is None:
            raise CheckpointError(f"{self.path}: no quantized module {shown(name)}; there are {len(self.quantized)}")
        return described

    def _repack(self, module: GptqModule, tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of a module, in GPTQ's layout."""
        return tensors

    def _found_contradiction(self, name: str, stored: int) -> None:
        """Called where symmetric zero points contradict the declared format."""


def tensor_error(files: TensorFiles, tensor: str, text: str) -> CheckpointError:
    """The error that names a tensor and its file."""
    return CheckpointError(f"{files.tensors[tensor].file}: tensor {tensor} {text}")


def checked_modules(
    configs: Mapping[str, ModuleConfig | None], check: Callable[[str, ModuleConfig | None], FileModule]
) -> dict[str, FileModule]:
    """What a format's check makes of each module.

    Raises:
        CheckpointError: it refuses some; the error has the reasons of all.
    """
    modules: dict[str, FileModule] = {}
    reasons = Reasons()
    for name, kind in configs.items():
        with reasons:
            modules[name] = check(name, kind)
    reasons.raise_all()
    return modules


def named_modules(files: TensorFiles, kinds: tuple[str, ...]) -> dict[str, None]:
    """Modules that have a tensor whose last name is one of ``kinds``, in the order of the files."""
    names: dict[str, None] = {}
    for tensor in files.tensors:
        module, _, kind = tensor.rpartition(".")
        if module and kind in kinds:
            names[module] = None
    return names


def check_no_other_weight(files: TensorFiles, name: str, tensor: str) -> None:
    """Check that a module that has a tensor of a quantized one has no dense weight."""
    if f"{name}.weight" in files.tensors:
        raise tensor_error(files, f"{name}.weight", f"must not exist beside {tensor}: one of them is the weight")


def check_dtypes(files: TensorFiles, names: Mapping[str, str]) -> None:
    """Check the dtypes of a module's tensors; ``names`` is as in `FileModule`."""
    for tensor, name in names.items():
        dtypes = _FLOAT_DTYPES if tensor in ("scales", "bias") else _INT_DTYPES
        dtype = files.tensors[name].dtype
        if dtype not in dtypes:
            raise tensor_error(files, name, f"must have dtype {' or '.join(dtypes)}; got {dtype}")


def described_module(
    files: TensorFiles, names: Mapping[str, str], kind: ModuleConfig, K: int, N: int, zero_offset: int
) -> GptqModule:
    """The module of K x N that has tensors of these names, whose dtypes were checked."""
    bias = _FLOAT_DTYPES[files.tensors[names["bias"]].dtype] if "bias" in names else torch.float16
    return GptqModule(
        in_features=K,
        out_features=N,
        bits=kind.bits,
        group_size=K if kind.group_size == -1 else kind.group_size,
        zero_offset=zero_offset,
        sym=kind.sym,
        tensors=tuple(names),
        scales_dtype=_FLOAT_DTYPES[files.tensors[names["scales"]].dtype],
        bias_dtype=bias,
    )


def check_shapes(files: TensorFiles, names: Mapping[str, str], module: GptqModule) -> None:
    """Check the shapes of the tensors of these names, which are in GPTQ's layout."""
    for tensor, name in names.items():
        try:
            module.check_shape(tensor, files.tensors[name].shape)
        except TensorError as error:
            raise tensor_error(files, name, error.rule) from error
