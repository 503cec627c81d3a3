"""A quantized weight as one value, in three forms.

`GptqWeight` is what a checkpoint holds. `PackedWeight` is what a layer holds; `exllama_ops.prepare` makes it. `Weight`
is what an op was called with, and what checks, the reference, the Triton kernels and the graph passes take. `Parts` are
the weights of one gptq_gemm_multi, and `exllama_ops.layout.experts.Experts` those of one gptq_moe_gemm.

`Weight.of` and `Weight.arguments` are the one bridge between a `Weight` and the eight arguments of an op.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_weight
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.layout.groups import row_groups
from exllama_ops.layout.shard import shard
from exllama_ops.layout.shuffle import inverse_permutation

R = TypeVar("R")


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A weight as an op takes it. Nothing is checked here: that is what `exllama_ops.layout.checks` is for.

    The tensors may be fake, or be nodes of a graph, as long as no property that reads their shapes is asked for.

    Args:
        qweight: (K * bits / 32, N) int32.
        qzeros: (G, N * bits / 32) int32.
        scales: (G, N) float16, bfloat16 or float32.
        row_order: int32. If shuffled, the permutation (K,), or (K + in_features,) of a filled weight, whose K rows name
            columns of x or none (-1), followed by the row of each column of x. Else the group of each row (K,). Empty
            for none.
        shuffled: the order of the bits in the words of qweight.
        bits: 2, 3, 4 or 8.
        zero_offset: what is added to a stored zero point: 0 in the v2 format, 1 in v1.
        group_size: rows of a group, or 0 for K / G.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "row_order")

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    row_order: Tensor
    shuffled: bool
    bits: int
    zero_offset: int = 0
    group_size: int = 0

    @classmethod
    def of(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor,
        use_exllama: bool,
        bit: int,
        use_v2_format: bool = False,
        group_size: int = 0,
    ) -> Weight:
        """The weight of an op's arguments, with their names and in their order."""
        return cls(qweight, qzeros, scales, g_idx, use_exllama, bit, 0 if use_v2_format else 1, group_size)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, bool, int, bool, int]:
        """The arguments of an op, in their order: the inverse of `of`."""
        return (*self.tensors, *self.options)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first arguments of an op: those named in `TENSORS`."""
        return self.qweight, self.qzeros, self.scales, self.row_order

    @property
    def options(self) -> tuple[bool, int, bool, int]:
        """The arguments of an op after its tensors."""
        return self.shuffled, self.bits, self.zero_offset == 0, self.group_size

    def map(self, function: Callable[[Any], Any]) -> Weight:
        """The weight with ``function(tensor)`` in place of each tensor."""
        return replace(self, **{name: function(getattr(self, name)) for name in self.TENSORS})

    @property
    def K(self) -> int:
        """Rows of the words."""
        return self.qweight.shape[0] * 32 // self.bits

    @property
    def in_features(self) -> int:
        """Rows of W and columns of x: K, or fewer if the weight is filled."""
        return self.row_order.shape[0] - self.K if self.is_filled else self.K

    @property
    def is_filled(self) -> bool:
        """Whether some rows of the words may be no rows of W: they fill groups up to group_size."""
        return self.shuffled and self.row_order.shape[0] > self.K

    @property
    def N(self) -> int:
        """Columns of W."""
        return self.qweight.shape[1]

    @property
    def G(self) -> int:
        """Rows of scales."""
        return self.scales.shape[0]

    @property
    def perm(self) -> Tensor | None:
        """The row of the checkpoint that each row of the words is, -1 for none; None where that is its own."""
        if not self.shuffled or not self.row_order.shape[0]:
            return None
        return self.row_order[: self.K] if self.is_filled else self.row_order

    @property
    def places(self) -> Tensor | None:
        """The row of the words that each row of the checkpoint is: what undoes `perm`."""
        if self.perm is None:
            return None
        return self.row_order[self.K :] if self.is_filled else inverse_permutation(self.perm)

    @property
    def g_idx(self) -> Tensor | None:
        """The group of each row; None where the groups are runs of `rows_per_group` rows."""
        return self.row_order if not self.shuffled and self.row_order.shape[0] else None

    @property
    def rows_per_group(self) -> int:
        """Rows of a group, from 1 to K. Not to be looked at where `g_idx` gives the groups, whose sizes may be any."""
        K = self.K
        return max(1, min(self.group_size or K // self.G, K))

    def row_groups(self) -> Tensor:
        """The group of each row of the words, (K,) int32."""
        if self.g_idx is not None:
            return self.g_idx
        return row_groups(self.K, self.G, self.group_size, self.qweight.device)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The weights of one gptq_gemm_multi: lists of their tensors, and what they share, as in `Weight`."""

    TENSORS: ClassVar[tuple[str, ...]] = Weight.TENSORS

    qweight: Sequence[Tensor]
    qzeros: Sequence[Tensor]
    scales: Sequence[Tensor]
    row_order: Tensor
    shuffled: bool
    bits: int
    zero_offset: int = 0
    group_size: int = 0

    @classmethod
    def of(
        cls,
        qweight: Sequence[Tensor],
        qzeros: Sequence[Tensor],
        scales: Sequence[Tensor],
        g_idx: Tensor,
        use_exllama: bool,
        bit: int,
        use_v2_format: bool = False,
        group_size: int = 0,
    ) -> Parts:
        """The weights of the op's arguments, with their names and in their order."""
        return cls(qweight, qzeros, scales, g_idx, use_exllama, bit, 0 if use_v2_format else 1, group_size)

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Of the lists, which are equal once the arguments have been checked."""
        return len(self.qweight), len(self.qzeros), len(self.scales)

    @property
    def weights(self) -> list[Weight]:
        """The weight of each part."""
        return [
            Weight(*tensors, self.row_order, self.shuffled, self.bits, self.zero_offset, self.group_size)
            for tensors in zip(self.qweight, self.qzeros, self.scales, strict=True)
        ]


class OfOpArguments(Protocol):
    """A type that is made of the arguments of an op, the tensors of one weight or several first."""

    @property
    def TENSORS(self) -> tuple[str, ...]: ...

    def of(self, *args: Any, **kwargs: Any) -> Any: ...


def from_op_arguments(kind: OfOpArguments) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorator of a function whose last parameter is a `Weight` or the like: it is called as an op is.

    ``inspect.signature`` of the result has the op's arguments. The function itself is its ``__wrapped__``.

    Args:
        kind: the type of the last parameter.
    """

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        of = kind.of
        signature = inspect.signature(function)
        first = list(signature.parameters.values())[:-1]
        signature = signature.replace(parameters=[*first, *inspect.signature(of).parameters.values()])
        count = len(first)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            if kwargs:
                args = signature.bind(*args, **kwargs).args
            return function(*args[:count], of(*args[count:]))

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def no_order(like: Tensor) -> Tensor:
    """The empty int32 tensor by which the ops say "no permutation" and "no g_idx"."""
    return torch.empty(0, dtype=torch.int32, device=like.device)


