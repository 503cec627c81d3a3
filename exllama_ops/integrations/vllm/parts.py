"""Which part of each weight a process holds, and which weights are one product. Nothing here needs vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from exllama_ops.layout import GptqWeight


def part_of(whole: int, part: int, rank: int, size: int) -> range:
    """The run that a process holds of something that is cut into equal parts.

    Where there are fewer parts than processes, neighbours hold the same one, as those of a few heads for keys do.

    Args:
        whole: how many there are.
        part: how many a process holds.
        rank: of the process.
        size: how many processes there are.

    Raises:
        ValueError: the parts do not make up the whole, or the processes do not share them evenly.
    """
    count, rest = divmod(whole, part)
    if rest or not count or size % count:
        raise ValueError(f"{size} processes that hold {part} each cannot share {whole}")
    start = rank // (size // count) * part
    return range(start, start + part)


def runs(sizes: Sequence[int], parts: Sequence[int], rank: int, size: int) -> list[range]:
    """The columns that a process holds of a weight that several weights are fused into, such as q, k and v.

    Args:
        sizes: columns of each fused weight.
        parts: columns of each that a process holds.
        rank: of the process.
        size: how many processes there are.
    """
    found, start = [], 0
    for whole, part in zip(sizes, parts, strict=True):
        run = part_of(whole, part, rank, size)
        found.append(range(start + run.start, start + run.stop))
        start += whole
    return found


def join(weights: Sequence[GptqWeight]) -> list[GptqWeight]:
    """Put weights side by side that follow each other and have the same width, groups and order of rows.

    Args:
        weights: in the order of their outputs, without biases.

    Returns:
        As few weights as there can be, in the same order: one product each.
    """
    joined: list[list[GptqWeight]] = []
    for weight in weights:
        if joined and _fits(joined[-1][0], weight):
            joined[-1].append(weight)
        else:
            joined.append([weight])
    return [members[0] if len(members) == 1 else _beside(members) for members in joined]


def _fits(first: GptqWeight, second: GptqWeight) -> bool:
    if (first.bits, first.group_size, first.scales.shape[0]) != (
        second.bits,
        second.group_size,
        second.scales.shape[0],
    ):
        return False
    return first.scales.dtype == second.scales.dtype and _same_order(first.g_idx, second.g_idx)


def _same_order(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _beside(weights: Sequence[GptqWeight]) -> GptqWeight:
    return replace(
        weights[0],
        qweight=torch.cat([weight.qweight for weight in weights], 1),
        qzeros=torch.cat([weight.qzeros for weight in weights], 1),
        scales=torch.cat([weight.scales for weight in weights], 1),
    )
