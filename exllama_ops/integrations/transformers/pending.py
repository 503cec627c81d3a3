"""`PendingLinear`: the place of a quantized layer while transformers loads everything else."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from exllama_ops.checkpoint.base import ModuleSummary
from exllama_ops.layout import GptqWeight
from exllama_ops.nn import ExllamaLinear
from exllama_ops.prepare import prepare


def initialized() -> Tensor:
    """No elements, in place of a parameter that files hold: transformers leaves it alone."""
    tensor = torch.empty(0, dtype=torch.uint8, device="meta")
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


class PendingLinear(nn.Module):
    """A layer whose weight has not been read. `fill` turns this object into the `ExllamaLinear`, so hooks stay on it.

    Args:
        name: of the module in the files.
        summary: what the files say of it.
        dtype: of its bias.

    Attributes:
        in_features: K of the whole weight.
        out_features: N of the whole weight.
        place: one byte, not saved. Loaders and accelerate move it to the device that the weight belongs on.
        bias: (N,), if the files have one.
    """

    place: Tensor
    bias: Tensor | None

    def __init__(self, name: str, summary: ModuleSummary, dtype: torch.dtype) -> None:
        super().__init__()
        self.name_in_files = name
        self.num_bytes = summary.num_bytes
        self.in_features = summary.in_features
        self.out_features = summary.out_features
        self.dtype = dtype
        self.register_buffer("place", torch.empty(1, dtype=torch.uint8, device="meta"), persistent=False)
        # A loader that finds a bias in the files asks where it belongs.
        bias = torch.empty(summary.out_features, dtype=dtype, device="meta") if summary.bias else None
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Tensor:
        """What transformers, which initializes modules by their weights, takes for one that is done."""
        return initialized()

    def fill(self, weight: GptqWeight) -> ExllamaLinear:
        """Become the layer that computes with ``weight``, which may be a shard of the whole one."""
        packed = prepare(weight)
        dtype = self.dtype
        for name in ("place", "bias"):
            delattr(self, name)
        for name in ("name_in_files", "num_bytes", "dtype"):
            delattr(self, name)
        self.__class__ = ExllamaLinear  # type: ignore[assignment]
        layer = cast(ExllamaLinear, self)
        layer.set_packed(packed)
        return layer.to(dtype)

    def forward(self, x: Tensor) -> Any:
        # A bound method outlives the change of class: hooks and wrappers hold one.
        if isinstance(self, ExllamaLinear):
            return ExllamaLinear.forward(self, x)
        raise ValueError(f"{self.name_in_files}: its weight has not been read yet")
