"""Zero-point words of the two formats on disk: v1 ("gptq", stored = z - 1) and v2 ("gptq_v2", stored = z).

The rule is that of the tool that writes the files, GPTQModel. For 2, 4 and 8 bits one subtraction from the whole
32-bit word takes 1 from every field. The field above a zero point of 0 then receives its borrow. Fields of 3 bits
cross words, and it subtracts from each of them modulo 8. Only the same rule backwards gives the zero points that the
file was made with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exllama_ops.layout import FORMATS, pack_columns, unpack_columns

# 1 in every field of a word.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def v1_to_v2(qzeros: Tensor, bits: int) -> Tensor:
    """Turn v1 zero-point words into v2 words: the inverse of `v2_to_v1`.

    Args:
        qzeros: (G, N * bits / 32) int32.
        bits: 2, 3, 4 or 8.

    Returns:
        A new tensor like qzeros.

    Source: GPTQModel 7.7.0, ``convert_gptq_v1_to_v2_format_module``.
    """
    return _add_to_fields(qzeros, bits, 1)


def v2_to_v1(qzeros: Tensor, bits: int) -> Tensor:
    """Turn v2 zero-point words into v1 words: the inverse of `v1_to_v2`, with the same arguments.

    Source: GPTQModel 7.7.0, ``convert_gptq_v2_to_v1_format_module``.
    """
    return _add_to_fields(qzeros, bits, -1)


def _add_to_fields(qzeros: Tensor, bits: int, delta: int) -> Tensor:
    if bits == 3:
        return pack_columns((unpack_columns(qzeros, bits) + delta) & 7, bits)
    if bits not in _ONES:
        raise NotImplementedError(f"v1 zero points of {bits} bits have no rule in checkpoint/zeros.py")
    return qzeros + delta * _ONES[bits]


def constant_zeros(value: int, bits: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Words whose every field is ``value``.

    Args:
        value: in [0, 2**bits).
        bits: 2, 3, 4 or 8.
        shape: (G, N * bits / 32), whole blocks of words.
        device: where to put them.

    Returns:
        A new int32 tensor of that shape.
    """
    fmt = FORMATS[bits]
    block = pack_columns(torch.full((1, fmt.block_values), value, dtype=torch.int32, device=device), bits)
    return block.repeat(shape[0], shape[1] // fmt.block_words)


def are_constant(qzeros: Tensor, value: int, bits: int) -> bool:
    """Whether every field of the words is ``value``. Reads the data."""
    rows, words = qzeros.shape
    return torch.equal(qzeros, constant_zeros(value, bits, (rows, words), qzeros.device))
