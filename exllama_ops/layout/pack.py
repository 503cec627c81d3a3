"""Packing of integers into 32-bit words, along rows (weights) or columns (zero points)."""

from __future__ import annotations

import torch
from torch import Tensor

from exllama_ops.layout.formats import FORMATS, Order


def pack_rows(values: Tensor, bits: int, order: Order = "checkpoint") -> Tensor:
    """Pack ``values[k, n]`` along k: the inverse of `unpack_rows`.

    Args:
        values: (K, N) of any integer dtype, each in [0, 2**bits); K fills whole words.
        bits: 2, 3, 4 or 8.
        order: bit order inside a block, see `exllama_ops.layout.formats`.

    Returns:
        (K * bits / 32, N) int32.

    Raises:
        ValueError: bits is unsupported, values is not a 2-D tensor of integers, or K does not fill whole words.

    Values outside the range are not looked for (that would read device data): their high bits are dropped.
    """
    fmt = FORMATS.get(bits)
    torch._check_value(fmt is not None, lambda: f"pack_rows: bits must be one of {tuple(FORMATS)}; got {bits}")
    assert fmt is not None
    torch._check_value(
        values.dim() == 2 and not values.is_floating_point(),
        lambda: f"pack_rows: values must be integers (K, N); got {values.dim()} dimensions of {values.dtype}",
    )
    K, N = values.shape
    torch._check_value(
        K % fmt.block_values == 0,
        lambda: f"pack_rows: {bits}-bit values fill whole words in runs of {fmt.block_values}; got {K} values",
    )
    blocks = values.to(torch.int32).reshape(K // fmt.block_values, fmt.block_values, N)
    words: list[Tensor | None] = [None] * fmt.block_words
    for field in fmt.fields(order):
        part = ((blocks[:, field.value] >> field.low_bit) & field.mask) << field.shift
        word = words[field.word]
        words[field.word] = part if word is None else word | part
    return torch.stack([word for word in words if word is not None], 1).flatten(0, 1)


def unpack_rows(words: Tensor, bits: int, order: Order = "checkpoint") -> Tensor:
    """Unpack words along rows: value k of column n is ``out[k, n]``, in [0, 2**bits).

    Args:
        words: (K * bits / 32, N) int32.
        bits: 2, 3, 4 or 8.
        order: bit order inside a block, see `exllama_ops.layout.formats`.

    Returns:
        (K, N) int32.

    Raises:
        ValueError: bits is unsupported, words is not 2-D int32, or its rows do not fill whole blocks.
    """
    fmt = FORMATS.get(bits)
    torch._check_value(fmt is not None, lambda: f"unpack_rows: bits must be one of {tuple(FORMATS)}; got {bits}")
    assert fmt is not None
    torch._check_value(
        words.dim() == 2 and words.dtype == torch.int32,
        lambda: f"unpack_rows: words must be 2-dimensional int32; got {words.dim()} dimensions of {words.dtype}",
    )
    rows, N = words.shape
    torch._check_value(
        rows % fmt.block_words == 0,
        lambda: f"unpack_rows: {bits}-bit words come in runs of {fmt.block_words}; got {rows} words",
    )
    blocks = words.reshape(rows // fmt.block_words, fmt.block_words, N)
    values: list[Tensor | None] = [None] * fmt.block_values
    for field in fmt.fields(order):
        part = ((blocks[:, field.word] >> field.shift) & field.mask) << field.low_bit
        value = values[field.value]
        values[field.value] = part if value is None else value | part
    return torch.stack([value for value in values if value is not None], 1).flatten(0, 1)


def pack_columns(values: Tensor, bits: int) -> Tensor:
    """Pack ``values[g, n]`` along n, in checkpoint order: (G, N) -> (G, N * bits / 32) int32. See `pack_rows`."""
    return pack_rows(values.t(), bits).t().contiguous()


def unpack_columns(words: Tensor, bits: int) -> Tensor:
    """Unpack words along columns, in checkpoint order: (G, N * bits / 32) -> (G, N) int32. See `unpack_rows`."""
    return unpack_rows(words.t(), bits).t().contiguous()


def unpack_zeros(qzeros: Tensor, bits: int, use_v2_format: bool) -> Tensor:
    """Zero points ``z = stored + (0 if use_v2_format else 1)``, not wrapped into bits: v1 stored 15 is zero 16.

    Args:
        qzeros: (G, N * bits / 32) int32.
        bits: 2, 3, 4 or 8.
        use_v2_format: whether the stored field is the zero point itself; else it is the zero point minus one (v1).

    Returns:
        (G, N) int32, in [0, 2**bits].
    """
    return unpack_columns(qzeros, bits) + (0 if use_v2_format else 1)
