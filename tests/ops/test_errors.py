"""Every rule for the arguments: one text, whoever computes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from conformance.weights import Case, build, experts_args
from exllama_ops import reference
from exllama_ops.layout.formats import SUPPORTED_BITS

CASE = Case(4, 64, 32, 16)
GEMM_NAMES = ("x", "qweight", "qzeros", "scales", "g_idx", "use_exllama", "bit", "use_v2_format", "group_size")


def gemm_arguments(**changes: Any) -> dict[str, Any]:
    arguments = dict(zip(GEMM_NAMES, (torch.randn(3, 64, dtype=torch.float16), *build(CASE).args), strict=True))
    return arguments | changes


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


HALF = torch.float16


@dataclass(frozen=True)
class Bad:
    """Changed arguments of gptq_gemm, and the text of the ValueError."""

    changes: dict[str, Any]
    message: str


BAD_GEMM = [
    Bad({"bit": 5}, f"gptq_gemm: bit must be one of {SUPPORTED_BITS}; got 5"),
    Bad({"bit": 0}, f"gptq_gemm: bit must be one of {SUPPORTED_BITS}; got 0"),
    Bad({"x": empty(64, dtype=HALF)}, "gptq_gemm: x must have 2 dimensions; got 1"),
    Bad({"x": empty(1, 3, 64, dtype=HALF)}, "gptq_gemm: x must have 2 dimensions; got 3"),
    Bad(
        {"x": empty(3, 64, dtype=torch.float64)},
        "gptq_gemm: x must be one of torch.float16, torch.bfloat16, torch.float32; got torch.float64",
    ),
    Bad(
        {"x": empty(64, 3, dtype=HALF).t()},
        "gptq_gemm: x must be contiguous; got shape (3, 64) with strides (1, 3)",
    ),
    Bad(
        {"x": empty(3, 128, dtype=HALF)[:, ::2]},
        "gptq_gemm: x must be contiguous; got shape (3, 64) with strides (128, 2)",
    ),
    Bad(
        {"x": empty(3, 128, dtype=HALF)},
        "gptq_gemm: qweight must have shape (K*bits/32, N) = (16, 32) for K=128, bits=4; got (8, 32)",
    ),
    Bad(
        {"x": empty(3, 60, dtype=HALF)},
        "gptq_gemm: K must be a positive multiple of 8, the 4-bit values that fill whole 32-bit words; got K=60",
    ),
    Bad(
        {"x": empty(3, 0, dtype=HALF)},
        "gptq_gemm: K must be a positive multiple of 8, the 4-bit values that fill whole 32-bit words; got K=0",
    ),
    Bad({"qweight": empty(8, 32, 1)}, "gptq_gemm: qweight must have 2 dimensions; got 3"),
    Bad({"qweight": empty(8, 32, dtype=torch.int64)}, "gptq_gemm: qweight must be torch.int32; got torch.int64"),
    Bad(
        {"qweight": empty(32, 8).t()},
        "gptq_gemm: qweight must be contiguous; got shape (8, 32) with strides (1, 8)",
    ),
    Bad(
        {"qweight": empty(8, 40)},
        "gptq_gemm: qweight must have shape (K*bits/32, N) = (8, 32) for K=64, bits=4; got (8, 40)",
    ),
    Bad({"qzeros": empty(4)}, "gptq_gemm: qzeros must have 2 dimensions; got 1"),
    Bad({"qzeros": empty(4, 4, dtype=torch.uint8)}, "gptq_gemm: qzeros must be torch.int32; got torch.uint8"),
    Bad({"qzeros": empty(4, 4).t()}, "gptq_gemm: qzeros must be contiguous; got shape (4, 4) with strides (1, 4)"),
    Bad(
        {"qzeros": empty(4, 5)},
        "gptq_gemm: qzeros must have shape (G, N*bits/32) = (4, 4) for G=4, N=32, bits=4; got (4, 5)",
    ),
    Bad(
        {"qzeros": empty(3, 4)},
        "gptq_gemm: qzeros must have shape (G, N*bits/32) = (4, 4) for G=4, N=32, bits=4; got (3, 4)",
    ),
    Bad({"scales": empty(4, dtype=HALF)}, "gptq_gemm: scales must have 2 dimensions; got 1"),
    Bad(
        {"scales": empty(4, 32)},
        "gptq_gemm: scales must be one of torch.float16, torch.bfloat16, torch.float32; got torch.int32",
    ),
    Bad(
        {"scales": empty(32, 4, dtype=HALF).t()},
        "gptq_gemm: scales must be contiguous; got shape (4, 32) with strides (1, 4)",
    ),
    Bad(
        {"scales": empty(4, 36, dtype=HALF)},
        "gptq_gemm: N must be a positive multiple of 8, the 4-bit values that fill whole 32-bit words; got N=36",
    ),
    Bad(
        {"scales": empty(0, 32, dtype=HALF)},
        "gptq_gemm: scales must have at least one group (row); got (0, 32)",
    ),
    Bad({"g_idx": empty(64, 1)}, "gptq_gemm: g_idx must have 1 dimension; got 2"),
    Bad({"g_idx": empty(64, dtype=torch.int64)}, "gptq_gemm: g_idx must be torch.int32; got torch.int64"),
    Bad({"g_idx": empty(128)[::2]}, "gptq_gemm: g_idx must be contiguous; got shape (64,) with strides (2,)"),
    Bad(
        {"g_idx": empty(63)},
        "gptq_gemm: g_idx (the permutation argsort(g_idx), as use_exllama=True) must be empty or have shape "
        "(K,) = (64,), or (rows of qweight + K,) if its groups are filled; got (63,)",
    ),
    Bad(
        {"g_idx": empty(129)},  # more than a filled weight of 64 rows could have
        "gptq_gemm: g_idx (the permutation argsort(g_idx), as use_exllama=True) must be empty or have shape "
        "(K,) = (64,), or (rows of qweight + K,) if its groups are filled; got (129,)",
    ),
    Bad(
        {"g_idx": empty(144), "qweight": empty(10, 32), "scales": empty(4, 32, dtype=HALF), "group_size": 16},
        "gptq_gemm: scales must have G = ceil(K / group_size) = 5 rows for K=80, group_size=16; got 4",
    ),
    Bad(
        {"g_idx": empty(65), "use_exllama": False},
        "gptq_gemm: g_idx (the group of each row, as use_exllama=False) must be empty or have shape (K,) = (64,); "
        "got (65,)",
    ),
    Bad({"group_size": -1}, "gptq_gemm: group_size must be at least 1, or 0 for K / G; got -1"),
    Bad(
        {"group_size": 32},
        "gptq_gemm: scales must have G = ceil(K / group_size) = 2 rows for K=64, group_size=32; got 4",
    ),
    Bad(
        {"group_size": 0, "scales": empty(5, 32, dtype=HALF), "qzeros": empty(5, 4)},
        "gptq_gemm: group_size=0 means K / G, which must be whole; got K=64, G=5 (say the group_size of a weight "
        "whose last group is partial)",
    ),
]

SHUFFLE_BAD = [
    ((empty(8, 32), empty(0), 7), f"bit must be one of {SUPPORTED_BITS}; got 7"),
    ((empty(8), empty(0), 4), "qweight must have 2 dimensions; got 1"),
    ((empty(8, 32, dtype=torch.int16), empty(0), 4), "qweight must be torch.int32; got torch.int16"),
    ((empty(32, 8).t(), empty(0), 4), "qweight must be contiguous; got shape (8, 32) with strides (1, 8)"),
    ((empty(8, 32), empty(0, dtype=torch.int64), 4), "q_perm must be torch.int32; got torch.int64"),
    ((empty(8, 32), empty(1, 64), 4), "q_perm must have 1 dimension; got 2"),
    (
        (empty(8, 32), empty(60), 4),
        "q_perm must be empty or have shape (K,) = (64,) for qweight of shape (8, 32), bits=4; got (60,)",
    ),
    (
        (empty(8, 32), empty(0), 3),
        "qweight must have a positive multiple of 3 rows of words for bits=3; got shape (8, 32)",
    ),
    (
        (empty(0, 32), empty(0), 4),
        "qweight must have a positive multiple of 1 rows of words for bits=4; got shape (0, 32)",
    ),
]


def run_reference(op: str, *args: Any) -> None:
    getattr(reference, op)(*args)


def run_op(op: str, *args: Any) -> None:
    getattr(torch.ops.exllama, op)(*args)


def run_op_with_grad(op: str, *args: Any) -> None:
    first, *rest = args
    run_op(op, first.detach().clone(memory_format=torch.preserve_format).requires_grad_(), *rest)


def with_the_strides_on(device: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Empty tensors like args on a device; .to(device) would lose the strides of views."""

    def empty_like(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    result: tuple[Any, ...] = tree_map_only(torch.Tensor, empty_like, args)
    return result


def run_meta(op: str, *args: Any) -> None:
    run_op(op, *with_the_strides_on("meta", args))


def run_fake_cuda(op: str, *args: Any) -> None:
    with FakeTensorMode():
        run_op(op, *with_the_strides_on("cuda", args))


def run_cuda(op: str, *args: Any) -> None:
    run_op(op, *with_the_strides_on("cuda", args))


RUNNERS = [
    run_reference,
    run_op,
    run_meta,
    run_fake_cuda,
    pytest.param(run_cuda, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("bad", BAD_GEMM, ids=lambda bad: bad.message[11:60])
def test_gemm_refuses(run: Callable[..., None], bad: Bad) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(bad.message)}$"):
        run("gptq_gemm", *gemm_arguments(**bad.changes).values())


@pytest.mark.parametrize("bad", [b for b in BAD_GEMM if "x" not in b.changes], ids=lambda bad: bad.message[11:60])
def test_gemm_refuses_with_the_same_text_when_x_requires_grad(bad: Bad) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(bad.message)}$"):
        run_op_with_grad("gptq_gemm", *gemm_arguments(**bad.changes).values())


def of_part(text: str, part: int) -> str:
    """The text of gptq_gemm in gptq_gemm_multi: what names an entry of a list says which."""
    text = text.replace("gptq_gemm:", "gptq_gemm_multi:")
    for name in ("qweight", "qzeros", "scales", "N"):
        text = text.replace(f"multi: {name} must", f"multi: {name}[{part}] must")
    return text.replace("got N=", f"got N[{part}]=").replace("got K=64, G=", f"got K=64, G[{part}]=")


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("bad", BAD_GEMM, ids=lambda bad: bad.message[11:60])
def test_multi_refuses_what_gemm_refuses_and_names_the_part(run: Callable[..., None], bad: Bad) -> None:
    x, *weight, g_idx, use_exllama, bit, v2, group_size = gemm_arguments(**bad.changes).values()
    if {"x", "g_idx", "bit", "group_size"} & bad.changes.keys():  # of all parts: the first meets the rule
        lists, part = [[tensor, tensor] for tensor in weight], 0
    else:
        good = list(gemm_arguments().values())[1:4]
        lists, part = [[tensor, changed] for tensor, changed in zip(good, weight, strict=True)], 1
    with pytest.raises(ValueError, match=f"^{re.escape(of_part(bad.message, part))}$"):
        run("gptq_gemm_multi", x, *lists, g_idx, use_exllama, bit, v2, group_size)


BAD_LISTS = [
    (
        (2, 1, 2),
        "qweight, qzeros and scales must have one entry for each part, at least 1; got (2, 1, 2)",
    ),
    (
        (1, 1, 2),
        "qweight, qzeros and scales must have one entry for each part, at least 1; got (1, 1, 2)",
    ),
    (
        (0, 0, 0),
        "qweight, qzeros and scales must have one entry for each part, at least 1; got (0, 0, 0)",
    ),
]


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize(("lengths", "rule"), BAD_LISTS)
def test_multi_refuses_lists_of_different_lengths(
    run: Callable[..., None], lengths: tuple[int, ...], rule: str
) -> None:
    x, *weight, g_idx, use_exllama, bit, v2, group_size = gemm_arguments().values()
    lists = [[tensor] * length for tensor, length in zip(weight, lengths, strict=True)]
    with pytest.raises(ValueError, match=f"^gptq_gemm_multi: {re.escape(rule)}$"):
        run("gptq_gemm_multi", x, *lists, g_idx, use_exllama, bit, v2, group_size)


@pytest.mark.parametrize("run", RUNNERS)
def test_multi_refuses_parts_with_other_groups(run: Callable[..., None]) -> None:
    """x is prepared once for all parts, in blocks of rows that end where a group ends."""
    x, qweight, qzeros, scales, g_idx, *options, _ = gemm_arguments().values()
    lists = [qweight, qweight], [qzeros, empty(8, 4)], [scales, empty(8, 32, dtype=HALF)]
    message = "gptq_gemm_multi: scales[1] must have as many groups (rows) as scales[0], 4; got 8"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run("gptq_gemm_multi", x, *lists, g_idx, *options, 0)


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize(
    "bad",
    [b for b in BAD_GEMM if "x" not in b.changes and "K=64, bits=4; got (8, 40)" not in b.message],
    ids=lambda bad: bad.message[11:60],
)
def test_dequantize_and_dx_refuse_what_gemm_refuses(run: Callable[..., None], bad: Bad) -> None:
    _, *rest = gemm_arguments(**bad.changes).values()
    with pytest.raises(ValueError, match=f"^{re.escape(bad.message.replace('gptq_gemm', 'gptq_dequantize'))}$"):
        run("gptq_dequantize", *rest)
    if "N must be" in bad.message:
        return  # there N is that of grad
    with pytest.raises(ValueError, match=f"^{re.escape(bad.message.replace('gptq_gemm', 'gptq_gemm_dx'))}$"):
        run("gptq_gemm_dx", empty(3, 32, dtype=HALF), *rest)


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize(
    ("grad", "rule"),
    [
        (empty(32, dtype=HALF), "grad must have 2 dimensions; got 1"),
        (empty(3, 32), "grad must be one of torch.float16, torch.bfloat16, torch.float32; got torch.int32"),
        (empty(32, 3, dtype=HALF).t(), "grad must be contiguous; got shape (3, 32) with strides (1, 3)"),
        (
            empty(3, 40, dtype=HALF),
            "qweight must have shape (K*bits/32, N) = (8, 40) for K=64, bits=4; got (8, 32)",
        ),
    ],
)
def test_dx_refuses(run: Callable[..., None], grad: torch.Tensor, rule: str) -> None:
    _, *rest = gemm_arguments().values()
    with pytest.raises(ValueError, match=f"^gptq_gemm_dx: {re.escape(rule)}$"):
        run("gptq_gemm_dx", grad, *rest)


EXPERTS_NAMES = (*GEMM_NAMES[:5], "expert_offsets", *GEMM_NAMES[5:])


def experts_arguments(**changes: Any) -> dict[str, Any]:
    experts = experts_args([build(CASE), build(CASE)], [0, 1, 3])
    arguments = dict(zip(EXPERTS_NAMES, (torch.randn(3, 64, dtype=torch.float16), *experts), strict=True))
    return arguments | changes


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD_EXPERTS = [
    Bad({"bit": 5}, f"bit must be one of {SUPPORTED_BITS}; got 5"),
    Bad({"x": empty(64, dtype=HALF)}, "x must have 2 dimensions; got 1"),
    Bad({"qweight": empty(8, 32)}, "qweight must have 3 dimensions; got 2"),
    Bad({"qweight": empty(2, 8, 32, dtype=torch.int64)}, "qweight must be torch.int32; got torch.int64"),
    Bad(
        {"qweight": empty(2, 32, 8).mT},
        "qweight must be contiguous; got shape (2, 8, 32) with strides (256, 1, 8)",
    ),
    Bad({"qweight": empty(0, 8, 32)}, "qweight must have at least one expert; got shape (0, 8, 32)"),
    Bad(
        {"qweight": empty(2, 8, 40)},
        "qweight[0] must have shape (K*bits/32, N) = (8, 32) for K=64, bits=4; got (8, 40)",
    ),
    Bad({"qzeros": empty(2, 4)}, "qzeros must have 3 dimensions; got 2"),
    Bad({"qzeros": empty(3, 4, 4)}, "qzeros must have an entry for each of the 2 experts of qweight; got 3"),
    Bad(
        {"qzeros": empty(2, 4, 5)},
        "qzeros[0] must have shape (G, N*bits/32) = (4, 4) for G=4, N=32, bits=4; got (4, 5)",
    ),
    Bad(
        {"scales": empty(1, 4, 32, dtype=HALF)}, "scales must have an entry for each of the 2 experts of qweight; got 1"
    ),
    Bad(
        {"scales": empty(2, 4, 36, dtype=HALF)},
        "N[0] must be a positive multiple of 8, the 4-bit values that fill whole 32-bit words; got N[0]=36",
    ),
    Bad({"scales": empty(2, 0, 32, dtype=HALF)}, "scales[0] must have at least one group (row); got (0, 32)"),
    Bad({"g_idx": empty(64)}, "g_idx must have 2 dimensions; got 1"),
    Bad({"g_idx": empty(1, 64)}, "g_idx must have an entry for each of the 2 experts of qweight; got 1"),
    Bad({"g_idx": empty(2, 64, dtype=torch.int64)}, "g_idx must be torch.int32; got torch.int64"),
    Bad(
        {"g_idx": empty(2, 63)},
        "g_idx[0] (the permutation argsort(g_idx), as use_exllama=True) must be empty or have shape (K,) = (64,), or "
        "(rows of qweight + K,) if its groups are filled; got (63,)",
    ),
    Bad({"expert_offsets": empty(2, 3)}, "expert_offsets must have 1 dimension; got 2"),
    Bad({"expert_offsets": empty(3, dtype=torch.int64)}, "expert_offsets must be torch.int32; got torch.int64"),
    Bad(
        {"expert_offsets": empty(2)},
        "expert_offsets must have shape (E + 1,) = (3,) for the 2 experts of qweight; got (2,)",
    ),
    Bad({"group_size": -1}, "group_size must be at least 1, or 0 for K / G; got -1"),
    Bad(
        {"group_size": 32},
        "scales[0] must have G = ceil(K / group_size) = 2 rows for K=64, group_size=32; got 4",
    ),
    Bad(
        {"group_size": 0, "scales": empty(2, 5, 32, dtype=HALF), "qzeros": empty(2, 5, 4)},
        "group_size=0 means K / G, which must be whole; got K=64, G[0]=5 (say the group_size of a weight whose last "
        "group is partial)",
    ),
]


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("bad", BAD_EXPERTS, ids=lambda bad: bad.message[:45])
def test_moe_gemm_and_its_dx_refuse(run: Callable[..., None], bad: Bad) -> None:
    x, *rest = experts_arguments(**bad.changes).values()
    with pytest.raises(ValueError, match=f"^gptq_moe_gemm: {re.escape(bad.message)}$"):
        run("gptq_moe_gemm", x, *rest)
    if "x" in bad.changes or "8, 40" in bad.message or "N[0] must" in bad.message:
        return  # K and N are those of grad
    with pytest.raises(ValueError, match=f"^gptq_moe_gemm_dx: {re.escape(bad.message)}$"):
        run("gptq_moe_gemm_dx", empty(3, 32, dtype=HALF), *rest)


BAD_OFFSETS = [
    ((1, 0, 3), "got 0 at index 1"),
    ((0, 4, 4), "got 4 at index 1"),
    ((-1, 0, 3), "got -1 at index 0"),
    ((0, 2, 1), "got 1 at index 2"),
]


@pytest.mark.parametrize("run", [run_op, run_reference])
@pytest.mark.parametrize(("values", "got"), BAD_OFFSETS)
def test_offsets_that_are_none_are_refused_on_a_cpu(
    run: Callable[..., None], values: tuple[int, ...], got: str
) -> None:
    rule = f"expert_offsets must not decrease, from 0 or more to the 3 rows or fewer; {got}"
    x, *rest = experts_arguments(expert_offsets=offsets(*values)).values()
    for op, first in (("gptq_moe_gemm", x), ("gptq_moe_gemm_dx", empty(3, 32, dtype=HALF))):
        with pytest.raises(ValueError, match=f"^{op}: {re.escape(rule)}$"):
            run(op, first, *rest)


@pytest.mark.parametrize("run", [run_op, run_reference])
def test_the_order_of_an_expert_with_rows_is_checked_and_named(run: Callable[..., None]) -> None:
    orders = torch.arange(64, dtype=torch.int32).repeat(2, 1)
    orders[1, 5] = 64
    run("gptq_moe_gemm", *experts_arguments(g_idx=orders, expert_offsets=offsets(0, 3, 3)).values())
    rule = "g_idx[1] must have values in [0, 64); got 64 at index 5"
    with pytest.raises(ValueError, match=f"^gptq_moe_gemm: {re.escape(rule)}$"):
        run("gptq_moe_gemm", *experts_arguments(g_idx=orders).values())
    orders[1, 5] = 4
    rule = "g_idx[1] must be a permutation; got 4 at index 4 and at index 5"
    _, *rest = experts_arguments(g_idx=orders).values()
    with pytest.raises(ValueError, match=f"^gptq_moe_gemm_dx: {re.escape(rule)}$"):
        run("gptq_moe_gemm_dx", empty(3, 32, dtype=HALF), *rest)


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("op", ["gptq_shuffle", "gptq_unshuffle"])
@pytest.mark.parametrize(("args", "rule"), SHUFFLE_BAD, ids=[rule[:40] for _, rule in SHUFFLE_BAD])
def test_shuffle_and_unshuffle_refuse(run: Callable[..., None], op: str, args: tuple[Any, ...], rule: str) -> None:
    with pytest.raises(ValueError, match=f"^{op}: {re.escape(rule)}$"):
        run(op, *args)


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales", "g_idx"])
def test_tensors_on_different_devices_are_refused(name: str) -> None:
    real = gemm_arguments()
    with FakeTensorMode():
        arguments = {
            key: torch.empty(arg.shape, dtype=arg.dtype, device="cpu" if key == name else "cuda")
            if isinstance(arg, torch.Tensor)
            else arg
            for key, arg in real.items()
        }
        message = f"gptq_gemm: {name} must be on cuda:0 like the first argument; got cpu"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            run_op("gptq_gemm", *arguments.values())


@pytest.mark.parametrize("run", RUNNERS)
def test_raw_g_idx_frees_the_number_of_groups(run: Callable[..., None]) -> None:
    changes = {"use_exllama": False, "g_idx": empty(64), "scales": empty(7, 32, dtype=HALF), "qzeros": empty(7, 4)}
    for group_size in (0, 16, 1000):
        run("gptq_gemm", *gemm_arguments(**changes, group_size=group_size).values())


def test_a_refused_shuffle_leaves_the_weight_as_it_was() -> None:
    qweight = build(CASE).qweight
    before = qweight.clone()
    with pytest.raises(ValueError, match="q_perm"):
        torch.ops.exllama.gptq_shuffle(qweight, empty(60), 4)
    assert torch.equal(qweight, before)


# Every op with arguments that it takes, and the places of its tensors.
def op_arguments(op: str, **changes: Any) -> dict[str, Any]:
    if op in ("gptq_shuffle", "gptq_unshuffle"):
        return {"qweight": build(CASE).qweight, "q_perm": torch.arange(64, dtype=torch.int32), "bit": 4} | changes
    arguments = gemm_arguments(g_idx=torch.arange(64, dtype=torch.int32))
    if op != "gptq_gemm":
        x = arguments.pop("x")
        arguments = {"gptq_dequantize": {}, "gptq_gemm_dx": {"grad": empty(3, 32, dtype=HALF)}}.get(
            op, {"x": x}
        ) | arguments
    if op == "gptq_gemm_multi":
        arguments |= {name: [arguments[name]] for name in ("qweight", "qzeros", "scales")}
    return arguments | changes


OPS = ("gptq_shuffle", "gptq_unshuffle", "gptq_dequantize", "gptq_gemm", "gptq_gemm_dx", "gptq_gemm_multi")
TENSORS = [
    (op, name) for op in OPS for name, value in op_arguments(op).items() if isinstance(value, (torch.Tensor, list))
]
VECTORS = ("g_idx", "q_perm")


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, name in TENSORS if isinstance(op_arguments(op)[name], torch.Tensor)]
)
def test_none_for_a_tensor_is_refused_by_name(run: Callable[..., None], op: str, name: str) -> None:
    hint = "; an empty int32 tensor means none" if name in VECTORS else ""
    with pytest.raises(ValueError, match=f"^{op}: {name} must be a tensor; got None{hint}$"):
        run(op, *op_arguments(op, **{name: None}).values())


