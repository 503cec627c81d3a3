"""The state of a layer over a packed weight: buffers, how they are replaced, moved, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from exllama_ops.layout.interning import intern, intern_copy
from exllama_ops.layout.weight import GptqWeight, PackedWeight, no_order
from exllama_ops.nn.dense_weight import DenseWeight, dense_weight
from exllama_ops.prepare import unprepare


class PackedModule(nn.Module):
    """A module whose buffers are those of a `PackedWeight`. `exllama_ops.ExllamaLinear` computes with them.

    Attributes:
        in_features: K.
        out_features: N.
        bits: 2, 3, 4 or 8.
        group_size: rows of a group, at least 1.
        shuffled: whether qweight is in shuffled order.
        source_group_size: that of the checkpoint, if the weight is filled; else None.
        scales_dtype: that of the scales, which are never cast.
        weight_dtype: what ``weight.dtype`` says: the dtype of the dense weight that the packed one stands for. It is
            that of the bias, or else of the scales, until ``.to(dtype)`` or its kin change it.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    perm: Tensor
    g_idx: Tensor
    bias: Tensor | None
    source_groups: Tensor
    # The `PackedExperts` of whose stacks the tensors are views, and the number of this expert there.
    _in_stacks: tuple[Any, int] | None = None

    def set_packed(self, weight: PackedWeight) -> None:
        """Compute with another weight from now on: the buffers are replaced by those of ``weight``.

        Raises:
            ValueError: a buffer is parametrized, or lies in a stack of `exllama_ops.nn.packed_experts.PackedExperts`.
        """
        self._check_is_not_stacked("set_packed")
        if parametrize.is_parametrized(self):
            raise ValueError(
                "ExllamaLinear: set_packed replaces buffers, of which some are parametrized; call "
                "torch.nn.utils.parametrize.remove_parametrizations before"
            )
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.bits = weight.bits
        self.group_size = weight.group_size
        self.shuffled = weight.shuffled
        self.source_group_size = weight.source_group_size
        self.scales_dtype = weight.scales.dtype
        self.weight_dtype = weight.scales.dtype if weight.bias is None else weight.bias.dtype
        buffers = {
            "layout": torch.tensor(self._layout, dtype=torch.int32, device=weight.qweight.device),
            "qweight": weight.qweight,
            "qzeros": weight.qzeros,
            "scales": weight.scales,
            self._order_name: weight.row_order,
            "bias": weight.bias,
        }
        if weight.source_groups is not None:
            buffers["source_groups"] = weight.source_groups
        for name in ("perm", "g_idx", "source_groups", *buffers):
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def _check_is_not_stacked(self, what: str) -> None:
        """A tensor of its own would be one that the product of all experts does not see."""
        if self._in_stacks is not None:
            raise ValueError(
                f"ExllamaLinear: {what} would replace a tensor that lies in the stack of all experts. Write into the "
                "tensor, load a state_dict, or put another module in the place of the layer"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """Who assigns scales means their dtype; a weight that is assigned would not be computed with."""
        if name in self.__dict__.get("_buffers", ()) and isinstance(value, Tensor):
            self._check_is_not_stacked(f"assigning {name}")
        if name == "weight":
            raise AttributeError(
                "ExllamaLinear: weight cannot be assigned; set_packed(prepare(weight)) puts another GptqWeight in",
                name=name,
                obj=self,
            )
        super().__setattr__(name, value)
        if name == "scales" and isinstance(value, Tensor):
            self.scales_dtype = value.dtype

    @property
    def weight(self) -> Tensor:
        """The dense weight (N, K) in ``weight_dtype``, to read: dtype, device and shape cost nothing.

        An expression that uses it dequantizes the whole weight each time, and writing to it is refused. See
        `dequantize` and `to_weight`.
        """
        # In a graph, what is not used is dropped. Dynamo cannot make a tensor of another class.
        return dense_weight(self) if torch.compiler.is_compiling() else DenseWeight(self)

    @property
    def _order_name(self) -> str:
        return "perm" if self.shuffled else "g_idx"

    @property
    def _layout(self) -> list[int]:
        layout = [self.bits, self.group_size, int(self.shuffled)]
        return layout if self.source_group_size is None else [*layout, self.source_group_size]

    @property
    def act_order(self) -> bool:
        """Whether the rows have an order of their own."""
        return bool(self._row_order.shape[0])

    @property
    def _row_order(self) -> Tensor:
        return self.perm if self.shuffled else self.g_idx

    @property
    def op_arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, bool, int, bool, int]:
        """What the ops take after their first argument."""
        use_v2_format = True
        # Found by their names as attributes, four buffers of an nn.Module take about as long as the op's call.
        buffers: dict[str, Any] = self._buffers
        order_name = "perm" if self.shuffled else "g_idx"
        try:
            tensors = (buffers["qweight"], buffers["qzeros"], buffers["scales"], buffers[order_name])
        except KeyError:
            tensors = self._tensors_that_are_no_buffers()
        scales = tensors[2]
        if scales is None or scales.dtype is not self.scales_dtype or scales.requires_grad:
            self._check_scales(scales)
        return (*tensors, self.shuffled, self.bits, use_v2_format, self.group_size)

    def _tensors_that_are_no_buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Those of `op_arguments` where some are parametrized, or parameters."""
        names = ("qweight", "qzeros", "scales", self._order_name)
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise ValueError(f"ExllamaLinear: {', '.join(missing)} must not be deleted")
        return self.qweight, self.qzeros, self.scales, self._row_order

    def _check_scales(self, scales: Tensor | None) -> None:
        if scales is None:
            raise ValueError("ExllamaLinear: scales must be a Tensor; got None")
        if scales.dtype != self.scales_dtype:
            raise ValueError(
                f"ExllamaLinear: scales are never cast, and are {scales.dtype} in a layer that was made with "
                f"{self.scales_dtype}. FSDP casts buffers by MixedPrecision(buffer_dtype=...): leave that unset. Other "
                "scales are assigned to the layer, or its scales_dtype is set too"
            )
        if torch.is_grad_enabled():
            raise ValueError(
                "ExllamaLinear: scales require a gradient, which they do not get: gradients flow to x and bias alone. "
                "Detach them, or call the layer under torch.no_grad()"
            )

    def to_weight(self) -> GptqWeight:
        """The weight in checkpoint order, in memory of its own: what `from_weight` was given, for `save_gptq`."""
        return unprepare(self.to_packed())

    def to_packed(self) -> PackedWeight:
        """The weight that the layer computes with; it shares the layer's memory."""
        qweight, qzeros, scales, row_order, *_ = self.op_arguments
        empty = no_order(qweight)
        return PackedWeight(
            qweight=qweight,
            qzeros=qzeros,
            scales=scales,
            perm=row_order if self.shuffled else empty,
            g_idx=empty if self.shuffled else row_order,
            shuffled=self.shuffled,
            bits=self.bits,
            group_size=self.group_size,
            bias=self.bias,
            source_groups=None if self.source_group_size is None else self.source_groups,
            source_group_size=self.source_group_size,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Let ``.to(dtype)`` and its kin move the weight, but not cast it, and leave one order of rows to those that
        shared it."""
        weight = {id(tensor) for tensor in self._weight().values()}
        order = self._buffers.get(self._order_name)
        device = self.qweight.device

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in weight and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        # What fn makes of the dtype that a dense weight would have, only a tensor can tell.
        like = torch.empty(0, dtype=self.weight_dtype, device=device)
        self.weight_dtype = fn(like).dtype if self.bias is None else self.bias.dtype
        moved_order = self._buffers.get(self._order_name)
        if order is not None and moved_order is not None and moved_order is not order:
            self._buffers[self._order_name] = intern_copy(moved_order, order)
        return self

    def _weight(self) -> dict[str, Tensor]:
        """All state but the bias, by its names in a state_dict: that of a parametrized buffer is held elsewhere."""
        state: dict[str, Tensor] = {}
        parametrizations: Any = self._modules.get("parametrizations", {})
        source = () if self.source_group_size is None else ("source_groups",)
        for name in ("layout", "qweight", "qzeros", "scales", self._order_name, *source):
            if name in parametrizations:
                for key, tensor in parametrizations[name].state_dict(keep_vars=True).items():
                    if key.startswith("original"):
                        state[f"parametrizations.{name}.{key}"] = tensor
            elif hasattr(self, name):
                state[name] = getattr(self, name)
        return state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """With an order of rows of its own: safetensors refuses shared tensors, and loaders write to a state_dict."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = prefix + self._order_name
        if name in destination:
            destination[name] = destination[name].clone()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Refuse what torch would load without a word: a weight in another layout, tensors that need a cast."""
        errors = [f"{prefix}{reason}" for reason in self._reasons_against(state_dict, prefix)]
        if errors:
            error_msgs.extend(errors)
            return
        # Loading writes in place, which other layers that share the order must not see. The name keeps the shared one
        # alive, so that a layer which loads the same order has the same tensor again, at its address.
        shared = self._row_order
        self._buffers[self._order_name] = shared.clone()
        in_stacks, self._in_stacks = self._in_stacks, None  # torch may assign what it loads
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._buffers[self._order_name] = intern(self._row_order)
        if in_stacks is not None:
            stacks, expert = self._in_stacks = in_stacks
            stacks.share(expert)

    def _reasons_against(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        if self._order_name not in self._buffers:
            return [f"{self._order_name}: is loaded into a buffer alone, as others share it; parametrized, it is none"]
        weight = self._weight()
        given = {name: state_dict[prefix + name] for name in weight if prefix + name in state_dict}
        if "qweight" in given and self._order_name not in given:
            return [
                f"qweight: needs {self._order_name} beside it, as this layer has shuffled={self.shuffled}; a GPTQ "
                "checkpoint is read by exllama_ops.open_gptq"
            ]
        reasons = [
            f"{name}: {given[name].dtype} in the state_dict, {tensor.dtype} in the layer, which is not cast"
            + (f"; build the layer with scales_dtype={given[name].dtype}" if name == "scales" else "")
            for name, tensor in weight.items()
            if name in given and given[name].dtype != tensor.dtype
        ]
        layout = given.get("layout")
        if layout is not None and not layout.is_meta and layout.tolist() != self._layout:
            names = ("bits", "group_size", "shuffled", "source_group_size")[: max(layout.numel(), len(self._layout))]
            reasons.append(f"layout: {', '.join(names)} = {layout.tolist()}; this layer has {self._layout}")
        return reasons
