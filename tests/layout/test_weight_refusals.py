"""What GptqWeight and PackedWeight refuse, in which words, and what they accept."""

import pytest
import torch

from exllama_ops import GptqWeight, PackedWeight
from exllama_ops.layout.formats import SUPPORTED_BITS

NO_ROWS = torch.empty(0, dtype=torch.int32)


def int32(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def gptq(**changes):
    """A 4-bit weight of K = 32, N = 16 in two groups, with changes."""
    fields = {
        "qweight": int32(4, 16),
        "qzeros": int32(2, 2),
        "scales": torch.ones(2, 16, dtype=torch.float16),
        "g_idx": None,
        "bits": 4,
        "group_size": 16,
        "bias": None,
    }
    return GptqWeight(**(fields | changes))


def packed(**changes):
    fields = {
        "qweight": int32(4, 16),
        "qzeros": int32(2, 2),
        "scales": torch.ones(2, 16, dtype=torch.float16),
        "perm": NO_ROWS,
        "g_idx": NO_ROWS,
        "shuffled": True,
        "bits": 4,
        "group_size": 16,
        "bias": None,
    }
    return PackedWeight(**(fields | changes))


# What both types refuse in the same words, after the type's name.
SHARED = [
    ({"group_size": 0}, "group_size must be at least 1; got 0"),
    ({"group_size": -1}, "group_size must be at least 1; got -1"),
    ({"qweight": int32(64)}, "qweight must have 2 dimensions; got 1"),
    ({"qweight": int32(4, 16).long()}, "qweight must be torch.int32; got torch.int64"),
    ({"qweight": int32(16, 4).t()}, "qweight must be contiguous; got shape (4, 16) with strides (1, 4)"),
    (
        {"qweight": int32(0, 16)},
        "qweight must have a positive multiple of 1 rows of words for bits=4; got shape (0, 16)",
    ),
    ({"qweight": int32(4, 24)}, "qweight must have shape (K*bits/32, N) = (4, 16) for K=32, bits=4; got (4, 24)"),
    (
        {"qweight": int32(4, 16), "bits": 3},
        "qweight must have a positive multiple of 3 rows of words for bits=3; got shape (4, 16)",
    ),
    ({"qzeros": int32(2)}, "qzeros must have 2 dimensions; got 1"),
    ({"qzeros": int32(2, 2).to(torch.int16)}, "qzeros must be torch.int32; got torch.int16"),
    ({"qzeros": int32(3, 2)}, "qzeros must have shape (G, N*bits/32) = (2, 2) for G=2, N=16, bits=4; got (3, 2)"),
    ({"qzeros": int32(2, 3)}, "qzeros must have shape (G, N*bits/32) = (2, 2) for G=2, N=16, bits=4; got (2, 3)"),
    ({"qzeros": int32(2, 2).to("meta")}, "qzeros must be on cpu like the first argument; got meta"),
    ({"scales": torch.ones(16)}, "scales must have 2 dimensions; got 1"),
    (
        {"scales": torch.ones(2, 16, dtype=torch.float64)},
        "scales must be one of torch.float16, torch.bfloat16, torch.float32; got torch.float64",
    ),
    ({"scales": torch.ones(0, 16), "qzeros": int32(0, 2)}, "scales must have at least one group (row); got (0, 16)"),
    (
        {"qweight": int32(4, 12), "qzeros": int32(2, 1), "scales": torch.ones(2, 12)},
        "N must be a positive multiple of 8, the 4-bit values that fill whole 32-bit words; got N=12",
    ),
    (
        {"group_size": 12},
        "scales must have G = ceil(K / group_size) = 3 rows for K=32, group_size=12; got 2",
    ),
    (
        {"group_size": 32},
        "scales must have G = ceil(K / group_size) = 1 rows for K=32, group_size=32; got 2",
    ),
    ({"bias": torch.ones(8)}, "bias must have shape (N,) = (16,); got (8,)"),
    ({"bias": torch.ones(1, 16)}, "bias must have shape (N,) = (16,); got (1, 16)"),
]

GPTQ_ONLY = [
    ({"bits": 5}, f"GptqWeight: bits must be one of {SUPPORTED_BITS}; got 5"),
    ({"g_idx": int32(32, 1)}, "GptqWeight: g_idx must have 1 dimension; got 2"),
    ({"g_idx": int32(32).long()}, "GptqWeight: g_idx must be torch.int32; got torch.int64"),
    (
        {"g_idx": int32(31)},
        "GptqWeight: g_idx (the group of each row, as use_exllama=False) must be empty or have shape (K,) = (32,); "
        "got (31,)",
    ),
]

PACKED_ONLY = [
    ({"bits": 5}, f"PackedWeight: bit must be one of {SUPPORTED_BITS}; got 5"),
    ({"g_idx": int32(32)}, "PackedWeight: g_idx must be empty for shuffled=True; got 32 rows"),
    ({"shuffled": False, "perm": int32(32)}, "PackedWeight: perm must be empty for shuffled=False; got 32 rows"),
    (
        {"perm": int32(31)},
        "PackedWeight: g_idx (the permutation argsort(g_idx), as use_exllama=True) must be empty or have shape "
        "(K,) = (32,), or (rows of qweight + K,) if its groups are filled; got (31,)",
    ),
    (
        {"source_group_size": 32},
        "PackedWeight: source_groups and source_group_size must be None: the weight is not filled",
    ),
    (
        {"perm": int32(56), "source_group_size": 32},
        "PackedWeight: source_groups of a filled weight must be int32 of shape (G,) = (2,); got None",
    ),
    (
        {"perm": int32(56), "source_groups": int32(3), "source_group_size": 32},
        "PackedWeight: source_groups of a filled weight must be int32 of shape (G,) = (2,); got (torch.int32, (3,))",
    ),
    (
        {"perm": int32(56), "source_groups": int32(2)},
        "PackedWeight: source_group_size of a filled weight must be at least 1; got None",
    ),
    (
        {"shuffled": False, "g_idx": int32(31)},
        "PackedWeight: g_idx (the group of each row, as use_exllama=False) must be empty or have shape (K,) = (32,); "
        "got (31,)",
    ),
]


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [(gptq, changes, f"GptqWeight: {message}") for changes, message in SHARED]
    + [(packed, changes, f"PackedWeight: {message}") for changes, message in SHARED]
    + [(gptq, *row) for row in GPTQ_ONLY]
    + [(packed, *row) for row in PACKED_ONLY],
)
def test_a_weight_that_does_not_fit_together_is_refused_with_its_reason(build, changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared
        build(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("bits", "K", "N"),
    [(2, 16, 48), (2, 48, 16), (3, 32, 96), (3, 96, 32), (4, 8, 24), (4, 24, 8), (8, 4, 12), (8, 12, 4)],
)
def test_sizes_that_fill_whole_words_are_accepted_and_reported(bits, K, N):
    weight = gptq(
        qweight=int32(K * bits // 32, N),
        qzeros=int32(1, N * bits // 32),
        scales=torch.ones(1, N),
        bits=bits,
        group_size=K,
    )
    assert (weight.in_features, weight.out_features) == (K, N)


def test_a_partial_last_group_is_accepted():
    assert gptq(group_size=24).in_features == 32
    assert packed(group_size=24).in_features == 32


def test_a_raw_g_idx_may_have_any_number_of_groups():
    changes = {"qzeros": int32(7, 2), "scales": torch.ones(7, 16), "group_size": 16}
    assert gptq(g_idx=int32(32), **changes).g_idx.numel() == 32
    assert packed(g_idx=int32(32), shuffled=False, **changes).row_order.numel() == 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype(dtype):
    assert gptq(scales=torch.ones(2, 16, dtype=dtype)).scales.dtype == dtype


def test_rows_are_perm_if_shuffled_and_g_idx_if_not():
    rows = int32(32)
    assert packed(perm=rows).row_order is rows
    assert packed(g_idx=rows, shuffled=False).row_order is rows


def test_a_weight_cannot_be_prepared_twice():
    """prepare takes a GptqWeight: the packed type lacks what it needs, or has it under another meaning."""
    assert not issubclass(PackedWeight, GptqWeight)
    with pytest.raises(AttributeError):
        gptq().bits = 8
