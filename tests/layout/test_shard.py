"""`GptqWeight.shard`: a shard is exactly the rows and columns of the dequantized weight, and computes as they do."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from checkpoint.builder import DATA
from exllama_ops import ExllamaLinear, open_gptq, prepare
from exllama_ops.layout import FORMATS, SUPPORTED_BITS, GptqWeight, pack_columns, pack_rows, unpack_columns, unpack_rows
from exllama_ops.layout.groups import num_groups
from exllama_ops.testing.bounds import gamma

pytestmark = pytest.mark.filterwarnings("ignore::exllama_ops.backends.reference.ReferenceBackendWarning")

CASES_EACH = 60
ORDERS = ("runs", "permuted", "any sizes", "zeros alone")


def make(
    bits: int, K: int, N: int, group_size: int, order: str = "runs", *, bias: bool = False, seed: int = 0
) -> GptqWeight:
    gen = torch.Generator().manual_seed(seed)
    G = num_groups(K, group_size)
    g_idx = torch.arange(K) // group_size
    if order == "permuted":
        g_idx = g_idx[torch.randperm(K, generator=gen)]
    elif order == "any sizes":
        g_idx = torch.randint(0, G, (K,), generator=gen)
    elif order == "zeros alone":
        g_idx = torch.zeros(K)
    return GptqWeight(
        qweight=pack_rows(torch.randint(0, 2**bits, (K, N), generator=gen), bits),
        qzeros=pack_columns(torch.randint(0, 2**bits, (G, N), generator=gen), bits),
        scales=torch.rand(G, N, generator=gen).add(0.1).half(),
        g_idx=None if order == "runs" else g_idx.int(),
        bits=bits,
        group_size=group_size,
        bias=torch.randn(N, generator=gen).half() if bias else None,
    )


def dense(weight: GptqWeight) -> Tensor:
    """W in float64, which holds each of its values exactly."""
    q, z = unpack_rows(weight.qweight, weight.bits), unpack_columns(weight.qzeros, weight.bits)
    K = q.shape[0]
    groups = torch.arange(K) // weight.group_size if weight.g_idx is None else weight.g_idx.long()
    return (q - z[groups]).double() * weight.scales.double()[groups]


def random_run(rng: random.Random, size: int, unit: int) -> slice:
    start, stop = sorted(rng.sample(range(size // unit + 1), 2))
    return slice(start * unit, stop * unit)


def random_case(rng: random.Random, bits: int, order: str) -> tuple[GptqWeight, slice, slice]:
    unit = FORMATS[bits].block_values
    K, N = unit * rng.randint(1, 12), unit * rng.randint(1, 4)
    group_size = rng.choice([1, 3, 8, 16, 32, 48, unit, K, 2 * K, rng.randint(1, K)])
    weight = make(bits, K, N, group_size, order, bias=True, seed=rng.randrange(2**31))
    return weight, random_run(rng, K, unit), random_run(rng, N, unit)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_any_shard_is_the_rows_and_columns_of_the_dequantized_weight(bits: int, order: str) -> None:
    rng = random.Random(f"{bits} {order}")
    for _ in range(CASES_EACH):
        weight, rows, columns = random_case(rng, bits, order)
        shard = weight.shard(rows, columns, bias=True)
        assert torch.equal(dense(shard), dense(weight)[rows, columns]), (weight.group_size, rows, columns)
        assert torch.equal(shard.bias, weight.bias[columns])
        assert shard.scales.shape[0] <= shard.in_features
        # What the ops compute with is it too.
        assert torch.equal(ExllamaLinear.from_weight(shard).dequantize().t(), dense(weight).half()[rows, columns])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_products_of_row_shards_add_up_and_those_of_column_shards_are_parts(bits: int, order: str) -> None:
    unit = FORMATS[bits].block_values
    K, N, M = 6 * unit, 4 * unit, 5
    weight = make(bits, K, N, max(unit, 24), order, bias=True)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1))
    whole = ExllamaLinear.from_weight(weight)(x)

    cuts = [0, 2 * unit, 3 * unit, K]
    total = torch.zeros(M, N, dtype=torch.float64)
    for start, stop in pairwise(cuts):
        shard = weight.shard(range(start, stop), bias=start == 0)
        total += ExllamaLinear.from_weight(shard)(x[:, start:stop]).double()
    W = dense(weight)
    exact = x.double() @ W + weight.bias.double()
    # Each of the three shards rounds its product to float32, and so does whoever adds the bias.
    bound = 2 * gamma(K + 8) * (x.double().abs() @ W.abs() + weight.bias.double().abs() + exact.abs())
    assert ((total - exact).abs() <= bound).all()
    assert ((whole.double() - exact).abs() <= bound).all()

    parts = [
        ExllamaLinear.from_weight(weight.shard(columns=slice(start, stop)))(x) for start, stop in ((0, unit), (unit, N))
    ]
    # The float class of a CPU sums a column by itself, whatever stands beside it.
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("path", sorted(path.parent.name for path in DATA.glob("*/quantize_config.json")))
def test_shards_of_real_checkpoints(path: str) -> None:
    checkpoint = open_gptq(DATA / path)
    for name in checkpoint.quantized:
        weight = checkpoint.read(name)
        K, N = weight.in_features, weight.out_features
        W = dense(weight)
        for rank in range(2):
            rows, columns = (slice(rank * size // 2, (rank + 1) * size // 2) for size in (K, N))
            assert torch.equal(dense(weight.shard(rows, bias=rank == 0 and weight.bias is not None)), W[rows])
            assert torch.equal(dense(weight.shard(columns=columns)), W[:, columns])


def test_runs_of_rows_need_no_g_idx_and_keep_group_size_where_the_cut_is_at_a_group() -> None:
    weight = make(4, 256, 32, 64)
    for rows, groups in ((slice(64, 200), 3), (slice(128, 192), 1), (slice(None, 64), 1)):
        shard = weight.shard(rows)
        assert (shard.g_idx, shard.group_size, shard.scales.shape[0]) == (None, 64, groups)


@pytest.mark.parametrize(("rows", "group_size"), [(slice(32, 256), 32), (slice(8, 256), 8), (slice(8, 40), 32)])
def test_a_cut_within_a_group_gives_shorter_groups_that_are_shuffled(rows: slice, group_size: int) -> None:
    shard = make(4, 256, 32, 64).shard(rows)
    assert (shard.g_idx, shard.group_size) == (None, group_size)
    assert prepare(shard).shuffled


def test_groups_of_one_size_are_sorted_and_shuffled_as_those_of_a_whole_weight() -> None:
    weight = make(4, 256, 32, 64)
    g_idx = torch.arange(256, dtype=torch.int32) % 4  # every half has 32 rows of each group
    weight = GptqWeight(weight.qweight, weight.qzeros, weight.scales, g_idx, 4, 64)
    shard = weight.shard(slice(128, 256))
    assert (shard.group_size, shard.scales.shape[0]) == (32, 4)
    assert prepare(shard).shuffled
    assert not prepare(shard).weight.is_filled
    assert prepare(make(4, 256, 32, 64, "permuted").shard(slice(128, 256))).weight.is_filled


def test_groups_that_the_rows_do_not_name_are_left_out() -> None:
    weight = make(4, 256, 32, 32)
    g_idx = torch.arange(256, dtype=torch.int32).flip(0) // 32
    weight = GptqWeight(weight.qweight, weight.qzeros, weight.scales, g_idx, 4, 32)
    shard = weight.shard(slice(0, 64))
    assert shard.scales.shape[0] == 2
    assert shard.g_idx.unique().tolist() == [0, 1]
    assert torch.equal(dense(shard), dense(weight)[:64])


def test_a_shard_shares_no_memory_with_the_weight() -> None:
    for order in ("runs", "permuted"):
        weight = make(4, 64, 32, 16, order, bias=True)
        for shard in (weight.shard(), weight.shard(slice(0, 32), bias=True), weight.shard(columns=slice(0, 16))):
            for name in ("qweight", "qzeros", "scales", "g_idx", "bias"):
                tensor, whole = getattr(shard, name), getattr(weight, name)
                if whole is not None:
                    assert tensor.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
                    assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_the_bias_goes_with_columns_and_with_one_of_the_row_shards() -> None:
    weight = make(4, 64, 32, 16, bias=True)
    assert torch.equal(weight.shard(columns=slice(8, 24)).bias, weight.bias[8:24])
    assert weight.shard(columns=slice(8, 24), bias=False).bias is None
    assert weight.shard(slice(0, 64)).bias is not None  # all rows: no other shard to add
    assert torch.equal(weight.shard(slice(0, 32), bias=True).bias, weight.bias)
    assert weight.shard(slice(0, 32), bias=False).bias is None
    assert make(4, 64, 32, 16).shard(slice(0, 32)).bias is None
    with pytest.raises(ValueError, match=r"^GptqWeight\.shard: products of row shards are added up, .*say bias=True"):
        weight.shard(slice(0, 32))
    with pytest.raises(
        ValueError, match=r"^GptqWeight\.shard: bias=True needs a weight with a bias; this one has none"
    ):
        make(4, 64, 32, 16).shard(slice(0, 32), bias=True)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("name", ["rows", "columns"])
def test_a_run_that_cuts_a_word_or_block_is_refused(name: str, bits: int) -> None:
    unit = FORMATS[bits].block_values
    weight = make(bits, 2 * unit, 2 * unit, unit)
    what = "a block of 3 words" if bits == 3 else "a word"
    text = (
        f"GptqWeight.shard: {name} must start and stop at multiples of {unit}, or they cut {what} of {bits}-bit "
        f"values; got 0:{unit + 1}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        weight.shard(**{name: slice(0, unit + 1)})
    with pytest.raises(ValueError, match="or they cut"):
        weight.shard(**{name: slice(unit - 1, None)})


@pytest.mark.parametrize("name", ["rows", "columns"])
@pytest.mark.parametrize(
    "run", [slice(0, 0), slice(8, 8), slice(16, 8), slice(0, 40), slice(-8, None), slice(0, 32, 2), range(32, 0, -1)],
    ids=str,
)  # fmt: skip
def test_a_run_that_is_empty_or_leaves_the_weight_is_refused(name: str, run: slice | range) -> None:
    text = f"GptqWeight.shard: {name} must be a run start:stop with 0 <= start < stop <= 32, in steps of 1; got {run}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make(4, 32, 32, 16).shard(**{name: run})
