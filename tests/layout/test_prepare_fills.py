"""prepare of groups of unequal sizes: each is filled up, and nothing is lost."""

import itertools

import pytest
import slow_words
import torch

from exllama_ops import GptqWeight, prepare
from exllama_ops.layout.fill import fill
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.prepare import unprepare

K = 192

GROUPS = {
    "a shard with some rows of each group": [k * 7 % 5 for k in range(K)],
    "groups of one row": [0] * 60 + [1] + [2] * 70 + [3] + [4] * 60,
    "a partial group that is not the last": [0] * 32 + [1] * 64 + [2] * 64 + [3] * 32,
    "the global numbers of the second shard of two": [3 + k % 3 for k in range(K)],
    "every other group of the whole weight": [2 * (k // 60) for k in range(K)],
    "the first groups of a wider weight": [k // 64 for k in range(K)],
}
every_width = pytest.mark.parametrize("bits", SUPPORTED_BITS)
every_kind = pytest.mark.parametrize("kind", GROUPS)


def weight_of(bits: int, kind: str) -> GptqWeight:
    generator = torch.Generator().manual_seed(bits)
    N, G = 2 * slow_words.BLOCK_VALUES[bits], 8

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    return GptqWeight(
        qweight=words(K * bits // 32, N),
        qzeros=words(G, N * bits // 32),
        scales=torch.rand(G, N, generator=generator).to(torch.float16),
        g_idx=torch.tensor(GROUPS[kind], dtype=torch.int32),
        bits=bits,
        group_size=64,
        bias=torch.rand(N, generator=generator),
    )


def filled(groups: list[int], size: int) -> tuple[list[int], list[int]]:
    """What the rows name, and the group of each ``size`` of them, in plain loops."""
    named: list[int] = []
    of_groups: list[int] = []
    for group in sorted(set(groups)):
        rows = [k for k, of_row in enumerate(groups) if of_row == group]
        while rows:
            part, rows = rows[:size], rows[size:]
            named += part + [-1] * (size - len(part))
            of_groups.append(group)
    return named, of_groups


@every_kind
@every_width
def test_rows_are_sorted_by_group_and_each_group_is_filled_up(bits: int, kind: str) -> None:
    weight = weight_of(bits, kind)
    packed = prepare(weight)
    assert packed.shuffled
    assert packed.group_size % slow_words.BLOCK_VALUES[bits] == 0
    named, groups = filled(GROUPS[kind], packed.group_size)
    unused = [group for group in range(8) if group not in GROUPS[kind]]
    assert packed.perm.tolist() == named + [named.index(k) for k in range(K)]
    assert packed.source_groups is not None
    assert packed.source_groups.tolist() == groups + unused
    assert torch.equal(packed.scales, weight.scales[groups + unused])
    assert torch.equal(packed.qzeros, weight.qzeros[groups + unused])
    assert (packed.in_features, packed.source_group_size) == (K, 64)
    # The rows that fill up are zeros, which come from beyond the last row of the checkpoint.
    fills = iter(range(K, len(named)))
    rows = [next(fills) if k < 0 else k for k in named]
    more = torch.zeros((len(named) - K) * bits // 32, weight.out_features, dtype=torch.int32)
    columns = slow_words.columns(torch.cat([weight.qweight, more]))
    assert slow_words.columns(packed.qweight) == [slow_words.shuffle(column, rows, bits) for column in columns]


@every_kind
@every_width
def test_what_was_filled_comes_back_bit_for_bit(bits: int, kind: str) -> None:
    weight = weight_of(bits, kind)
    back = unprepare(prepare(weight))
    assert (back.bits, back.group_size) == (bits, 64)
    for name in ("qweight", "qzeros", "scales", "g_idx", "bias"):
        assert torch.equal(getattr(back, name), getattr(weight, name)), name
        assert getattr(back, name).untyped_storage().nbytes() == getattr(back, name).nbytes, name


@pytest.mark.parametrize("ways", [2, 3, 4])
@every_width
def test_the_shards_of_an_act_order_weight_have_its_rows(bits: int, ways: int) -> None:
    """Also where no group divides a shard."""
    rows, block = 32 * 3 * 4, 32
    g_idx = (torch.arange(rows) // 128)[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**31), 2**31, (rows * bits // 32, 32), generator=generator).to(torch.int32)
    zeros = torch.randint(-(2**31), 2**31, (3, bits), generator=generator).to(torch.int32)
    scales = torch.rand(3, 32, generator=generator)
    whole = GptqWeight(words, zeros, scales, g_idx.to(torch.int32), bits, 128)
    cuts = [rows * i // ways // block * block for i in range(ways + 1)]
    shards = [whole.shard(slice(*cut)) for cut in itertools.pairwise(cuts)]
    packed = [prepare(shard) for shard in shards]
    assert any(part.weight.is_filled for part in packed)
    W = torch.cat([torch.ops.exllama.gptq_dequantize(*part.weight.arguments) for part in packed])
    assert torch.equal(W, torch.ops.exllama.gptq_dequantize(*prepare(whole).weight.arguments))


@pytest.mark.parametrize(
    ("sizes", "bits", "group_size"),
    [
        ([64, 66, 71], 4, 72),  # 3 * 72 rows
        ([128, 64, 64], 4, 64),  # 4 * 64 rows
        ([128] * 9 + [64], 4, 128),  # ten groups of more rows take less time than nineteen
        ([3, 5, 60], 2, 16),  # six groups of 16 rows, not three of 64
        ([33, 40], 3, 64),  # whole words are 32 rows
        ([1, 1, 1], 8, 4),
    ],
)
def test_the_group_size_takes_few_rows_and_few_groups(sizes: list[int], bits: int, group_size: int) -> None:
    g_idx = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(torch.int32)
    assert fill(g_idx, len(sizes), bits).group_size == group_size
