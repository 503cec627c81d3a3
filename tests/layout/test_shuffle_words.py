"""shuffle and unshuffle, with and without a permutation, against slow_words and against themselves."""

import hypothesis.strategies as st
import pytest
import slow_words
import torch
from hypothesis import given, settings

from exllama_ops.layout import pack_rows, shuffle, unpack_rows, unshuffle
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.layout.shuffle import inverse_permutation

NO_PERM = torch.empty(0, dtype=torch.int32)
SHAPES = [(1, 1), (1, 5), (3, 7), (4, 2)]

every_width = pytest.mark.parametrize("bits", SUPPORTED_BITS)
every_shape = pytest.mark.parametrize(("blocks", "N"), SHAPES)


def random_words_and_perm(bits, blocks, N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (blocks * slow_words.BLOCK_WORDS[bits], N), generator=generator)
    perm = torch.randperm(blocks * slow_words.BLOCK_VALUES[bits], generator=generator)
    return words.to(torch.int32), perm.to(torch.int32)


@st.composite
def words_and_perm(draw):
    bits = draw(st.sampled_from(SUPPORTED_BITS))
    blocks, N = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows = blocks * slow_words.BLOCK_WORDS[bits]
    words = draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=rows * N, max_size=rows * N))
    perm = draw(st.permutations(range(blocks * slow_words.BLOCK_VALUES[bits])))
    return bits, torch.tensor(words, dtype=torch.int32).reshape(rows, N), torch.tensor(perm, dtype=torch.int32)


@every_width
@every_shape
def test_shuffle_without_perm_equals_slow_loops(bits, blocks, N):
    words, _ = random_words_and_perm(bits, blocks, N)
    expected = [slow_words.shuffle(column, None, bits) for column in slow_words.columns(words)]
    assert slow_words.columns(shuffle(words, NO_PERM, bits)) == expected


@every_width
@every_shape
def test_shuffle_with_perm_equals_slow_loops(bits, blocks, N):
    words, perm = random_words_and_perm(bits, blocks, N)
    expected = [slow_words.shuffle(column, perm.tolist(), bits) for column in slow_words.columns(words)]
    assert slow_words.columns(shuffle(words, perm, bits)) == expected


@every_width
@every_shape
def test_unshuffle_without_perm_equals_slow_loops(bits, blocks, N):
    words, _ = random_words_and_perm(bits, blocks, N)
    expected = [slow_words.unshuffle(column, None, bits) for column in slow_words.columns(words)]
    assert slow_words.columns(unshuffle(words, NO_PERM, bits)) == expected


@every_width
@every_shape
def test_unshuffle_with_perm_equals_slow_loops(bits, blocks, N):
    words, perm = random_words_and_perm(bits, blocks, N)
    expected = [slow_words.unshuffle(column, perm.tolist(), bits) for column in slow_words.columns(words)]
    assert slow_words.columns(unshuffle(words, perm, bits)) == expected


@settings(deadline=None, max_examples=60)
@given(words_and_perm())
def test_unshuffle_is_the_inverse_of_shuffle_on_both_sides(case):
    bits, words, perm = case
    for order in (perm, NO_PERM):
        assert torch.equal(unshuffle(shuffle(words, order, bits), order, bits), words)
        assert torch.equal(shuffle(unshuffle(words, order, bits), order, bits), words)


@settings(deadline=None, max_examples=40)
@given(words_and_perm())
def test_empty_perm_equals_identity_perm(case):
    bits, words, perm = case
    identity = torch.arange(perm.numel(), dtype=torch.int32)
    assert torch.equal(shuffle(words, NO_PERM, bits), shuffle(words, identity, bits))
    assert torch.equal(unshuffle(words, NO_PERM, bits), unshuffle(words, identity, bits))


@settings(deadline=None, max_examples=40)
@given(words_and_perm())
def test_row_i_of_a_shuffled_weight_is_row_perm_i_of_the_checkpoint(case):
    bits, words, perm = case
    before, after = unpack_rows(words, bits), unpack_rows(shuffle(words, perm, bits), bits, "shuffled")
    assert all(torch.equal(after[i], before[k]) for i, k in enumerate(perm.tolist()))


@settings(deadline=None, max_examples=40)
@given(words_and_perm())
def test_inverse_permutation_undoes_perm(case):
    _, _, perm = case
    identity = list(range(perm.numel()))
    assert perm[inverse_permutation(perm)].tolist() == identity
    assert inverse_permutation(perm)[perm].tolist() == identity


def test_shuffling_8_bits_moves_no_bit():
    words, _ = random_words_and_perm(8, 3, 5)
    assert torch.equal(shuffle(words, NO_PERM, 8), words)
    assert torch.equal(unshuffle(words, NO_PERM, 8), words)


@pytest.mark.parametrize("bits", [2, 4])
def test_one_and_isolates_a_pair_of_16_bit_lanes(bits):
    """What the shuffled order is for: lane 0 of the AND holds value 2 i, and lane 1 the next one there."""
    values = torch.arange(slow_words.BLOCK_VALUES[bits]).remainder(2**bits).unsqueeze(1)
    word = pack_rows(values, bits, "shuffled").item() & 0xFFFFFFFF
    for i in range(slow_words.BLOCK_VALUES[bits] // 2):
        pair = (word >> bits * i) & ((2**bits - 1) * 0x00010001)
        assert pair == values[2 * i].item() | values[2 * i + 1].item() << 16


@every_width
def test_shuffle_and_unshuffle_give_new_memory_and_leave_their_arguments(bits):
    words, perm = random_words_and_perm(bits, 2, 3)
    for function in (shuffle, unshuffle):
        for order in (perm, NO_PERM):
            arguments = words.clone(), order.clone()
            result = function(*arguments, bits)
            assert torch.equal(arguments[0], words)
            assert torch.equal(arguments[1], order)
            assert result.untyped_storage().data_ptr() != arguments[0].untyped_storage().data_ptr()
            assert (result.dtype, result.shape, result.is_contiguous()) == (torch.int32, words.shape, True)
