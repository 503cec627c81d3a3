"""What ``save_pretrained`` writes of a model with packed layers: the tensors and the config of a GPTQ checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from exllama_ops.checkpoint import Checkpoint
from exllama_ops.checkpoint.config import GptqConfig
from exllama_ops.checkpoint.from_files import FileCheckpoint
from exllama_ops.checkpoint.on_disk import file_tensors, quantization_config
from exllama_ops.checkpoint.stacks import stacked
from exllama_ops.checkpoint.zeros import are_constant
from exllama_ops.layout import GptqWeight
from exllama_ops.nn import ExllamaLinear


def saved_state(
    model: Any, checkpoint: Checkpoint | None, names_in_files: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict of a model as files have it, and the quantization config that describes it.

    A model that came from GPTQ files gets their tensors and their config back, bit for bit. One that came from another
    format, or whose layers have changed, gets format gptq_v2.

    Args:
        model: with `ExllamaLinear` layers.
        checkpoint: that it was loaded from.
        names_in_files: name of the module -> name in the files.

    Raises:
        ValueError: this process holds a part of the model alone.
    """
    if (model._tp_size or 1) > 1:
        raise ValueError(
            "save_pretrained: under tensor parallelism each process holds a part of the packed weights. Load the model "
            "without it, and save that one"
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ExllamaLinear)}
    state = {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[0] not in layers}
    config = _as_in_files(layers, checkpoint, names_in_files)
    checkpoint_format = "gptq" if config is not None and config.zero_offset else "gptq_v2"
    kinds: dict[str, tuple[int, int, int]] = {}
    sym, act_order = True, False
    for name, layer in layers.items():
        weight = layer.to_weight()
        state.update(file_tensors(_ordered(name, names_in_files.get(name, name)), weight, checkpoint_format))
        kinds[names_in_files.get(name, name)] = (weight.bits, weight.group_size, weight.in_features)
        sym = sym and _is_symmetric(weight)
        act_order = act_order or weight.g_idx is not None
    if config is not None and isinstance(checkpoint, FileCheckpoint):
        return stacked(state, checkpoint.stacks), {**checkpoint.quantization, "quant_method": "gptq"}
    return state, quantization_config(kinds, sym, act_order, checkpoint_format)


def _ordered(name: str, name_in_files: str) -> str:
    """The name of an expert's layer with its number and its projection in the order that the files have."""
    experts, *parts = name.rsplit(".", 2)
    if len(parts) == 2 and name_in_files.endswith(f".{parts[1]}.{parts[0]}"):
        return f"{experts}.{parts[1]}.{parts[0]}"
    return name


def _is_symmetric(weight: GptqWeight) -> bool:
    return are_constant(weight.qzeros, 2 ** (weight.bits - 1), weight.bits)


def _as_in_files(
    layers: Mapping[str, ExllamaLinear], checkpoint: Checkpoint | None, names_in_files: Mapping[str, str]
) -> GptqConfig | None:
    """The config of the files, if it still describes every layer."""
    config = None if checkpoint is None else checkpoint.config
    if checkpoint is None or checkpoint.format != "gptq" or not isinstance(config, GptqConfig):
        return None
    if set(layers) != set(names_in_files):
        return None
    said = config.for_modules(names_in_files.values())
    for name, layer in layers.items():
        kind = said[names_in_files[name]]
        if kind is None or kind.bits != layer.bits:
            return None
    return config
