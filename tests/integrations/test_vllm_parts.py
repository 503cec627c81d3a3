"""How weights are cut and joined for vLLM: every cut of every format against the whole, without vLLM."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exllama_ops import ExllamaLinear, GptqWeight, open_checkpoint, quantize, save_gptq
from exllama_ops.integrations.vllm.parts import join, part_of, runs
from exllama_ops.layout.formats import SUPPORTED_BITS

# What 2, 3 and 4 processes can share, in words of any width. 384 rows are four groups of 80 and most of a fifth.
K, N = 384, 384
SIZES = (2, 3, 4)


@cache
def weight(bits: int, group_size: int, act_order: bool, seed: int = 0, columns: int = N) -> GptqWeight:
    generator = torch.Generator().manual_seed(seed)
    g_idx = None
    if act_order:
        g_idx = (torch.arange(K) // group_size)[torch.randperm(K, generator=generator)].int()
    return quantize(torch.randn(columns, K, generator=generator), bits, group_size, g_idx=g_idx)


def dense(part: GptqWeight) -> Tensor:
    """W (K, N) of a weight, through the layer that computes with it."""
    return ExllamaLinear.from_weight(part).dequantize().t()


def assert_parts_make_up_the_whole(whole: GptqWeight, size: int) -> None:
    W = dense(whole)
    rows = [part_of(K, K // size, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([dense(whole.shard(rows=run)) for run in rows]), W)
    columns = [part_of(N, N // size, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([dense(whole.shard(columns=run)) for run in columns], 1), W)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [32, 80, 128, K])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("size", SIZES)
def test_every_cut_of_rows_and_of_columns_is_bit_for_bit_a_part_of_the_whole(
    bits: int, group_size: int, act_order: bool, size: int
) -> None:
    assert_parts_make_up_the_whole(weight(bits, group_size, act_order), size)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_the_parts_of_a_file_of_either_zero_format_are_those_of_the_weight(
    bits: int, checkpoint_format: str, act_order: bool, tmp_path: Path
) -> None:
    given = weight(bits, 80, act_order)
    save_gptq(tmp_path / "saved", {"layer": given}, sym=False, desc_act=act_order, checkpoint_format=checkpoint_format)
    read = open_checkpoint(tmp_path / "saved").read("layer")
    assert torch.equal(dense(read), dense(given))
    for size in SIZES:
        assert_parts_make_up_the_whole(read, size)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("size", SIZES)
def test_what_each_process_joins_is_its_columns_of_each_weight(bits: int, size: int) -> None:
    """Queries, keys and values of one order, where the queries are twice as many."""
    parts = [weight(bits, 80, True, columns=columns) for columns in (2 * N, N, N)]
    for rank in range(size):
        columns = [part_of(part.out_features, part.out_features // size, rank, size) for part in parts]
        (joined,) = join([part.shard(columns=run) for part, run in zip(parts, columns, strict=True)])
        expected = [dense(part)[:, run.start : run.stop] for part, run in zip(parts, columns, strict=True)]
        assert torch.equal(dense(joined), torch.cat(expected, 1))


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
