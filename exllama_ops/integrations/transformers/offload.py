"""Packed weights that accelerate keeps away from the device that computes, and brings there for each call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import PrefixedDataset, offload_weight
from torch import nn

from exllama_ops.nn import ExllamaLinear


def offload(layer: ExllamaLinear, device: str | int | None) -> None:
    """Hand the tensors of a layer to the hook that brings them, if one offloads the layer's buffers.

    accelerate attached its hooks while the layer had no weight yet. It does so for ``offload_buffers=True``.

    Args:
        layer: whose weight was read.
        device: what the device map says of it: "disk", or a device whose memory keeps the tensors.
    """
    for hook in _hooks(layer):
        kept = hook.weights_map
        if not (hook.offload and hook.offload_buffers and isinstance(kept, PrefixedDataset)):
            continue
        loader = kept.dataset
        for name, buffer in [*layer.named_buffers()]:
            key = f"{kept.prefix}{name}"
            if device == "disk" and buffer.numel():
                loader.index = offload_weight(buffer.cpu(), key, loader.save_folder, loader.index)
            else:
                loader.state_dict[key] = buffer.cpu()
            layer._buffers[name] = buffer.to("meta")


def _hooks(layer: nn.Module) -> Iterator[AlignDevicesHook]:
    hook: Any = getattr(layer, "_hf_hook", None)
    for one in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
        if isinstance(one, AlignDevicesHook):
            yield one
