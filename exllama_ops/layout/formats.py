"""The bit maps of 2-, 3-, 4- and 8-bit GPTQ weights: one row per width.

A *block* is the smallest run of values that fills whole 32-bit words. For 2, 4 and 8 bits that is one word of 16, 8
and 4 values, and for 3 bits three words of 32 values. Two orders of the bits in a block exist:

* checkpoint order, a little-endian stream: bit b of value j lies at stream bit ``bits * j + b``;
* shuffled order, made for the ExLlama kernels: the values ``2 i`` and ``2 i + 1`` lie 16 bits apart, so that one AND
  isolates a pair of half-precision lanes. 3 bits hold ten values a word and slice the values 30 and 31 over the spare
  bits 15 and 31 of the three words.

docs/format.md works both orders out by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Order = Literal["checkpoint", "shuffled"]


class Field(NamedTuple):
    """A run of bits of one value inside one word: ``value[low_bit : low_bit + width]`` lies at ``word >> shift``."""

    value: int
    low_bit: int
    width: int
    word: int
    shift: int

    @property
    def mask(self) -> int:
        return (1 << self.width) - 1


@dataclass(frozen=True)
class BitFormat:
    """How one bit width fills its words.

    Args:
        bits: width of a value.
        block_values: values of a block, ``32 * block_words / bits``.
        block_words: 32-bit words of a block.
        checkpoint: the fields of a block in checkpoint order, by value and then by bit.
        shuffled: the same in shuffled order.
    """

    bits: int
    block_values: int
    block_words: int
    checkpoint: tuple[Field, ...]
    shuffled: tuple[Field, ...]

    def fields(self, order: Order) -> tuple[Field, ...]:
        return self.checkpoint if order == "checkpoint" else self.shuffled


def _fields(bits: int, block_values: int, position: Callable[[int, int], int]) -> tuple[Field, ...]:
    """Join neighbouring bits of a value into fields; ``position(j, b)`` is the stream bit of bit b of value j."""
    fields: list[Field] = []
    for value in range(block_values):
        for bit in range(bits):
            word, shift = divmod(position(value, bit), 32)
            last = fields[-1] if fields else None
            if last and (last.value, last.word, last.shift + last.width) == (value, word, shift):
                fields[-1] = last._replace(width=last.width + 1)
            else:
                fields.append(Field(value, bit, 1, word, shift))
    return tuple(fields)


def _pairs(bits: int) -> Callable[[int, int], int]:
    return lambda j, b: bits * (j // 2) + 16 * (j % 2) + b


def _shuffled_3bit(j: int, b: int) -> int:
    if j < 30:
        return 32 * (j // 10) + 3 * ((j % 10) // 2) + 16 * (j % 2) + b
    return 32 * b + (15 if j == 30 else 31)


def _format(bits: int, block_values: int, shuffled: Callable[[int, int], int]) -> BitFormat:
    def stream(j: int, b: int) -> int:
        return bits * j + b

    return BitFormat(
        bits=bits,
        block_values=block_values,
        block_words=block_values * bits // 32,
        checkpoint=_fields(bits, block_values, stream),
        shuffled=_fields(bits, block_values, shuffled),
    )


FORMATS: dict[int, BitFormat] = {
    2: _format(2, 16, _pairs(2)),
    3: _format(3, 32, _shuffled_3bit),
    4: _format(4, 8, _pairs(4)),
    8: _format(8, 4, lambda j, b: 8 * j + b),
}

SUPPORTED_BITS: tuple[int, ...] = tuple(FORMATS)
