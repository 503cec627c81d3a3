"""`GptqSlot`: the tensors of a GPTQ file in a module, for loaders that fill modules and know no other format."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from exllama_ops.checkpoint.module import GptqModule, TensorError
from exllama_ops.nn import ExllamaLinear
from exllama_ops.prepare import prepare

# The tensors hold these, and NaN, until a loader fills them. No real weight has whole rows of this word, and no group
# has this number.
_UNFILLED_WORD = 0xA5C3E917 - 2**32
_UNFILLED_GROUP = -1


class GptqSlot(nn.Module):
    """The tensors of one module of a GPTQ file, which become an `ExllamaLinear` in place once they are loaded.

    transformers and accelerate replace modules by slots on the meta device, load by name, and finish::

        for name in checkpoint.quantized:
            model.set_submodule(name, GptqSlot(checkpoint.module(name), device="meta"))
        model.load_state_dict(tensors, assign=True)
        for slot in [module for module in model.modules() if isinstance(module, GptqSlot)]:
            slot.finish()

    vLLM has parameters with loaders of their own. They are made over the memory of a slot's buffers, which the loaders
    fill. ``layer.slot = GptqSlot(...)`` and the parameters belong into create_weights. Dropping the parameters and
    ``layer.slot.finish()`` belong into process_weights_after_loading, and ``layer.slot(x)`` into apply.

    Args:
        module: what the file has. ``GptqCheckpoint.module(name)`` says it; a loader that knows better makes its own.
        device: where the buffers lie; "meta" for a loader that assigns tensors.

    Attributes:
        qweight: (K * bits / 32, N) int32, as in the file.
        qzeros: (G, N * bits / 32) int32, as in the file: the zero points minus zero_offset.
        scales: (G, N), in the dtype of the file. A loader must not cast them.
        g_idx: (K,) int32, the group of each row.
        bias: (N,), in any dtype.

    Raises:
        ValueError: it is called before `finish`.

    Only the tensors that ``module`` names are there, as buffers. Tensors that are assigned may be parameters.
    """

    def __init__(self, module: GptqModule, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.gptq_module = module
        self.in_features = module.in_features
        self.out_features = module.out_features
        for name, dtype in module.dtypes.items():
            value = torch.nan if dtype.is_floating_point else _UNFILLED_GROUP if name == "g_idx" else _UNFILLED_WORD
            self.register_buffer(name, torch.full(module.shapes[name], value, dtype=dtype, device=device))

    def finish(self) -> ExllamaLinear:
        """Become the layer that computes with what was loaded: ``y = x @ W + bias``.

        This object is the layer from then on, so that hooks and other references stay as they are. The layer is bit
        for bit the one of ``ExllamaLinear.from_weight(checkpoint.read(name))``. The packed tensors are new memory, and
        the file's are let go. Slots that finish one after the other need the memory of one layer more.

        Returns:
            This object.

        Raises:
            ValueError: a tensor was never filled, or only in part. Or it has another dtype or shape than the file's, or
                lies on another device than the others. Or scales are not finite, or g_idx leaves [0, G). The slot is
                left as it was.

        Warns:
            UserWarning: the zero points of a symmetric module are stored by the other zero_offset, by which they are
                read.
        """
        module = self.gptq_module
        try:
            weight, contradiction = module.decode(self._loaded(), lambda tensor: tensor.contiguous())
        except TensorError as error:
            raise ValueError(f"GptqSlot: {error}") from error
        packed = prepare(weight)
        if contradiction is not None:
            warnings.warn(
                f"GptqSlot: zero_offset={module.zero_offset} is declared, but symmetric zero points are stored as "
                f"{contradiction}, by zero_offset={1 - module.zero_offset}; they are read so",
                stacklevel=2,
            )
        for name in module.tensors:
            delattr(self, name)
        del self.gptq_module
        self.__class__ = ExllamaLinear  # type: ignore[assignment]
        layer = cast(ExllamaLinear, self)
        layer.set_packed(packed)
        return layer

    def _loaded(self) -> dict[str, Tensor]:
        """The tensors, each of which was filled and is what the file has."""
        tensors: dict[str, Tensor] = {}
        for name in self.gptq_module.tensors:
            tensor = getattr(self, name, None)
            if not isinstance(tensor, Tensor):
                raise TensorError(name, f"must be a tensor; got {type(tensor).__name__}")
            self.gptq_module.check_tensor(name, tensor)
            _check_filled(name, tensor)
            tensors[name] = tensor.detach()
        return tensors

    def forward(self, x: Tensor) -> Tensor:
        # A bound method outlives the change of class: the hooks of accelerate hold one.
        if isinstance(self, ExllamaLinear):
            return ExllamaLinear.forward(self, x)
        raise ValueError("GptqSlot: it holds the tensors of a file; call finish() once they are loaded")

    def extra_repr(self) -> str:
        module = self.gptq_module
        return (
            f"in_features={module.in_features}, out_features={module.out_features}, bits={module.bits}, "
            f"group_size={module.group_size}, zero_offset={module.zero_offset}, tensors={list(module.tensors)}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Refuse tensors that torch would cast without a word."""
        errors: list[str] = []
        for name in self.gptq_module.tensors:
            tensor = state_dict.get(prefix + name)
            if tensor is not None:
                try:
                    self.gptq_module.check_tensor(name, tensor)
                except TensorError as error:
                    errors.append(f"{prefix}{error}")
        if errors:
            error_msgs.extend(errors)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _check_filled(name: str, tensor: Tensor) -> None:
    """Refuse what a loader left as it was."""
    if tensor.is_meta:
        raise TensorError(name, "was never filled: it is on the meta device still")
    if tensor.is_floating_point():
        left = tensor.isnan()
    else:
        left = tensor == (_UNFILLED_GROUP if name == "g_idx" else _UNFILLED_WORD)
    if left.all():
        raise TensorError(name, "was never filled")
    if name in ("qweight", "qzeros"):
        # One word alone may be so by chance. A loader that forgets a part leaves whole rows or columns.
        some = any(bool(left.all(dim).any()) for dim in (0, 1) if left.shape[dim] > 1)
    else:
        some = name == "g_idx" and bool(left.any())
    if some:
        raise TensorError(name, "was filled in part alone")
