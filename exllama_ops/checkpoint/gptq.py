"""Reading a GPTQ checkpoint: files and config -> `GptqWeight`, with everything checked on the way."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exllama_ops.checkpoint.config import GptqConfig, ModuleConfig, read_config
from exllama_ops.checkpoint.errors import CheckpointError
from exllama_ops.checkpoint.files import TensorFiles, local_directory
from exllama_ops.checkpoint.zeros import are_constant, constant_zeros, v1_to_v2
from exllama_ops.extras import require
from exllama_ops.layout import FORMATS, GptqWeight
from exllama_ops.layout.groups import is_trivial, num_groups

TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias")
_INT_DTYPES = ("I32",)
_FLOAT_DTYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class _Module:
    """One quantized module, as the headers and the config describe it; ``tensors`` has those that the file has."""

    name: str
    tensors: tuple[str, ...]
    bits: int
    group_size: int
    sym: bool
    K: int
    N: int

    @property
    def G(self) -> int:
        return num_groups(self.K, self.group_size)

    @property
    def qzeros_shape(self) -> tuple[int, int]:
        return self.G, self.N * self.bits // 32


class GptqCheckpoint:
    """A GPTQ checkpoint whose headers were read and checked; tensors are read on demand, one module at a time.

    Made by `open_gptq`.

    Args:
        path: the local directory.
        config: its quantization config.
        files: its tensors.

    Attributes:
        path: the local directory.
        config: the parsed quantization config.
        quantized: names of the quantized modules, in the order of the files.
        dense: names of the tensors that belong to no quantized module, in the order of the files.
        weight_bytes: bytes of all tensors.

    Raises:
        CheckpointError: the headers contradict the config or each other.
    """

    def __init__(self, path: Path, config: GptqConfig, files: TensorFiles) -> None:
        self.path = path
        self.config = config
        self._files = files
        try:
            configs = config.for_modules(_module_names(files))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        self._modules = {name: self._check_module(name, kind) for name, kind in configs.items()}
        if not self._modules:
            raise CheckpointError(f"{path}: must have quantized modules, tensors NAME.qweight; found none")
        self._warned_of_zeros = False
        members = {f"{module.name}.{tensor}" for module in self._modules.values() for tensor in module.tensors}
        self.quantized: tuple[str, ...] = tuple(self._modules)
        self.dense: tuple[str, ...] = tuple(name for name in files.tensors if name not in members)
        self.weight_bytes: int = sum(info.num_bytes for info in files.tensors.values())

    def __repr__(self) -> str:
        return (
            f"GptqCheckpoint({str(self.path)!r}, quantized={len(self.quantized)} modules, "
            f"dense={len(self.dense)} tensors, weight_bytes={self.weight_bytes})"
        )

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
        module = self._modules.get(name)
        if module is None:
            raise CheckpointError(f"{self.path}: no quantized module {name!r}; there are {len(self.quantized)}")
        tensors = self._files.read(f"{name}.{tensor}" for tensor in module.tensors)
        scales = tensors[f"{name}.scales"]
        finite = scales.isfinite()
        if not finite.all():
            group, column = (~finite).nonzero()[0].tolist()
            raise self._error(f"{name}.scales", f"must be finite; got {scales[group, column]} at [{group}, {column}]")
        g_idx = self._g_idx(module, tensors.get(f"{name}.g_idx"))
        bias = tensors.get(f"{name}.bias")
        return GptqWeight(
            qweight=_own(tensors[f"{name}.qweight"], device),
            qzeros=_own(self._zeros(module, tensors.get(f"{name}.qzeros")), device),
            scales=_own(scales, device),
            g_idx=None if g_idx is None else _own(g_idx, device),
            bits=module.bits,
            group_size=module.group_size,
            bias=None if bias is None else _own(bias, device),
        )

    def read_tensor(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor as it is in the file, with memory of its own.

        Args:
            name: one of ``dense``, or any other tensor of the files.
            device: where to put it.

        Raises:
            CheckpointError: no such tensor, or its file is broken.
        """
        if name not in self._files.tensors:
            raise CheckpointError(f"{self.path}: no tensor {name!r}; there are {len(self._files.tensors)}")
        return _own(self._files.read([name])[name], device)

    def weights(self) -> Mapping[str, GptqWeight]:
        """All quantized modules as a mapping that reads a weight on each access and keeps none."""
        return _LazyWeights(self)

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
        sizes = {
            name: sum(self._files.tensors[f"{name}.{tensor}"].num_bytes for tensor in module.tensors)
            for name, module in self._modules.items()
        }
        tqdm = require("tqdm").tqdm
        disable = None if progress else True
        with tqdm(desc="Reading", total=sum(sizes.values()), unit="B", unit_scale=True, disable=disable) as bar:
            for name, size in sizes.items():
                yield name, self.read(name, device)
                bar.update(size)

    def _error(self, tensor: str, text: str) -> CheckpointError:
        return CheckpointError(f"{self._files.tensors[tensor].file}: tensor {tensor} {text}")

    def _check_module(self, name: str, config: ModuleConfig | None) -> _Module:
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
        module = _Module(name, present, bits, group_size, config.sym, K, N)
        given = f"K={K}, N={N}, bits={bits}, group_size={group_size}"
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "g_idx": ("(K,)", (K,)),
            "scales": ("(ceil(K/group_size), N)", (module.G, N)),
            "qzeros": ("(ceil(K/group_size), N*bits/32)", module.qzeros_shape),
            "bias": ("(N,)", (N,)),
        }
        for tensor, (formula, shape) in shapes.items():
            if tensor in present and tensors[f"{name}.{tensor}"].shape != shape:
                got = tensors[f"{name}.{tensor}"].shape
                raise self._error(f"{name}.{tensor}", f"must have shape {formula} = {shape} for {given}; got {got}")
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

    def _g_idx(self, module: _Module, g_idx: Tensor | None) -> Tensor | None:
        """None if the groups are runs of rows: no g_idx, one that says so, or one that was never filled in."""
        if g_idx is None or is_trivial(g_idx, module.group_size) or not g_idx.any():
            return None
        low, high = int(g_idx.min()), int(g_idx.max())
        if low < 0 or high >= module.G:
            raise self._error(
                f"{module.name}.g_idx", f"must lie in [0, G) = [0, {module.G}); got values from {low} to {high}"
            )
        return g_idx

    def _zeros(self, module: _Module, stored: Tensor | None) -> Tensor:
        """The zero points in the v2 convention."""
        middle = 2 ** (module.bits - 1)
        if stored is None:
            return constant_zeros(middle, module.bits, module.qzeros_shape, torch.device("cpu"))
        is_v1 = self.config.checkpoint_format == "gptq"
        if module.sym and are_constant(stored, middle if is_v1 else middle - 1, module.bits):
            self._warn_of_zeros(module, middle if is_v1 else middle - 1)
            is_v1 = not is_v1
        return v1_to_v2(stored, module.bits) if is_v1 else stored

    def _warn_of_zeros(self, module: _Module, stored: int) -> None:
        if self._warned_of_zeros:
            return
        self._warned_of_zeros = True
        declared = self.config.checkpoint_format
        actual = "gptq_v2" if declared == "gptq" else "gptq"
        warnings.warn(
            f"{self.path}: checkpoint_format {declared} is declared, but symmetric zero points are stored as {stored}, "
            f"as in {actual} (first in tensor {module.name}.qzeros); such tensors are read as {actual}",
            stacklevel=4,
        )


