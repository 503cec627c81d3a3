"""The weights of all experts of one projection as one value: stacks of their tensors, and the rows of x of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from exllama_ops.layout.weight import Weight


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """The weights of one gptq_moe_gemm: E weights of the same shapes in stacks, the rest as in `Weight`.

    Nothing is checked here: that is what `exllama_ops.layout.checks` is for.

    Args:
        qweight: (E, K * bits / 32, N) int32.
        qzeros: (E, G, N * bits / 32) int32.
        scales: (E, G, N) float16, bfloat16 or float32.
        row_order: int32, (E, entries) with the row_order of each weight, or empty, (0,), for none.
        offsets: (E + 1,) int32: expert e has the rows of x from ``offsets[e]`` to ``offsets[e + 1]``.
        shuffled: of all weights, like what follows.
        bits: 2, 3, 4 or 8.
        zero_offset: what is added to a stored zero point.
        group_size: rows of a group, or 0 for K / G.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "row_order", "offsets")

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    row_order: Tensor
    offsets: Tensor
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
        expert_offsets: Tensor,
        use_exllama: bool,
        bit: int,
        use_v2_format: bool = False,
        group_size: int = 0,
    ) -> Experts:
        """The weights of the op's arguments, with their names and in their order."""
        zero_offset = 0 if use_v2_format else 1
        return cls(qweight, qzeros, scales, g_idx, expert_offsets, use_exllama, bit, zero_offset, group_size)

    @property
    def E(self) -> int:
        """How many experts there are."""
        return self.qweight.shape[0]

    @property
    def N(self) -> int:
        """Columns of W."""
        return self.qweight.shape[2]

    @property
    def in_features(self) -> int:
        """Rows of W and columns of x."""
        return self[0].in_features

    def __getitem__(self, expert: int) -> Weight:
        """The weight of one expert: views of the stacks."""
        # Tensor.__getitem__ asks for a device, which fake tensors may not have.
        qweight, qzeros, scales = (stack.select(0, expert) for stack in (self.qweight, self.qzeros, self.scales))
        row_order = self.row_order.select(0, expert) if self.row_order.dim() == 2 else self.row_order
        return Weight(qweight, qzeros, scales, row_order, self.shuffled, self.bits, self.zero_offset, self.group_size)
