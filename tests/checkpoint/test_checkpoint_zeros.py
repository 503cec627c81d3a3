"""Zero-point words between v1 and v2, against Python integers."""

from __future__ import annotations

import pytest
import torch

from checkpoint.builder import to_int32, words_to_v1
from exllama_ops.checkpoint.zeros import are_constant, constant_zeros, v1_to_v2, v2_to_v1
from exllama_ops.layout.formats import SUPPORTED_BITS

BITS = SUPPORTED_BITS
CPU = torch.device("cpu")


def random_words(rows: int = 16, words: int = 12) -> torch.Tensor:
    gen = torch.Generator().manual_seed(1)
    return to_int32(torch.randint(0, 2**32, (rows, words), generator=gen))


@pytest.mark.parametrize("bits", BITS)
def test_v2_to_v1_equals_integer_arithmetic_on_any_words(bits):
    words = random_words()
    assert torch.equal(v2_to_v1(words, bits), words_to_v1(words, bits))


@pytest.mark.parametrize("bits", BITS)
def test_v1_to_v2_inverts_v2_to_v1_bit_for_bit(bits):
    words = random_words()
    assert torch.equal(v1_to_v2(words_to_v1(words, bits), bits), words)
    assert torch.equal(v2_to_v1(v1_to_v2(words, bits), bits), words)


@pytest.mark.parametrize(
    ("bits", "v2", "v1"),
    [
        (2, [0xAAAAAAAA], [0x55555555]),
        (4, [0x88888888], [0x77777777]),
        (8, [0x80808080], [0x7F7F7F7F]),
        # A zero point of 0 borrows: field 0 becomes 15 and field 1 is one less than it would be.
        (4, [0x88888880], [0x7777776F]),
        # No borrow leaves the word: all zero points 0.
        (4, [0x00000000], [0xEEEEEEEF]),
        # 3 bits: fields of 0 become 7, and their neighbours keep theirs.
        (3, [0x00000000] * 3, [0xFFFFFFFF] * 3),
        (3, [0x00000001, 0, 0], [0xFFFFFFF8, 0xFFFFFFFF, 0xFFFFFFFF]),
    ],
)
def test_golden_words(bits, v2, v1):
    assert torch.equal(v2_to_v1(to_int32(torch.tensor([v2])), bits), to_int32(torch.tensor([v1])))
    assert torch.equal(v1_to_v2(to_int32(torch.tensor([v1])), bits), to_int32(torch.tensor([v2])))


@pytest.mark.parametrize(("bits", "word"), [(2, 0xAAAAAAAA), (4, 0x88888888), (8, 0x80808080)])
def test_constant_zeros_fill_every_field(bits, word):
    words = constant_zeros(2 ** (bits - 1), bits, (3, 6), CPU)
    assert torch.equal(words, to_int32(torch.full((3, 6), word)))


def test_one_different_field_is_not_constant():
    words = constant_zeros(4, 3, (3, 6), CPU)
    assert are_constant(words, 4, 3)
    assert not are_constant(words, 3, 3)
    words[2, 5] ^= 1
    assert not are_constant(words, 4, 3)
