"""One quantized module as a GPTQ file has it, and what its tensors mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from exllama_ops.checkpoint.zeros import are_constant, constant_zeros, v1_to_v2
from exllama_ops.layout import SUPPORTED_BITS, GptqWeight
from exllama_ops.layout.checks import FLOAT_DTYPES, fills_words, words_rule
from exllama_ops.layout.groups import is_trivial, num_groups

# The names of a module's tensors in a file, after the module's own name.
TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias")


# What `GptqModule.shapes` computes.
FORMULAS = {
    "qweight": "(K*bits/32, N)",
    "qzeros": "(ceil(K/group_size), N*bits/32)",
    "scales": "(ceil(K/group_size), N)",
    "g_idx": "(K,)",
    "bias": "(N,)",
}


class TensorError(ValueError):
    """A tensor breaks a rule. ``tensor`` is its name within the module, ``rule`` is the rest of the text."""

    def __init__(self, tensor: str, rule: str) -> None:
        super().__init__(f"{tensor} {rule}")
        self.tensor = tensor
        self.rule = rule


class Decoded(NamedTuple):
    """What a module's tensors mean. ``contradiction`` is a zero point that is stored by the other zero_offset."""

    weight: GptqWeight
    contradiction: int | None


@dataclass(frozen=True)
class GptqModule:
    """One quantized module as a GPTQ file has it: its sizes, and its tensors with their names, shapes and dtypes.

    `GptqCheckpoint.module` returns one, and `exllama_ops.GptqSlot` is made from one.

    Args:
        in_features: K, filling whole words (a multiple of 16, 32, 8, 4 for 2, 3, 4, 8 bits).
        out_features: N, likewise.
        bits: 2, 3, 4 or 8.
        group_size: rows of a group, at least 1 (K for one group, never -1); the last group may be partial.
        zero_offset: what is added to a stored zero point: 1 for checkpoint_format "gptq", 0 for "gptq_v2".
        sym: whether every zero point is ``2**(bits - 1)``. A symmetric module whose zero points are stored by the other
            zero_offset is recognised, and needs no qzeros.
        tensors: which of "qweight", "qzeros", "scales", "g_idx" and "bias" the file has.
        scales_dtype: float16, bfloat16 or float32.
        bias_dtype: of the bias, if there is one.
        num_groups: G, rows of scales and qzeros, where it is not ceil(K / group_size). A row shard under tensor
            parallelism may hold the scales of all groups; its g_idx then says the group of each row.

    Raises:
        ValueError: a field is out of range, or two do not fit together.
    """

    in_features: int
    out_features: int
    bits: int
    group_size: int
    zero_offset: int = 1
    sym: bool = False
    tensors: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    scales_dtype: torch.dtype = torch.float16
    bias_dtype: torch.dtype = torch.float16
    num_groups: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"GptqModule: bits must be one of {SUPPORTED_BITS}; got {self.bits}")
        for name, size in (("in_features", self.in_features), ("out_features", self.out_features)):
            if not fills_words(size, self.bits):
                raise ValueError(f"GptqModule: {words_rule(name, size, self.bits)}")
        if self.group_size < 1:
            raise ValueError(f"GptqModule: group_size must be at least 1; got {self.group_size}")
        if self.zero_offset not in (0, 1):
            raise ValueError(f"GptqModule: zero_offset must be 1 (gptq, v1) or 0 (gptq_v2); got {self.zero_offset!r}")
        if self.scales_dtype not in FLOAT_DTYPES:
            names = ", ".join(map(str, FLOAT_DTYPES))
            raise ValueError(f"GptqModule: scales_dtype must be one of {names}; got {self.scales_dtype}")
        self._check_tensors()

    def _check_tensors(self) -> None:
        needed = {"qweight", "scales"} | (set() if self.sym else {"qzeros"})
        if not needed <= set(self.tensors) <= set(TENSORS):
            raise ValueError(
                f"GptqModule: tensors must be of {TENSORS}, with {', '.join(sorted(needed))} for sym={self.sym}; got "
                f"{self.tensors}"
            )
        if self.num_groups is not None and (self.num_groups < 1 or "g_idx" not in self.tensors):
            raise ValueError(
                "GptqModule: num_groups must be at least 1, and needs a g_idx, which says the groups of the rows; got "
                f"{self.num_groups} and tensors {self.tensors}"
            )

    @property
    def G(self) -> int:
        """Rows of scales."""
        return num_groups(self.in_features, self.group_size) if self.num_groups is None else self.num_groups

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of ``tensors``."""
        K, N, G = self.in_features, self.out_features, self.G
        shapes: dict[str, tuple[int, ...]] = {
            "qweight": (K * self.bits // 32, N),
            "qzeros": (G, N * self.bits // 32),
            "scales": (G, N),
            "g_idx": (K,),
            "bias": (N,),
        }
        return {name: shapes[name] for name in self.tensors}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each of ``tensors``: int32 for all but scales and bias."""
        floats = {"scales": self.scales_dtype, "bias": self.bias_dtype}
        return {name: floats.get(name, torch.int32) for name in self.tensors}

    def check_tensor(self, name: str, tensor: Tensor) -> None:
        """Check dtype and shape of one of ``tensors``. A bias may have any floating point dtype.

        Raises:
            TensorError: they are not those of the file.
        """
        dtype = self.dtypes[name]
        if tensor.dtype != dtype and not (name == "bias" and tensor.is_floating_point()):
            raise TensorError(name, f"must have dtype {dtype}, as in the file, and is not cast; got {tensor.dtype}")
        self.check_shape(name, tuple(tensor.shape))

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Check the shape of one of ``tensors``.

        Raises:
            TensorError: it is another; the text has the formula and what it was given.
        """
        if shape == self.shapes[name]:
            return
        given = f"K={self.in_features}, N={self.out_features}, bits={self.bits}, group_size={self.group_size}"
        formula = FORMULAS[name]
        if self.num_groups is not None:
            formula, given = formula.replace("ceil(K/group_size)", "G"), f"{given}, G={self.G}"
        raise TensorError(name, f"must have shape {formula} = {self.shapes[name]} for {given}; got {shape}")

    def decode(self, tensors: Mapping[str, Tensor], own: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Decoded:
        """The weight that the tensors of a file mean. Reads scales, zero points and g_idx.

        Args:
            tensors: those of ``tensors``, with the shapes and dtypes of this module.
            own: what is done to each tensor of the weight, such as a copy to a device.

        Returns:
            The weight, its zero points as they are. Its g_idx is None if the groups are runs of rows: without a g_idx,
            with one that says so, or with zeros alone, as a g_idx has that was never filled in.

        Raises:
            TensorError: scales are NaN or infinite, or g_idx leaves [0, G).
        """
        scales = tensors["scales"]
        finite = scales.isfinite()
        if not finite.all():
            group, column = (~finite).nonzero()[0].tolist()
            raise TensorError("scales", f"must be finite; got {scales[group, column]} at [{group}, {column}]")
        g_idx = self._order(tensors.get("g_idx"))
        zeros, contradiction = self._zeros(tensors.get("qzeros"), scales.device)
        bias = tensors.get("bias")
        weight = GptqWeight(
            qweight=own(tensors["qweight"]),
            qzeros=own(zeros),
            scales=own(scales),
            g_idx=None if g_idx is None else own(g_idx),
            bits=self.bits,
            group_size=self.group_size,
            bias=None if bias is None else own(bias),
        )
        return Decoded(weight, contradiction)

    def _order(self, g_idx: Tensor | None) -> Tensor | None:
        """g_idx, or None if the groups are runs of rows."""
        if g_idx is None:
            return None
        # Only where the rows of scales are the groups of these rows can zeros mean anything but group 0.
        whole = num_groups(self.in_features, self.group_size) == self.G
        if whole and (is_trivial(g_idx, self.group_size) or not g_idx.any()):
            return None
        low, high = (int(value) for value in g_idx.aminmax())
        if low < 0 or high >= self.G:
            raise TensorError("g_idx", f"must lie in [0, G) = [0, {self.G}); got values from {low} to {high}")
        return g_idx

    def _zeros(self, stored: Tensor | None, device: torch.device) -> tuple[Tensor, int | None]:
        """The zero points as they are, and the constant that contradicts zero_offset, if one does."""
        middle = 2 ** (self.bits - 1)
        if stored is None:
            return constant_zeros(middle, self.bits, (self.G, self.out_features * self.bits // 32), device), None
        offset, contradiction = self.zero_offset, None
        by_the_other = middle - (1 - offset)
        if self.sym and are_constant(stored, by_the_other, self.bits):
            offset, contradiction = 1 - offset, by_the_other
        return v1_to_v2(stored, self.bits) if offset else stored, contradiction
