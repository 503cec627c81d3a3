"""Random quantized weights with everything known about them, built from plain integers without the package's packers.

The packers here follow docs/format.md word by word and are slow; the package's are compared with them elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_VALUES = {2: 16, 3: 32, 4: 8, 8: 4}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One weight.

    order: "sorted" (no g_idx), "perm" (act-order, shuffled), "raw" (a g_idx of any content) or "filled" (groups of any
    sizes up to group_size, shuffled and filled up).
    """

    bits: int
    K: int
    N: int
    group_size: int
    order: str = "sorted"
    shuffled: bool = True
    v2: bool = True
    scales_dtype: torch.dtype = torch.float16
    seed: int = 0

    def __str__(self) -> str:
        layout = "shuffled" if self.shuffled else "unshuffled"
        options = f"{self.order}-{layout}-{'v2' if self.v2 else 'v1'}-{str(self.scales_dtype).removeprefix('torch.')}"
        return f"{self.bits}b-{self.K}x{self.N}-g{self.group_size}-{options}"


@dataclass(frozen=True)
class Weight:
    """The op's arguments for a case, and the dense weight they stand for."""

    case: Case
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    row_order: Tensor  # perm, raw g_idx, the two lists of a filled weight, or empty
    q: Tensor  # (K, N), in the rows of the checkpoint
    z: Tensor  # (G, N)
    groups: Tensor  # (K,)

    @property
    def rows(self) -> int:
        """Rows of the words: K, or more in a filled weight."""
        return self.qweight.shape[0] * 32 // self.case.bits

    @property
    def dense(self) -> Tensor:
        """(K, N) float64, exact."""
        return (self.q - self.z[self.groups]).double() * self.scales.double()[self.groups]

    @property
    def args(self) -> tuple[Any, ...]:
        """Everything after x in gptq_gemm."""
        c = self.case
        tensors = (self.qweight, self.qzeros, self.scales, self.row_order)
        return (*tensors, c.shuffled, c.bits, c.v2, c.group_size)

    def to(self, device: str) -> Weight:
        moved = {name: getattr(self, name).to(device) for name in ("qweight", "qzeros", "scales", "row_order")}
        return replace(self, **moved)


