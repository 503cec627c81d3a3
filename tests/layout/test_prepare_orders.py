"""prepare: which order a GptqWeight is packed in, and that it loses nothing."""

import pytest
import slow_words
import torch

from exllama_ops import GptqWeight, prepare
from exllama_ops.layout.formats import SUPPORTED_BITS

pytestmark = pytest.mark.filterwarnings("ignore::exllama_ops.backends.reference.ReferenceBackendWarning")

every_width = pytest.mark.parametrize("bits", SUPPORTED_BITS)


def weight_of(bits, K, group_size, g_idx, G=None, blocks=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    N = blocks * slow_words.BLOCK_VALUES[bits]
    G = -(-K // group_size) if G is None else G

    def words(*shape):
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    return GptqWeight(
        qweight=words(K * bits // 32, N),
        qzeros=words(G, N * bits // 32),
        scales=torch.rand(G, N, generator=generator).to(torch.float16),
        g_idx=None if g_idx is None else torch.as_tensor(g_idx, dtype=torch.int32),
        bits=bits,
        group_size=group_size,
        bias=torch.rand(N, generator=generator),
    )


def sequential(K, group_size):
    return torch.arange(K) // group_size


def scattered(K, group_size, seed=0):
    """An act-order g_idx: the sequential one with its rows in random order."""
    return sequential(K, group_size)[torch.randperm(K, generator=torch.Generator().manual_seed(seed))]


def stable_order(g_idx):
    """Rows by group, and by row inside a group, as a plain sort of pairs has them."""
    return [k for _, k in sorted((group, k) for k, group in enumerate(g_idx.tolist()))]


def assert_shuffled_with(packed, weight, perm):
    assert packed.shuffled is True
    assert packed.g_idx.numel() == 0
    assert packed.perm.tolist() == (perm or [])
    expected = [slow_words.shuffle(column, perm, weight.bits) for column in slow_words.columns(weight.qweight)]
    assert slow_words.columns(packed.qweight) == expected


@every_width
@pytest.mark.parametrize("group_size", [8, 32, 40, 96])
def test_no_g_idx_gives_no_perm(bits, group_size):
    weight = weight_of(bits, 96, group_size, None)
    assert_shuffled_with(prepare(weight), weight, None)


@every_width
@pytest.mark.parametrize("group_size", [8, 32, 40, 96])
def test_trivial_g_idx_gives_no_perm(bits, group_size):
    weight = weight_of(bits, 96, group_size, sequential(96, group_size))
    assert_shuffled_with(prepare(weight), weight, None)


@every_width
@pytest.mark.parametrize("group_size", [8, 24, 32, 48])
def test_act_order_gives_the_stable_argsort_as_perm(bits, group_size):
    g_idx = scattered(96, group_size)
    weight = weight_of(bits, 96, group_size, g_idx)
    assert_shuffled_with(prepare(weight), weight, stable_order(g_idx))


@every_width
@pytest.mark.parametrize("group_size", [40, 64, 72])
def test_act_order_with_a_partial_last_group_gives_the_stable_argsort_as_perm(bits, group_size):
    g_idx = scattered(96, group_size)
    weight = weight_of(bits, 96, group_size, g_idx)
    assert_shuffled_with(prepare(weight), weight, stable_order(g_idx))


def test_the_argsort_is_stable_where_an_unstable_one_would_differ():
    """Few groups and many rows: torch's unstable sort reorders equal keys here, or may."""
    g_idx = torch.arange(4096) % 2
    weight = weight_of(4, 4096, 2048, g_idx)
    assert prepare(weight).perm.tolist() == list(range(0, 4096, 2)) + list(range(1, 4096, 2))


@every_width
@pytest.mark.parametrize("order", ["none", "trivial", "act order", "raw"])
def test_the_weight_stays_as_it_was_and_qweight_is_not_shared(bits, order):
    g_idx = {
        "none": None,
        "trivial": sequential(96, 32),
        "act order": scattered(96, 32),
        "raw": torch.arange(96) % 2,
    }[order]
    weight = weight_of(bits, 96, 32, g_idx)
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in vars(weight).items()}
    packed = prepare(weight)
    packed.qweight.fill_(-1)
    for name, value in before.items():
        after = getattr(weight, name)
        assert torch.equal(after, value) if isinstance(value, torch.Tensor) else after == value, name


@pytest.mark.parametrize("g_idx", [None, scattered(96, 32), torch.arange(96) % 2])
def test_perm_and_g_idx_are_contiguous_int32(g_idx):
    packed = prepare(weight_of(4, 96, 32, g_idx))
    for rows in (packed.perm, packed.g_idx):
        assert (rows.dtype, rows.dim(), rows.is_contiguous()) == (torch.int32, 1, True)


def test_zeros_scales_bias_and_sizes_pass_through():
    weight = weight_of(4, 96, 40, scattered(96, 40), blocks=3)
    packed = prepare(weight)
    for name in ("qzeros", "scales", "bias"):
        assert torch.equal(getattr(packed, name), getattr(weight, name)), name
    assert (packed.bits, packed.group_size, packed.in_features, packed.out_features) == (4, 40, 96, 24)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_group_without_scales_is_refused(wrong):
    g_idx = sequential(96, 32)
    g_idx[5] = wrong
    with pytest.raises(
        ValueError, match=r"^g_idx must lie in \[0, G\) = \[0, 3\), the rows of scales; got values from .* to"
    ):
        prepare(weight_of(4, 96, 32, g_idx))
