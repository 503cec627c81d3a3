"""The quantization config by which vLLM runs a checkpoint with this library's layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.models.utils import WeightsMapper

from exllama_ops.checkpoint import (
    Checkpoint,
    CheckpointError,
    autoround,
    awq,
    compressed_tensors,
    gptq,
    open_checkpoint,
)
from exllama_ops.checkpoint.errors import listed
from exllama_ops.integrations.vllm import refusals
from exllama_ops.integrations.vllm.experts import ExllamaExpertsMethod
from exllama_ops.integrations.vllm.linear import ExllamaLinearMethod
from exllama_ops.integrations.vllm.loading import PackedLayers

NAME = "exllama_ops"

_METHODS = (*gptq.METHODS, *autoround.METHODS, *awq.METHODS, *compressed_tensors.METHODS)

logger = init_logger(f"vllm.{__name__}")


class PackedMapper(WeightsMapper):  # type: ignore[misc]
    """What is done to the weights that pass a loader of vLLM: quantized layers keep theirs, the others are renamed.

    Args:
        config: of the checkpoint.
        others: renames what is left.
    """

    def __init__(self, config: ExllamaConfig, others: WeightsMapper) -> None:
        super().__init__()
        self.config = config
        self.others = others

    def __or__(self, other: WeightsMapper) -> PackedMapper:
        return PackedMapper(self.config, self.others | other)

    def __ror__(self, other: WeightsMapper) -> PackedMapper:
        return PackedMapper(self.config, other | self.others)

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """The weights that a loader gets, by their names in vLLM."""
        config = self.config
        renamed: Iterable[tuple[str, Tensor]] = self.others.apply(
            config.layers.left(weights, config.checkpoint, config.reopen)
        )
        return renamed


class ExllamaConfig(QuantizationConfig):  # type: ignore[misc]
    """Runs the quantized layers of a checkpoint by this library. vLLM sends it to its workers.

    Args:
        raw: the quantization config of the files.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        super().__init__()
        self.raw = dict(raw)
        self.model = ""
        self.revision: str | None = None
        # Name of the layer in vLLM -> name in the files.
        self._names: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"ExllamaConfig({self.model!r}, {len(self._names)} quantized layers)"

    def __getstate__(self) -> dict[str, Any]:
        # Each process opens the files itself.
        return {name: value for name, value in vars(self).items() if name not in ("checkpoint", "layers")}

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The opened checkpoint, which reads a layer when it is asked for one."""
        return open_checkpoint(self.model, revision=self.revision)

    @cached_property
    def layers(self) -> PackedLayers:
        """The quantized layers of this process."""
        return PackedLayers()

    def reopen(self) -> Checkpoint:
        """Open the files again, for vLLM to load what they hold now. It may have been told of others."""
        if current := get_current_vllm_config_or_none():
            self.model, self.revision = current.model_config.model, current.model_config.revision
        self.__dict__.pop("checkpoint", None)
        return self.checkpoint

    @classmethod
    def get_name(cls) -> str:
        """The name that ``--quantization`` takes."""
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """All dtypes of x that the ops take."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest CUDA device that the kernels run on, times ten."""
        return 60

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Where else a quantization config may stand."""
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ExllamaConfig:
        """The config of a JSON object."""
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take what the user asks for, and what vLLM itself would refuse; leave the rest alone."""
        if user_quant == NAME:
            return NAME
        if user_quant is not None or str(hf_quant_cfg.get("quant_method", "")).lower() not in _METHODS:
            return None
        if reasons := refusals.reasons(hf_quant_cfg, hf_config):
            logger.info_once("exllama_ops runs this checkpoint, since vLLM refuses it: %s", "; ".join(reasons))
            return NAME
        return None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Note which checkpoint it is, and which layers of it are quantized."""
        self.model, self.revision = model_name, revision
        self._names = {name: name for name in self.checkpoint.quantized}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Name the layers as vLLM's model does."""
        renamed = {name: hf_to_vllm_mapper.apply_list([name]) for name in self._names.values()}
        self._names = {new[0]: name for name, new in renamed.items() if new}

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """What vLLM's loaders leave out."""
        return PackedMapper(self, WeightsMapper())

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How a layer is computed: by this library if the files have packed weights for it.

        Raises:
            CheckpointError: the files quantize some of the weights that vLLM fuses, and leave others dense.
        """
        if isinstance(layer, RoutedExperts):
            return ExllamaExpertsMethod.of(self, layer, prefix)
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        names = self.names_of(prefix)
        if names:
            self.take(names)
            return ExllamaLinearMethod(self, names)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else UnquantizedEmbeddingMethod()

    def names_of(self, prefix: str) -> list[str]:
        """The names in the files of the weights that are fused into a layer of vLLM, in their order."""
        if prefix in self._names:
            return [self._names[prefix]]
        before, _, last = prefix.rpartition(".")
        members = [f"{before}.{part}" if before else part for part in self.packed_modules_mapping.get(last, ())]
        dense = [member for member in members if member not in self._names]
        if members and dense and len(dense) < len(members):
            raise CheckpointError(
                f"{self.model}: {prefix} fuses {listed(members)}, of which {listed(dense)} are not quantized; "
                "exllama_ops needs all of them quantized, or none"
            )
        return [] if dense else [self._names[member] for member in members]

    def take(self, names: Iterable[str]) -> None:
        """Read the layers of these names in the files here, and keep their tensors from vLLM's loaders."""
        wanted = set(names)
        for name, stored in self._names.items():
            if stored in wanted:
                self.layers.add(stored, name)

    def names_below(self, prefix: str) -> Iterable[tuple[str, str]]:
        """Quantized layers within a module: what follows its name in vLLM, and the name in the files."""
        start = f"{prefix}."
        return ((name[len(start) :], stored) for name, stored in self._names.items() if name.startswith(start))


def register_config() -> None:
    """Register `ExllamaConfig` with vLLM, once."""
    try:
        get_quantization_config(NAME)
    except ValueError:
        register_quantization_config(NAME)(ExllamaConfig)