@pytest.mark.parametrize("run", [run_reference, run_op])
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_a_storage_that_was_freed_or_shrunk_is_refused_by_name(run: Callable[..., None], op: str, name: str) -> None:
    for kept_bytes in (0, 4):
        arguments = op_arguments(op)
        value = arguments[name]
        tensor, part = (value[0], r"\[0\]") if isinstance(value, list) else (value, "")
        tensor = tensor.clone()
        needed = tensor.nbytes
        tensor.untyped_storage().resize_(kept_bytes)
        arguments[name] = [tensor] if part else tensor
        message = (
            f"{name}{part} must have a storage of at least {needed} bytes; got {kept_bytes}, as if it had been freed"
        )
        with pytest.raises(ValueError, match=f"^{op}: {message}$"):
            run(op, *arguments.values())


def test_a_view_needs_the_storage_up_to_its_end_and_no_more() -> None:
    x = torch.randn(6, 64).half()
    view = x[2:5]
    x.untyped_storage().resize_(5 * 64 * 2)
    run_op("gptq_gemm", *gemm_arguments(x=view).values())
    x.untyped_storage().resize_(5 * 64 * 2 - 1)
    with pytest.raises(ValueError, match=r"x must have a storage of at least 640 bytes; got 639"):
        run_op("gptq_gemm", *gemm_arguments(x=view).values())