class _LazyWeights(Mapping[str, GptqWeight]):
    def __init__(self, checkpoint: GptqCheckpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> GptqWeight:
        if name not in self:
            raise KeyError(name)
        return self._checkpoint.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.quantized)

    def __len__(self) -> int:
        return len(self._checkpoint.quantized)


def _own(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy, so that nothing keeps the file mapped."""
    return tensor.to(device, copy=True)


def _module_names(files: TensorFiles) -> dict[str, None]:
    """Modules that have a tensor only a quantized module has, in the order of the files."""
    names: dict[str, None] = {}
    for tensor in files.tensors:
        module, _, kind = tensor.rpartition(".")
        if module and kind in ("qweight", "qzeros", "g_idx"):
            names[module] = None
    return names


def open_gptq(path_or_id: str | os.PathLike[str], *, revision: str | None = None) -> GptqCheckpoint:
    """Open a GPTQ checkpoint: read its config and the headers of its files, and check them against each other.

    Args:
        path_or_id: a directory with safetensors files and config.json or quantize_config.json, or a hub id
            (``owner/name``), which is downloaded into the hub's cache.
        revision: branch, tag or commit of a hub id.

    Returns:
        The checkpoint, nothing of its weights read yet.

    Raises:
        CheckpointError: not a GPTQ checkpoint, an unsupported kind of one, or a broken one; the text names the file and
            the tensor or field.
        ImportError: the extra ``hf`` is not installed.

    Warns:
        UserWarning: config.json and quantize_config.json contradict each other, or the index leaves tensors out.
    """
    # A hub id's configs come first: what is not GPTQ is refused before its weights are downloaded.
    directory = local_directory(path_or_id, revision, configs_only=True)
    config = read_config(directory)
    directory = local_directory(path_or_id, revision)
    return GptqCheckpoint(directory, config, TensorFiles(directory))


def read_gptq(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, GptqWeight]:
    """Read all quantized weights of a GPTQ checkpoint, one at a time.

    Args:
        path_or_id: as in `open_gptq`.
        revision: as in `open_gptq`.
        device: where to put the weights.
        progress: show a progress bar on stderr, if that is a terminal.

    Returns:
        Module name -> weight, in the order of the files.

    Raises:
        CheckpointError: as in `open_gptq` and `GptqCheckpoint.read`.
        ImportError: as in `open_gptq`.
    """
    return dict(open_gptq(path_or_id, revision=revision).stream(device, progress=progress))
