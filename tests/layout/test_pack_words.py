"""pack and unpack, along K and along N, against slow_words and against themselves."""

import hypothesis.strategies as st
import pytest
import slow_words
import torch
from hypothesis import given, settings

from exllama_ops.layout import (
    FORMATS,
    SUPPORTED_BITS,
    pack_columns,
    pack_rows,
    unpack_columns,
    unpack_rows,
    unpack_zeros,
)

ORDERS = ["checkpoint", "shuffled"]
# (blocks along the packed side, size of the other side)
SHAPES = [(1, 1), (1, 7), (2, 3), (3, 5), (5, 2)]

every_width = pytest.mark.parametrize("bits", SUPPORTED_BITS)
every_order = pytest.mark.parametrize("order", ORDERS)
every_shape = pytest.mark.parametrize(("blocks", "other"), SHAPES)


def random_words(bits, blocks, other, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks * slow_words.BLOCK_WORDS[bits], other)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def random_values(bits, blocks, other, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (blocks * slow_words.BLOCK_VALUES[bits], other), generator=generator)


@st.composite
def words_of_a_width(draw):
    bits = draw(st.sampled_from(SUPPORTED_BITS))
    rows = draw(st.integers(1, 3)) * slow_words.BLOCK_WORDS[bits]
    N = draw(st.integers(1, 3))
    words = draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=rows * N, max_size=rows * N))
    return bits, torch.tensor(words, dtype=torch.int32).reshape(rows, N)


def test_widths_and_blocks_are_those_of_the_format():
    assert SUPPORTED_BITS == (2, 3, 4, 8)
    for bits, fmt in FORMATS.items():
        assert (fmt.bits, fmt.block_values, fmt.block_words) == (
            bits,
            slow_words.BLOCK_VALUES[bits],
            slow_words.BLOCK_WORDS[bits],
        )


@every_width
@every_order
def test_every_bit_of_a_block_is_used_once(bits, order):
    fmt = FORMATS[bits]
    places = [(f.word, f.shift + i) for f in fmt.fields(order) for i in range(f.width)]
    assert sorted(places) == [(word, bit) for word in range(fmt.block_words) for bit in range(32)]


@every_width
@every_order
def test_each_bit_of_each_value_goes_to_its_place_alone(bits, order):
    for j in range(slow_words.BLOCK_VALUES[bits]):
        for b in range(bits):
            values = torch.zeros(slow_words.BLOCK_VALUES[bits], 1, dtype=torch.int32)
            values[j] = 1 << b
            word, position = slow_words.PLACE[order](bits, j, b)
            expected = [0] * slow_words.BLOCK_WORDS[bits]
            expected[word] = 1 << position
            assert slow_words.columns(pack_rows(values, bits, order)) == [expected], (j, b)


@every_width
@every_order
@every_shape
def test_pack_rows_equals_slow_loops(bits, order, blocks, other):
    values = random_values(bits, blocks, other)
    words = pack_rows(values, bits, order)
    assert words.dtype == torch.int32
    assert slow_words.columns(words) == [slow_words.pack(column, bits, order) for column in values.t().tolist()]


@every_width
@every_order
@every_shape
def test_unpack_rows_equals_slow_loops(bits, order, blocks, other):
    words = random_words(bits, blocks, other)
    values = unpack_rows(words, bits, order)
    assert values.dtype == torch.int32
    assert values.t().tolist() == [slow_words.unpack(column, bits, order) for column in slow_words.columns(words)]


@every_width
@every_shape
def test_pack_columns_equals_slow_loops(bits, blocks, other):
    values = random_values(bits, blocks, other).t()
    words = pack_columns(values, bits)
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    assert slow_words.columns(words.t()) == [slow_words.pack(row, bits) for row in values.tolist()]


@every_width
@every_shape
def test_unpack_columns_equals_slow_loops(bits, blocks, other):
    words = random_words(bits, blocks, other).t().contiguous()
    values = unpack_columns(words, bits)
    assert values.dtype == torch.int32
    assert values.is_contiguous()
    assert values.tolist() == [slow_words.unpack(row, bits) for row in slow_words.columns(words.t())]


@every_width
@every_shape
def test_v2_zero_is_the_stored_field_and_v1_zero_is_one_more_without_wrapping(bits, blocks, other):
    qzeros = random_words(bits, blocks, other).t().contiguous()
    stored = [slow_words.unpack(row, bits) for row in slow_words.columns(qzeros.t())]
    assert unpack_zeros(qzeros, bits, use_v2_format=True).tolist() == stored
    assert unpack_zeros(qzeros, bits, use_v2_format=False).tolist() == [[field + 1 for field in row] for row in stored]


@every_width
def test_v1_stored_maximum_is_zero_two_to_the_bits(bits):
    all_ones = torch.full((1, slow_words.BLOCK_WORDS[bits]), -1, dtype=torch.int32)
    assert set(unpack_zeros(all_ones, bits, use_v2_format=False).flatten().tolist()) == {2**bits}
    assert set(unpack_zeros(all_ones, bits, use_v2_format=True).flatten().tolist()) == {2**bits - 1}


