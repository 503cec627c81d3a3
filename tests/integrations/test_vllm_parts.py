"""How weights are cut and joined for vLLM: every cut of every format against the whole, without vLLM."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exllama_ops import ExllamaLinear, GptqWeight, quantize
from exllama_ops.integrations.vllm.parts import join, part_of, runs
from exllama_ops.layout.formats import SUPPORTED_BITS

K, N = 192, 128  # 192 rows are one group of 128 and half of one


def weight(bits: int, group_size: int, act_order: bool, seed: int = 0) -> GptqWeight:
    torch.manual_seed(seed)
    g_idx = None
    if act_order:
        g_idx = (torch.arange(K) // group_size)[torch.randperm(K)].int()
    return quantize(torch.randn(N, K), bits, group_size, g_idx=g_idx)


def dense(part: GptqWeight) -> Tensor:
    """W (K, N) of a weight, through the layer that computes with it."""
    return ExllamaLinear.from_weight(part).dequantize().t()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, K])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("size", [2, 3])
def test_every_cut_of_rows_and_of_columns_is_bit_for_bit_a_part_of_the_whole(
    bits: int, group_size: int, act_order: bool, size: int
) -> None:
    whole = weight(bits, group_size, act_order)
    W = dense(whole)
    rows = [part_of(K, K // size, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([dense(whole.shard(rows=run)) for run in rows]), W)
    if size == 2:
        columns = [part_of(N, N // size, rank, size) for rank in range(size)]
        assert torch.equal(torch.cat([dense(whole.shard(columns=run)) for run in columns], 1), W)


@pytest.mark.parametrize(
    ("whole", "part", "size", "starts"),
    [(64, 16, 4, [0, 16, 32, 48]), (64, 32, 4, [0, 0, 32, 32]), (64, 64, 2, [0, 0]), (6, 6, 1, [0])],
)
def test_a_part_is_the_same_for_neighbours_where_there_are_fewer_parts(
    whole: int, part: int, size: int, starts: list[int]
) -> None:
    assert [part_of(whole, part, rank, size) for rank in range(size)] == [range(s, s + part) for s in starts]


@pytest.mark.parametrize(("whole", "part", "size"), [(64, 24, 2), (64, 128, 1), (96, 32, 4)])
def test_parts_that_do_not_make_up_the_whole_are_refused(whole: int, part: int, size: int) -> None:
    with pytest.raises(ValueError, match=rf"hold {part} each cannot share {whole}"):
        part_of(whole, part, 0, size)


def test_weights_that_were_fused_in_the_files_are_cut_one_by_one() -> None:
    """Four heads for queries and two for keys and values, of 16 columns, on four processes."""
    found = [runs([64, 32, 32], [16, 16, 16], rank, 4) for rank in range(4)]
    assert [[run.start for run in columns] for columns in found] == [
        [0, 64, 96],
        [16, 64, 96],
        [32, 80, 112],
        [48, 80, 112],
    ]


def test_weights_of_one_kind_and_order_become_one_product() -> None:
    q, k = weight(4, 32, True, seed=1), weight(4, 32, True, seed=1)
    v = weight(4, 32, True, seed=2)  # in an order of its own
    other = weight(8, 32, False)
    joined = join([q, k, v, other, other])
    assert [part.out_features for part in joined] == [2 * N, N, 2 * N]
    expected = torch.cat([dense(part) for part in (q, k, v, other, other)], 1)
    assert torch.equal(torch.cat([dense(part) for part in joined], 1), expected)