def perm_within(buffer: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A weight of (8, 32) words at the beginning of a buffer, and a permutation of its rows from an entry on."""
    perm = buffer[first : first + 64]
    if buffer.device.type == "cpu" and not isinstance(buffer, FakeTensor):
        perm.copy_(torch.arange(64))
    return buffer[:256].view(8, 32), perm, 4


OVERLAP = "gptq_shuffle: q_perm must share no memory with qweight, which is overwritten; got tensors that overlap"


@pytest.mark.parametrize("first", [0, 100, 255])
@pytest.mark.parametrize("run", [run_reference, run_op])
def test_a_permutation_in_the_memory_that_shuffle_overwrites_is_refused(run: Callable[..., None], first: int) -> None:
    arguments = perm_within(torch.zeros(400, dtype=torch.int32), first)
    before = arguments[0].clone()
    with pytest.raises(ValueError, match=f"^{OVERLAP}$"):
        run("gptq_shuffle", *arguments)
    assert torch.equal(arguments[0], before)
    run("gptq_unshuffle", *arguments)  # which overwrites nothing
    with pytest.raises(ValueError, match=f"^{OVERLAP}$"):
        run("gptq_shuffle", *perm_within(torch.zeros(400, dtype=torch.int32, device="meta"), first))
    with FakeTensorMode(), pytest.raises(ValueError, match=f"^{OVERLAP}$"):
        run_op("gptq_shuffle", *perm_within(torch.zeros(400, dtype=torch.int32), first))


@pytest.mark.parametrize("run", [run_reference, run_op])
def test_a_permutation_beside_its_weight_in_one_buffer_is_taken(run: Callable[..., None]) -> None:
    run("gptq_shuffle", *perm_within(torch.zeros(400, dtype=torch.int32), 256))
    with FakeTensorMode():
        run_op("gptq_shuffle", *perm_within(torch.zeros(400, dtype=torch.int32), 256))
    qweight = torch.zeros(8, 32, dtype=torch.int32)
    run("gptq_shuffle", qweight, qweight[2, 5:5], 4)  # of no entries


def test_overlaps_are_found_between_storages_too() -> None:
    """Two tensors over one array of NumPy share memory, but no storage."""
    array = torch.arange(256, dtype=torch.int32).numpy()
    qweight, perm = torch.from_numpy(array).view(8, 32), torch.from_numpy(array[:64])
    assert qweight.untyped_storage()._cdata != perm.untyped_storage()._cdata
    with pytest.raises(ValueError, match=f"^{OVERLAP}$"):
        run_op("gptq_shuffle", qweight, perm, 4)


def test_a_compiled_shuffle_refuses_a_permutation_in_its_weight() -> None:
    def shuffle(*arguments: Any) -> None:
        torch.ops.exllama.gptq_shuffle(*arguments)

    compiled = torch.compile(shuffle, backend="aot_eager", fullgraph=True)
    with pytest.raises((ValueError, torch._dynamo.exc.TorchRuntimeError), match=OVERLAP):
        compiled(*perm_within(torch.zeros(400, dtype=torch.int32), 0))


def index_of(op: str) -> str:
    return "q_perm" if "shuffle" in op else "g_idx"


@pytest.mark.parametrize("run", [run_reference, run_op])
@pytest.mark.parametrize("wrong", [-1, 64, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("op", OPS)
def test_an_index_outside_its_range_is_refused_on_the_cpu(run: Callable[..., None], op: str, wrong: int) -> None:
    name, rows = index_of(op), torch.arange(64, dtype=torch.int32)
    rows[5] = wrong
    arguments = op_arguments(op, **{name: rows})
    before = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, arguments)
    message = re.escape(f"{op}: {name} must have values in [0, 64); got {wrong} at index 5")
    with pytest.raises(ValueError, match=f"^{message}$"):
        run(op, *arguments.values())
    torch.testing.assert_close(arguments, before, rtol=0, atol=0)


@pytest.mark.parametrize("run", [run_reference, run_op])
@pytest.mark.parametrize("op", OPS[2:])
def test_a_group_that_has_no_scales_is_refused_on_the_cpu(run: Callable[..., None], op: str) -> None:
    groups = torch.arange(64, dtype=torch.int32) // 16
    groups[7] = 4
    message = re.escape(f"{op}: g_idx must have values in [0, 4); got 4 at index 7")
    with pytest.raises(ValueError, match=f"^{message}$"):
        run(op, *op_arguments(op, g_idx=groups, use_exllama=False).values())


@pytest.mark.parametrize("run", [run_reference, run_op])
@pytest.mark.parametrize("op", OPS)
def test_duplicates_in_a_permutation_are_refused_by_who_writes_to_its_rows(run: Callable[..., None], op: str) -> None:
    name, rows = index_of(op), torch.arange(64, dtype=torch.int32)
    rows[9] = 3
    arguments = op_arguments(op, **{name: rows})
    if op in ("gptq_gemm", "gptq_gemm_multi"):  # a gather has a result
        run(op, *arguments.values())
        return
    with pytest.raises(ValueError, match=f"^{op}: {name} must be a permutation; got 3 at index 3 and at index 9$"):
        run(op, *arguments.values())


def test_a_gather_by_duplicates_gives_the_reference_result() -> None:
    arguments = gemm_arguments(g_idx=torch.arange(64, dtype=torch.int32) // 2, x=torch.eye(64))
    out, expected = (ops.gptq_gemm(*arguments.values()) for ops in (torch.ops.exllama, reference))
    torch.testing.assert_close(out, expected)


def test_permutations_longer_than_the_copy_on_the_stack_are_checked_too() -> None:
    K = 8192
    qweight, rows = empty(K // 8, 8), torch.randperm(K).int()
    run_op("gptq_unshuffle", qweight, rows, 4)
    rows[-1], other = rows[0], int(rows[0])
    with pytest.raises(ValueError, match=f"must be a permutation; got {other} at index 0 and at index {K - 1}$"):
        run_op("gptq_unshuffle", qweight, rows, 4)


WRITES_DURING_CALLS = """
import threading
import torch
import exllama_ops

K, N = 512, 64
weight = exllama_ops.quantize(torch.randn(N, K), 4, 32)
x, dx = torch.randn(32, K), torch.randn(32, N)
raw, perm = torch.arange(K, dtype=torch.int32) // 32, torch.randperm(K).int()
ops = torch.ops.exllama
tensors = weight.qweight, weight.qzeros, weight.scales
calls = [
    (ops.gptq_gemm, (x, *tensors), raw, False),
    (ops.gptq_gemm_dx, (dx, *tensors), raw, False),
    (ops.gptq_dequantize, tensors, raw, False),
    (ops.gptq_gemm, (x, *tensors), perm, True),
    (ops.gptq_gemm_dx, (dx, *tensors), perm, True),
    (ops.gptq_dequantize, tensors, perm, True),
]
for op, arguments, good, shuffled in calls:
    expected = op(*arguments, good, shuffled, 4, True)
    index, bad, done = good.clone(), torch.full_like(good, 2**30), threading.Event()

    def write():
        while not done.is_set():
            index.copy_(bad)
            index.copy_(good)

    writer = threading.Thread(target=write)
    writer.start()
    computed = refused = 0
    while computed + refused < 4000 and (computed < 20 or refused < 20):
        try:
            assert torch.equal(op(*arguments, index, shuffled, 4, True), expected)
            computed += 1
        except ValueError as error:
            assert "must have values in" in str(error)
            refused += 1
    done.set()
    writer.join()
print("right")
"""


def test_an_index_that_a_thread_writes_during_calls_is_read_once() -> None:
    """In a process of its own: an index that is read again leads outside, and the process dies."""
    result = subprocess.run([sys.executable, "-c", WRITES_DURING_CALLS], capture_output=True, text=True, check=False)
    assert result.stdout == "right\n", (result.returncode, result.stderr)


def test_errors_keep_their_text_inside_a_compiled_function() -> None:
    compiled = torch.compile(torch.ops.exllama.gptq_gemm, backend="eager", fullgraph=True)
    bad = next(b for b in BAD_GEMM if "qzeros" in b.changes and "(4, 5)" in b.message)
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=re.escape(bad.message)):
        compiled(*gemm_arguments(**bad.changes).values())