@every_width
@every_order
def test_words_with_bit_31_set_are_negative_and_unpack_to_values_in_range(bits, order):
    top = torch.full((slow_words.BLOCK_VALUES[bits], 1), 2**bits - 1)
    words = pack_rows(top, bits, order)
    assert words.flatten().tolist() == [-1] * slow_words.BLOCK_WORDS[bits]
    assert torch.equal(unpack_rows(words, bits, order), top.to(torch.int32))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@every_width
def test_pack_takes_any_integer_dtype(bits, dtype):
    values = random_values(bits, 2, 3)
    if 2**bits - 1 <= torch.iinfo(dtype).max:
        assert torch.equal(pack_rows(values.to(dtype), bits), pack_rows(values, bits))


@every_width
@every_order
def test_pack_drops_the_high_bits_of_values_out_of_range(bits, order):
    values = random_values(bits, 1, 3).to(torch.int32)
    expected = pack_rows(values, bits, order)
    assert torch.equal(pack_rows(values + 2**bits, bits, order), expected)
    assert torch.equal(pack_rows(values - 2**bits, bits, order), expected)


@every_width
def test_pack_and_unpack_take_any_strides(bits):
    values, words = random_values(bits, 2, 4), random_words(bits, 2, 4)
    assert torch.equal(pack_rows(values.t().contiguous().t(), bits), pack_rows(values, bits))
    assert torch.equal(unpack_rows(words[:, ::2], bits), unpack_rows(words[:, ::2].contiguous(), bits))


@every_width
def test_pack_and_unpack_give_new_memory_and_leave_their_arguments(bits):
    for function, argument in [
        (pack_rows, random_values(bits, 1, 4).to(torch.int32)),
        (unpack_rows, random_words(bits, 1, 4)),
        (pack_columns, random_values(bits, 1, 1).to(torch.int32).t()),
        (unpack_columns, random_words(bits, 1, 1).t()),
    ]:
        before = argument.clone()
        result = function(argument, bits)
        assert result.untyped_storage().data_ptr() != argument.untyped_storage().data_ptr(), function.__name__
        assert torch.equal(argument, before), function.__name__


@settings(deadline=None, max_examples=60)
@given(words_of_a_width(), st.sampled_from(ORDERS))
def test_pack_after_unpack_gives_every_word_back(bits_and_words, order):
    bits, words = bits_and_words
    assert torch.equal(pack_rows(unpack_rows(words, bits, order), bits, order), words)
    assert torch.equal(pack_columns(unpack_columns(words.t(), bits), bits), words.t())


@settings(deadline=None, max_examples=60)
@given(words_of_a_width(), st.sampled_from(ORDERS))
def test_unpack_after_pack_gives_every_value_back(bits_and_words, order):
    bits, words = bits_and_words
    values = unpack_rows(words, bits)
    assert int(values.min()) >= 0
    assert int(values.max()) < 2**bits
    assert torch.equal(unpack_rows(pack_rows(values, bits, order), bits, order), values)


@pytest.mark.parametrize(
    ("function", "argument", "bits", "message"),
    [
        (pack_rows, torch.zeros(32, 4), 5, f"pack_rows: bits must be one of {SUPPORTED_BITS}; got 5"),
        (
            pack_rows,
            torch.zeros(32, dtype=torch.int32),
            4,
            "pack_rows: values must be integers (K, N); got 1 dimensions of torch.int32",
        ),
        (
            lambda values, bits: pack_rows(values.float(), bits),
            torch.zeros(32, 8),
            4,
            "pack_rows: values must be integers (K, N); got 2 dimensions of torch.float32",
        ),
        (pack_rows, torch.zeros(8, 4), 2, "pack_rows: 2-bit values fill whole words in runs of 16; got 8 values"),
        (pack_rows, torch.zeros(48, 4), 3, "pack_rows: 3-bit values fill whole words in runs of 32; got 48 values"),
        (pack_rows, torch.zeros(12, 4), 4, "pack_rows: 4-bit values fill whole words in runs of 8; got 12 values"),
        (pack_rows, torch.zeros(6, 4), 8, "pack_rows: 8-bit values fill whole words in runs of 4; got 6 values"),
        (unpack_rows, torch.zeros(3, 4), 0, f"unpack_rows: bits must be one of {SUPPORTED_BITS}; got 0"),
        (
            unpack_rows,
            torch.zeros(3),
            4,
            "unpack_rows: words must be 2-dimensional int32; got 1 dimensions of torch.int32",
        ),
        (unpack_rows, torch.zeros(4, 4), 3, "unpack_rows: 3-bit words come in runs of 3; got 4 words"),
        (
            lambda words, bits: unpack_rows(words.long(), bits),
            torch.zeros(3, 4),
            4,
            "unpack_rows: words must be 2-dimensional int32; got 2 dimensions of torch.int64",
        ),
    ],
)
def test_a_wrong_argument_is_refused_with_its_reason(function, argument, bits, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared
        function(argument.to(torch.int32), bits)
    assert str(error.value) == message
