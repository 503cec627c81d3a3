"""The format GPTQ: files and config -> `GptqWeight`, with everything checked on the way."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exllama_ops.checkpoint.base import Checkpoint, ModuleSummary
from exllama_ops.checkpoint.choice import MEANT_FIELDS
from exllama_ops.checkpoint.config import GptqConfig, ModuleConfig, parse_config, read_config
from exllama_ops.checkpoint.errors import CheckpointError
from exllama_ops.checkpoint.fields import read_quantization
from exllama_ops.checkpoint.files import TensorFiles, local_directory, place_of
from exllama_ops.checkpoint.module import TENSORS, GptqModule, TensorError
from exllama_ops.extras import require
from exllama_ops.layout import FORMATS, GptqWeight

NAME = "gptq"

# As the headers of safetensors name them.
_INT_DTYPES = {"I32": torch.int32}
_FLOAT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class GptqCheckpoint(Checkpoint):
    """A GPTQ checkpoint whose headers were read and checked; tensors are read on demand, one module at a time.

    Made by `open_gptq`.

    Args:
        path: the local directory.
        config: its quantization config.
        files: its tensors.
        quantization: the quantization config as the files have it.

    Attributes:
        format: "gptq".
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
        self, path: Path, config: GptqConfig, files: TensorFiles, quantization: Mapping[str, Any] | None = None
    ) -> None:
        self.format = NAME
        self.path = path
        self.config = config
        self.quantization: Mapping[str, Any] = dict(quantization or {})
        self._files = files
        try:
            configs = config.for_modules(_module_names(files))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        self._modules = {name: self._check_module(name, kind) for name, kind in configs.items()}
        self._configs = {name: kind for name, kind in configs.items() if kind is not None}
        if not self._modules:
            raise CheckpointError(f"{path}: must have quantized modules, tensors NAME.qweight; found none")
        self._warned_of_zeros = False
        members = {f"{name}.{tensor}" for name, module in self._modules.items() for tensor in module.tensors}
        self.quantized: tuple[str, ...] = tuple(self._modules)
        self.dense: tuple[str, ...] = tuple(name for name in files.tensors if name not in members)
        self.weight_bytes: int = sum(info.num_bytes for info in files.tensors.values())

    def __repr__(self) -> str:
        return (
            f"GptqCheckpoint({str(self.path)!r}, quantized={len(self.quantized)} modules, "
            f"dense={len(self.dense)} tensors, weight_bytes={self.weight_bytes})"
        )

    def module(self, name: str) -> GptqModule:
        """What the headers and the config say of one quantized module: its sizes, its tensors, their shapes and dtypes.

        Args:
            name: one of ``quantized``.

        Raises:
            CheckpointError: there is no such module.
        """
        module = self._modules.get(name)
        if module is None:
            raise CheckpointError(f"{self.path}: no quantized module {name!r}; there are {len(self.quantized)}")
        return module

    def summary(self, name: str) -> ModuleSummary:
        """What the config and the headers say of one quantized module. Whether rows have an order is the config's word.

        Args:
            name: one of ``quantized``.

        Raises:
            CheckpointError: there is no such module.
        """
        module, config = self.module(name), self._configs[name]
        has_order = config.desc_act and not config.static_groups and "g_idx" in module.tensors
        return ModuleSummary(
            in_features=module.in_features,
            out_features=module.out_features,
            bits=module.bits,
            group_size=module.group_size,
            num_groups=module.G,
            sym=module.sym,
            act_order=has_order and module.G > 1,
            zero_format=self.config.checkpoint_format,
            bias="bias" in module.tensors,
            num_bytes=sum(self._files.tensors[f"{name}.{tensor}"].num_bytes for tensor in module.tensors),
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
            CheckpointError: no such module, or its data is wrong: g_idx out of range, scales that are NaN or infinite.

        Warns:
            UserWarning: the zero points of a symmetric module contradict the declared format; once per checkpoint.
        """
        module = self.module(name)
        tensors = self._files.read(f"{name}.{tensor}" for tensor in module.tensors)
        within = {tensor: tensors[f"{name}.{tensor}"] for tensor in module.tensors}
        try:
            decoded = module.decode(within, lambda tensor: tensor.to(device))
        except TensorError as error:
            raise self._error(f"{name}.{error.tensor}", error.rule) from error
        if decoded.contradiction is not None:
            self._warn_of_zeros(name, decoded.contradiction)
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

    def _error(self, tensor: str, text: str) -> CheckpointError:
        return CheckpointError(f"{self._files.tensors[tensor].file}: tensor {tensor} {text}")

    def _check_module(self, name: str, config: ModuleConfig | None) -> GptqModule:
        """Check the headers of one module against its config."""
        tensors = self._files.tensors
        present = tuple(tensor for tensor in TENSORS if f"{name}.{tensor}" in tensors)
        if config is None:
            raise self._error(f"{name}.{present[0]}", "must not exist: a `dynamic` rule says that it is not quantized")
        self._check_presence(name, present, config)
        for tensor in present:
            info = tensors[f"{name}.{tensor}"]
            dtypes = _FLOAT_DTYPES if tensor in ("scales", "bias") else _INT_DTYPES
            if info.dtype not in dtypes:
                raise self._error(f"{name}.{tensor}", f"must have dtype {' or '.join(dtypes)}; got {info.dtype}")

        bits, fmt = config.bits, FORMATS[config.bits]
        qweight = tensors[f"{name}.qweight"].shape
        if len(qweight) != 2 or 0 in qweight or qweight[0] % fmt.block_words:
            raise self._error(
                f"{name}.qweight",
                f"must have shape (K*bits/32, N), rows in runs of {fmt.block_words} for bits={bits}; got {qweight}",
            )
        K, N = qweight[0] * 32 // bits, qweight[1]
        if N % fmt.block_values:
            raise self._error(
                f"{name}.qweight", f"must have N, a multiple of {fmt.block_values} for bits={bits}, columns; got {N}"
            )
        group_size = K if config.group_size == -1 else config.group_size
        bias = tensors.get(f"{name}.bias")
        module = GptqModule(
            in_features=K,
            out_features=N,
            bits=bits,
            group_size=group_size,
            zero_offset=self.config.zero_offset,
            sym=config.sym,
            tensors=present,
            scales_dtype=_FLOAT_DTYPES[tensors[f"{name}.scales"].dtype],
            bias_dtype=torch.float16 if bias is None else _FLOAT_DTYPES[bias.dtype],
        )
        for tensor in present:
            try:
                module.check_shape(tensor, tensors[f"{name}.{tensor}"].shape)
            except TensorError as error:
                raise self._error(f"{name}.{tensor}", error.rule) from error
        return module

    def _check_presence(self, name: str, present: tuple[str, ...], config: ModuleConfig) -> None:
        """Check that a module has the tensors its config asks for, in a format that is supported."""
        where = self._files.tensors[f"{name}.{present[0]}"].file
        if f"{name}.weight" in self._files.tensors:
            raise self._error(f"{name}.weight", f"must not exist beside {name}.{present[0]}: one of them is the weight")
        if f"{name}.perm" in self._files.tensors:
            raise self._error(
                f"{name}.perm",
                "must not exist: it belongs to the state_dict of an ExllamaLinear, which is no GPTQ checkpoint; "
                "exllama_ops.save_gptq writes one from ExllamaLinear.to_weight()",
            )
        for tensor in ("qweight", "scales"):
            if tensor not in present:
                raise CheckpointError(f"{where}: tensor {name}.{tensor} is missing")
        if "qzeros" not in present and not config.sym:
            raise CheckpointError(
                f"{where}: tensor {name}.qzeros is missing: only sym=true can do without; got sym=false"
            )
        if "g_idx" not in present and config.desc_act and config.group_size != -1 and not config.static_groups:
            raise CheckpointError(
                f"{where}: tensor {name}.g_idx is missing: only it says the groups of the rows with desc_act=true and "
                f"group_size={config.group_size}"
            )
        if self.config.checkpoint_format == "gptq_p" and config.bits == 3:
            raise CheckpointError(
                f"{where}: module {name}: checkpoint_format gptq_p is supported for 2, 4 and 8 bits, where it equals "
                "gptq_v2; got 3 bits"
            )

    def _warn_of_zeros(self, name: str, stored: int) -> None:
        if self._warned_of_zeros:
            return
        self._warned_of_zeros = True
        declared = self.config.checkpoint_format
        actual = "gptq_v2" if declared == "gptq" else "gptq"
        warnings.warn(
            f"{self.path}: checkpoint_format {declared} is declared, but symmetric zero points are stored as {stored}, "
            f"as in {actual} (first in tensor {name}.qzeros); such tensors are read as {actual}",
            stacklevel=3,
        )


def _module_names(files: TensorFiles) -> dict[str, None]:
    """Modules that have a tensor only a quantized module has, in the order of the files."""
    names: dict[str, None] = {}
    for tensor in files.tensors:
        module, _, kind = tensor.rpartition(".")
        if module and kind in ("qweight", "qzeros", "g_idx"):
            names[module] = None
    return names


def reasons_against(directory: Path) -> list[str]:
    """Every reason why a directory holds no GPTQ checkpoint, by its configs alone."""
    try:
        read_config(directory, quiet=True)
    except CheckpointError as error:
        return [str(error)]
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
