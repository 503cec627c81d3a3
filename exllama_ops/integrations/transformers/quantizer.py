"""`register`: transformers loads, saves, trains and splits GPTQ checkpoints with this library's layers."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import modeling_utils
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationMethod

from exllama_ops.checkpoint import Checkpoint, CheckpointError, autoround, compressed_tensors_config, open_checkpoint
from exllama_ops.integrations.transformers import parallel
from exllama_ops.integrations.transformers.experts import ExpertStacks, run_in_graphs, take_experts
from exllama_ops.integrations.transformers.folders import looking_further
from exllama_ops.integrations.transformers.head import untie
from exllama_ops.integrations.transformers.names import ExpertPlace, places
from exllama_ops.integrations.transformers.offload import offload
from exllama_ops.integrations.transformers.pending import PendingLinear
from exllama_ops.integrations.transformers.state import saved_state
from exllama_ops.nn import ExllamaLinear, linear_sizes
from exllama_ops.nn.dense_weight import dense_weight

# Tensors of quantized modules, as the formats that are read name them. The quantizer reads them itself.
_READ_HERE = r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_zero_point|weight_shape|weight_g_idx)$"


class GPTQConfig(transformers.GPTQConfig):  # type: ignore[misc]
    """A quantization config as the files have it: transformers' own class drops `dynamic` and refuses other methods.

    It has the name of transformers' class, which compares names.

    Args:
        raw: the JSON object.
        checkpoint: the opened checkpoint, if it is open.
        count: called with every layer that is read; None shows transformers' own progress bar.
    """

    def __init__(
        self, raw: Mapping[str, Any], checkpoint: Checkpoint | None = None, count: Callable[[], None] | None = None
    ) -> None:
        self.quant_method = QuantizationMethod.GPTQ
        self.raw = dict(raw)
        self.checkpoint = checkpoint
        self.count = count

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> GPTQConfig:
        """The config of a JSON object."""
        return cls(config_dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["raw"][name]
        except KeyError:
            raise AttributeError(f"the quantization config has no field {name!r}") from None

    def __deepcopy__(self, memo: dict[int, Any]) -> GPTQConfig:
        # transformers copies configs several times; an opened checkpoint stays one.
        return GPTQConfig(self.raw, self.checkpoint, self.count)

    def get_loading_attributes(self) -> dict[str, Any]:
        """None: what the files say holds."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return dict(self.raw)


class ExllamaQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads and saves a quantized model.

    Args:
        quantization_config: of the files, or as an argument of ``from_pretrained`` for files that have none.
        pre_quantized: True if it is of the files.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, pre_quantized: bool = True) -> None:
        # Nothing is quantized here: files without packed weights are refused when they are opened.
        super().__init__(quantization_config, pre_quantized=True)
        self._argument = None if pre_quantized else quantization_config.to_dict()
        self.checkpoint: Checkpoint | None = getattr(quantization_config, "checkpoint", None)
        self.names_in_files: dict[str, str] = {}
        self._count = getattr(quantization_config, "count", None)
        self._pending: dict[str, PendingLinear] = {}
        self._runs_in_graphs = True
        # Parameters of all experts that the layers of one expert were parts of: transformers' plans name those.
        self._merged: dict[str, str] = {}

    @property
    def is_trainable(self) -> bool:
        """Adapters train: gradients flow through the layers to x."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether generate() may compile the forward: the host reads who was chosen of experts without stacks."""
        return self._runs_in_graphs

    def is_serializable(self) -> bool:
        """save_pretrained writes a GPTQ checkpoint."""
        return True

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes of an element. One byte stands for all tensors of a layer that has not been read."""
        owner, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, PendingLinear) and leaf == "place":
            return module.num_bytes
        return param.element_size()

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Leave transformers' plan as it is: layers are cut while they are read."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.checkpoint is None:
            self.checkpoint = _opened(checkpoint_files, self._argument)
        checkpoint = self.checkpoint
        found = places(model, checkpoint.quantized)
        layers = {
            name: PendingLinear(name, checkpoint.summary(name), model.dtype) for name in (*found.layers, *found.experts)
        }
        problems = [*found.problems]
        for name, target in found.layers.items():
            if reason := _reason_against(model.get_submodule(target), layers[name]):
                problems.append(f"{name}: {reason}")
        experts, wrong = take_experts(model, found.experts, layers) if not problems else ({}, [])
        problems += wrong
        if problems:
            raise CheckpointError(
                f"{checkpoint.path}: its quantized layers do not fit {type(model).__name__}, which config.json "
                f"describes. {'. '.join(problems[:3])}" + (f". And {len(problems) - 3} more" if problems[3:] else "")
            )
        for name, target in found.layers.items():
            model.set_submodule(target, layers[name])
        self._merged = {
            target: f"{found.experts[name].experts}.{found.experts[name].parameter}" for name, target in experts.items()
        }
        targets = {**found.layers, **experts}
        self._pending = {target: layers[name] for name, target in targets.items()}
        self.names_in_files = {target: name for name, target in targets.items()}
        untie(model, *self._pending)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, _READ_HERE, *map(_bias_read_here, found.experts.values())}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        checkpoint = self.checkpoint
        assert checkpoint is not None
        cuts = parallel.cuts(model, self._pending, self._merged)
        device_map = getattr(model, "hf_device_map", {})
        stacks = ExpertStacks()
        bar = logging.tqdm(self._pending.items(), desc="Packing quantized layers", disable=self._count is not None)
        for target, layer in bar:
            device, cut = layer.place.device, cuts.get(target)
            if cut is None:
                filled = layer.fill(checkpoint.read(layer.name_in_files, device))
            else:
                filled = parallel.fill(target, layer, checkpoint.read(layer.name_in_files), cut, device)
            offload(filled, _mapped(device_map, target))
            if target in self._merged:
                stacks.put(model, target, filled)
            if self._count is not None:
                self._count()
        stacks.finish(model)
        self._runs_in_graphs = run_in_graphs(model)
        self._pending, self._count = {}, None  # what a copy of the model need not have
        self.quantization_config = model.config.quantization_config = GPTQConfig(checkpoint.quantization, checkpoint)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, layer in [*model.named_modules()]:
            if isinstance(layer, ExllamaLinear):
                model.set_submodule(name, _dense(layer, dtype or layer.weight_dtype))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors of a GPTQ checkpoint, and what else its files say: nothing."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # of adapters alone
        state, raw = saved_state(model, self.checkpoint, self.names_in_files)
        model.config.quantization_config = GPTQConfig(raw, self.checkpoint)
        return state, {}


def _opened(checkpoint_files: list[str] | None, argument: Mapping[str, Any] | None) -> Checkpoint:
    """The checkpoint of the files that transformers found. The argument says what they do not."""
    if not checkpoint_files:
        raise CheckpointError("from_pretrained: a quantized model needs its files; got a state_dict alone")
    fields = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")
    said = None if argument is None else {name: argument[name] for name in fields if name in argument}
    return open_checkpoint(Path(checkpoint_files[0]).parent, quantization_config=said)


def _dense(layer: ExllamaLinear, dtype: torch.dtype) -> nn.Linear:
    """A dense layer with the weight of a packed one."""
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    with torch.device("meta"):
        dense = nn.Linear(layer.in_features, layer.out_features, bias is not None, dtype=dtype)
    dense.weight = nn.Parameter(dense_weight(layer).to(dtype).contiguous())
    if bias is not None:
        dense.bias = nn.Parameter(bias)
    return dense.train(layer.training)


def _bias_read_here(place: ExpertPlace) -> str:
    """Names of the biases of experts in files, which the quantizer reads itself."""
    experts = re.escape(place.experts.rpartition(".")[2])
    own = rf"([0-9]+\.{place.projection}|{place.projection}\.[0-9]+)\.bias"
    return rf"\.{experts}\.({own}|{place.parameter}_bias)$"


def _mapped(device_map: Mapping[str, Any], name: str) -> Any:
    """What a device map says of a module: its own entry, or that of the nearest module around it."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map.get(name)