def _stream_words(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack axis 0 as a little-endian bit stream: the checkpoint order of every width."""
    planes = ((values[:, None] >> np.arange(bits).reshape(1, -1, *[1] * (values.ndim - 1))) & 1).astype(np.uint8)
    stream = planes.reshape(-1, *values.shape[1:])
    packed = np.packbits(stream, axis=0, bitorder="little")
    quads = packed.reshape(-1, 4, *values.shape[1:]).astype(np.uint32)
    return (quads[:, 0] | quads[:, 1] << 8 | quads[:, 2] << 16 | quads[:, 3] << 24).view(np.int32)


def _shuffled_words(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack axis 0 in shuffled order, value by value."""
    if bits == 8:
        return _stream_words(values, 8)
    block, words = BLOCK_VALUES[bits], BLOCK_VALUES[bits] * bits // 32
    out = np.zeros((values.shape[0] // block, words, *values.shape[1:]), dtype=np.uint32)
    blocks = values.reshape(-1, block, *values.shape[1:]).astype(np.uint32)
    for j in range(block):
        v = blocks[:, j]
        if bits != 3:
            out[:, 0] |= v << (bits * (j // 2) + 16 * (j % 2))
        elif j < 30:
            out[:, j // 10] |= v << (3 * (j % 10 // 2) + 16 * (j % 2))
        else:
            for b in range(3):
                out[:, b] |= (v >> b & 1) << (15 if j == 30 else 31)
    return out.reshape(-1, *values.shape[1:]).view(np.int32)


def _unequal_groups(case: Case, rng: torch.Generator) -> tuple[Tensor, int]:
    """Groups of random sizes from 0 to group_size, whose rows lie scattered; G * group_size fills whole words."""
    sizes: list[int] = []
    while sum(sizes) < case.K or len(sizes) * case.group_size % BLOCK_VALUES[case.bits]:
        size = int(torch.randint(0, case.group_size + 1, (1,), generator=rng))
        sizes.append(min(size, case.K - sum(sizes)))
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return groups[torch.randperm(case.K, generator=rng)], len(sizes)


def _filled(groups: Tensor, G: int, group_size: int) -> tuple[Tensor, Tensor]:
    """What the rows of a filled weight name, and both lists as the ops take them."""
    named: list[int] = []
    for group in range(G):
        rows = [k for k, of_row in enumerate(groups.tolist()) if of_row == group]
        named += rows + [-1] * (group_size - len(rows))
    places = [named.index(k) for k in range(len(groups))]
    return torch.tensor(named), torch.tensor([*named, *places], dtype=torch.int32)


def build_parts(case: Case, columns: Sequence[int]) -> list[Weight]:
    """Weights of several N that have their rows' order in common, which is drawn before N counts."""
    return [build(replace(case, N=N)) for N in columns]


def multi_args(parts: Sequence[Weight]) -> tuple[Any, ...]:
    """Everything after x in gptq_gemm_multi."""
    lists = ([getattr(part, name) for part in parts] for name in ("qweight", "qzeros", "scales"))
    return (*lists, *parts[0].args[3:])


def build_experts(case: Case, E: int) -> list[Weight]:
    """Weights whose tensors have the same shapes, each with an order of rows of its own."""
    experts: list[Weight] = []
    for seed in itertools.count(case.seed):
        expert = build(replace(case, seed=seed))
        # Those that are filled may have any number of groups.
        if not experts or expert.scales.shape == experts[0].scales.shape:
            experts.append(expert)
        if len(experts) == E:
            break
    return experts


def experts_args(experts: Sequence[Weight], offsets: Sequence[int]) -> tuple[Any, ...]:
    """Everything after x in gptq_moe_gemm."""
    stacks = [torch.stack([getattr(expert, name) for expert in experts]) for name in ("qweight", "qzeros", "scales")]
    orders = [expert.row_order for expert in experts]
    row_order = torch.stack(orders) if orders[0].numel() else orders[0]
    expert_offsets = torch.tensor(offsets, dtype=torch.int32, device=row_order.device)
    return (*stacks, row_order, expert_offsets, *experts[0].args[4:])


def build(case: Case, q: Tensor | None = None) -> Weight:
    """A random weight for a case; ``q`` fixes the stored integers."""
    rng = torch.Generator().manual_seed(case.seed)
    K, N, bits = case.K, case.N, case.bits
    G = -(-K // case.group_size)
    groups = torch.arange(K) // case.group_size
    if case.order == "perm":
        groups = groups[torch.randperm(K, generator=rng)]
    elif case.order == "raw":
        G += 3  # as in a shard of a wider weight: global group ids, some of which no row has
        groups = torch.randint(0, G, (K,), generator=rng)
    elif case.order == "filled":
        groups, G = _unequal_groups(case, rng)
    drawn = torch.randint(0, 2**bits, (K, N), generator=rng)  # drawn always, so that z does not depend on q
    q = drawn if q is None else q
    stored = torch.randint(0, 2**bits, (G, N), generator=rng)
    scales = (torch.rand(G, N, generator=rng) * 0.02 + 0.001).to(case.scales_dtype)

    perm = groups.argsort(stable=True)
    in_order = q[perm] if case.order == "perm" and case.shuffled else q
    row_order = torch.empty(0, dtype=torch.int32)
    if case.order == "filled":
        named, row_order = _filled(groups, G, case.group_size)
        # Whatever the other rows hold.
        others = torch.randint(0, 2**bits, (len(named), N), generator=rng)
        in_order = torch.where((named < 0)[:, None], others, q[named.clamp(min=0)])
    words = _shuffled_words(in_order.numpy(), bits) if case.shuffled else _stream_words(q.numpy(), bits)
    if case.order not in ("sorted", "filled"):
        row_order = (perm if case.shuffled else groups).to(torch.int32)
    return Weight(
        case=case,
        qweight=torch.from_numpy(words.copy()),
        qzeros=torch.from_numpy(_stream_words(stored.t().numpy(), bits).T.copy()),
        scales=scales,
        row_order=row_order,
        q=q,
        z=stored + (0 if case.v2 else 1),
        groups=groups,
    )
