"""A packed weight as the kernels take it, made of an op's arguments once they have been checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exllama_ops.layout.formats import FORMATS


@dataclass(frozen=True)
class Weight:
    """Tensors on one device, and sizes.

    Args:
        qweight: (K * bits / 32, N) int32.
        qzeros: (G, N * bits / 32) int32.
        scales: (G, N).
        rows: int32; shuffled: the permutation (K,), else the group of each row (K,); or empty.
        K: rows of W.
        N: columns of W.
        G: rows of scales.
        group_size: from 1 to K; not looked at where rows gives the groups.
        bits: 2, 3, 4 or 8.
        shuffled: the order of the bits in the words.
        zero_offset: what is added to a stored zero point.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    rows: Tensor
    K: int
    N: int
    G: int
    group_size: int
    bits: int
    shuffled: bool
    zero_offset: int

    @classmethod
    def of(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor,
        use_exllama: bool,
        bit: int,
        use_v2_format: bool,
        group_size: int,
    ) -> Weight:
        """From the arguments of an op, in their order."""
        (G, N), K = scales.shape, qweight.shape[0] * 32 // bit
        return cls(
            qweight=qweight,
            qzeros=qzeros,
            scales=scales,
            rows=g_idx,
            K=K,
            N=N,
            G=G,
            group_size=max(1, min(group_size or K // G, K)),  # K // G is 0 for a raw g_idx of more groups than rows
            bits=bit,
            shuffled=use_exllama,
            zero_offset=0 if use_v2_format else 1,
        )

    @property
    def perm(self) -> Tensor | None:
        """The checkpoint's number of each row of the words, or None where that is its own."""
        return self.rows if self.shuffled and self.rows.shape[0] else None

    @property
    def has_raw_groups(self) -> bool:
        """Whether rows gives the group of each row."""
        return not self.shuffled and self.rows.shape[0] > 0

    def new_rows(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Memory for a result whose rows or columns are those of the checkpoint.

        NaN where there is a permutation: what a list with duplicates does not name must not be old memory.
        """
        if self.perm is None:
            return self.scales.new_empty(shape, dtype=dtype)
        return self.scales.new_full(shape, torch.nan, dtype=dtype)

    def groups_of(self, tile_rows: int) -> str:
        """How far a group reaches in a tile of ``tile_rows`` rows: GROUPS_OF in `unpack`."""
        if self.has_raw_groups:
            return "row"
        if self.group_size == self.K or self.group_size % tile_rows == 0:
            return "tile"
        return "block" if self.group_size % FORMATS[self.bits].block_values == 0 else "row"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What every kernel that computes with weights is given of them: pointers, ..."""
        names = ("qweight", "qzeros", "scales", "rows")
        return {f"{name}_ptr": getattr(self, name) for name in names}

    @property
    def sizes(self) -> dict[str, int]:
        """... sizes, ..."""
        return {"K": self.K, "N": self.N, "G": self.G, "group_size": self.group_size}

    @property
    def constants(self) -> dict[str, Any]:
        """... and what is compiled into it."""
        return {
            "BITS": self.bits,
            "SHUFFLED": self.shuffled,
            "ZERO_OFFSET": self.zero_offset,
            "HAS_ROWS": self.rows.shape[0] > 0,
        }