def _reason_against(module: nn.Module, layer: PendingLinear) -> str:
    """Why a quantized layer cannot take the place of a module; empty if it can."""
    expected = linear_sizes(module)
    if expected is None:
        return f"{type(module).__name__} does not compute x @ W + bias"
    got = (layer.in_features, layer.out_features)
    if expected != got:
        return f"must have a weight of (K, N) = {expected}; got {got}"
    if getattr(module, "bias", None) is not None and layer.bias is None:
        return "has a bias in the model, which the files lack"
    return ""


# What `register` replaces, by method: whether this library reads the files of a config.
_METHODS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "gptq": lambda raw: True,
    "awq": lambda raw: str(raw.get("version") or "gemm").lower() == "gemm",
    "compressed-tensors": lambda raw: raw.get("format") == compressed_tensors_config.FORMAT,
    **dict.fromkeys(
        autoround.METHODS, lambda raw: (raw.get("packing_format") or "auto_round:auto_gptq") in autoround.LAYOUTS
    ),
}


class _ConfigChoice:
    """In transformers' table of configs: this library's where it reads the files, and the former one elsewhere."""

    def __init__(self, is_read: Callable[[Mapping[str, Any]], bool], former: Any) -> None:
        self._is_read, self._former = is_read, former

    def from_dict(self, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """The config of a JSON object."""
        chosen = GPTQConfig if self._former is None or self._is_read(config_dict) else self._former
        return chosen.from_dict(config_dict, **kwargs)


class Registration:
    """What `register` returns. While at least one is not undone, transformers uses this library."""

    _lock = threading.Lock()
    _count = 0
    # What was in the places of transformers: configs by method, the quantizer of GPTQ, and what asks for one.
    _former: tuple[dict[str, Any], Any, Any] = ({}, None, None)

    def __init__(self) -> None:
        self._active = True
        with self._lock:
            Registration._count += 1
            if Registration._count == 1:
                configs, quantizers = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
                former = {method: configs.get(method) for method in _METHODS}
                Registration._former = former, quantizers["gptq"], modeling_utils.get_hf_quantizer
                for method, is_read in _METHODS.items():
                    configs[method] = _ConfigChoice(is_read, configs.get(method))
                quantizers["gptq"] = ExllamaQuantizer
                modeling_utils.get_hf_quantizer = looking_further(modeling_utils.get_hf_quantizer)

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            if not self._active:
                return
            self._active = False
            Registration._count -= 1
            if Registration._count == 0:
                configs, auto.AUTO_QUANTIZER_MAPPING["gptq"], modeling_utils.get_hf_quantizer = Registration._former
                for method, config in configs.items():
                    if config is None:
                        del auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
                    else:
                        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config