def _check_bias(kind: str, bias: Tensor | None, N: int, device: torch.device) -> None:
    if bias is None:
        return
    if tuple(bias.shape) != (N,):
        raise ValueError(f"{kind}: bias must have shape (N,) = ({N},); got {tuple(bias.shape)}")
    if not bias.is_floating_point() or bias.device != device:
        raise ValueError(f"{kind}: bias must be floating point on {device}; got {bias.dtype} on {bias.device}")


def _check_source(packed: PackedWeight) -> None:
    """That a filled weight says of what it was made, and no other does."""
    groups, size = packed.source_groups, packed.source_group_size
    if not packed.weight.is_filled:
        if groups is not None or size is not None:
            raise ValueError("PackedWeight: source_groups and source_group_size must be None: the weight is not filled")
        return
    G = packed.scales.shape[0]
    if groups is None or groups.dtype != torch.int32 or tuple(groups.shape) != (G,):
        got = None if groups is None else (groups.dtype, tuple(groups.shape))
        raise ValueError(
            f"PackedWeight: source_groups of a filled weight must be int32 of shape (G,) = ({G},); got {got}"
        )
    if size is None or size < 1:
        raise ValueError(f"PackedWeight: source_group_size of a filled weight must be at least 1; got {size}")


@dataclass(frozen=True, eq=False)
class GptqWeight:
    """A weight in checkpoint order, ``W[k, n] = scales[g, n] * (q[k, n] - z[g, n])`` with ``g = g_idx[k]``.

    Zero points are stored as they are (the v2 convention), whatever the file had: `exllama_ops.checkpoint` turns v1
    words into v2 while reading.

    Args:
        qweight: (K * bits / 32, N) int32.
        qzeros: (G, N * bits / 32) int32, the zero points themselves.
        scales: (G, N) float16, bfloat16 or float32.
        g_idx: (K,) int32, the group of each row; None for ``k // group_size``.
        bits: 2, 3, 4 or 8.
        group_size: rows of a group, at least 1 (K for one group, never -1); the last group may be partial.
        bias: (N,) or None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together. The data is not read.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    bits: int
    group_size: int
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"GptqWeight: bits must be one of {SUPPORTED_BITS}; got {self.bits}")
        if self.group_size < 1:
            raise ValueError(f"GptqWeight: group_size must be at least 1; got {self.group_size}")
        check_weight("GptqWeight", self.weight)
        _check_bias("GptqWeight", self.bias, self.out_features, self.qweight.device)

    @property
    def weight(self) -> Weight:
        """As an op takes it, with ``use_exllama=False``."""
        g_idx = no_order(self.qweight) if self.g_idx is None else self.g_idx
        return Weight(self.qweight, self.qzeros, self.scales, g_idx, False, self.bits, 0, self.group_size)

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.qweight.shape[1]

    def shard(
        self,
        rows: slice | range | None = None,
        columns: slice | range | None = None,
        *,
        bias: bool | None = None,
    ) -> GptqWeight:
        """The weight of ``W[rows, columns]``: the part of a weight that one device holds under tensor parallelism.

        Column shards give parts of y, to be laid side by side. Row shards take parts of x, and their products are added
        up: ``x @ W = sum(x[:, rows] @ shard)``.

        Args:
            rows: a run of input features in steps of 1; None for all.
            columns: a run of output features in steps of 1; None for all.
            bias: whether the shard has the bias of its columns. None means yes where all rows are taken. A row shard of
                a weight with a bias must say it: True for one of the shards, False for the others.

        Returns:
            The shard, in memory of its own, with the scales and zero points of its own groups alone. A run of rows that
            starts within a group gets shorter groups, whose scales are repeated. Of a weight with activation order, the
            groups that the rows name are numbered anew; where their sizes differ, only the g_idx says them, and
            `prepare` fills them up.

        Raises:
            ValueError: a run is empty, leaves the weight, or does not start and stop at whole blocks. These are 16, 32,
                8 and 4 values for 2, 3, 4 and 8 bits. Or bias is not said, or there is none.
        """
        return shard(self, rows, columns, bias)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight as `torch.ops.exllama.gptq_gemm` takes it; made from a `GptqWeight` by `exllama_ops.prepare`.

    Args:
        qweight: (K * bits / 32, N) int32, shuffled or in checkpoint order.
        qzeros: (G, N * bits / 32) int32, the zero points themselves (v2).
        scales: (G, N) float16, bfloat16 or float32.
        perm: (K,) int32, ``argsort(g_idx)``: row k of this weight is row ``perm[k]`` of the checkpoint. Empty for none,
            and always if not shuffled. A filled weight has more rows than K, of which some name -1, and K entries more:
            where each row of the checkpoint is.
        g_idx: (K,) int32, the group of each row. Empty for ``k // group_size``, and always if shuffled.
        shuffled: whether qweight is in shuffled order; the op's ``use_exllama``.
        bits: 2, 3, 4 or 8.
        group_size: rows of a group, at least 1.
        bias: (N,) or None.
        source_groups: (G,) int32, the group of the checkpoint that each group of a filled weight is, or is a part of.
            Groups without rows stand last. None if the weight is not filled.
        source_group_size: the group_size of the checkpoint, likewise.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together. The data is not read.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    perm: Tensor
    g_idx: Tensor
    shuffled: bool
    bits: int
    group_size: int
    bias: Tensor | None = None
    source_groups: Tensor | None = None
    source_group_size: int | None = None

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"PackedWeight: group_size must be at least 1; got {self.group_size}")
        unused, name = (self.g_idx, "g_idx") if self.shuffled else (self.perm, "perm")
        if unused.numel():
            raise ValueError(
                f"PackedWeight: {name} must be empty for shuffled={self.shuffled}; got {unused.numel()} rows"
            )
        check_weight("PackedWeight", self.weight)
        _check_bias("PackedWeight", self.bias, self.out_features, self.qweight.device)
        _check_source(self)

    @property
    def weight(self) -> Weight:
        """As an op takes it: ``torch.ops.exllama.gptq_gemm(x, *packed.weight.arguments)``."""
        order = self.row_order
        return Weight(self.qweight, self.qzeros, self.scales, order, self.shuffled, self.bits, 0, self.group_size)

    @property
    def row_order(self) -> Tensor:
        """What the op takes as its ``g_idx``: perm if shuffled, else g_idx."""
        return self.perm if self.shuffled else self.g_idx

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.qweight.shape[1]
