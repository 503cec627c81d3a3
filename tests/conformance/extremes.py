"""Weights and activations from the whole range of their dtypes, where float32 overflows on the way to a result."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from conformance.weights import DTYPES, Case, Weight, build

# Below this, README promises, nothing overflows in the float32 sums of a GPU.
LIMIT = 2.0**127
# N of the weights that are drawn, in even numbers of the width's block.
COLUMNS = {2: 64, 3: 64, 4: 80, 8: 72}


class Products(NamedTuple):
    """A weight, and what gptq_gemm and gptq_gemm_dx multiply with it."""

    weight: Weight
    x: Tensor
    grad: Tensor

    def flushed(self) -> Products:
        """The same with zeros for subnormal bfloat16 numbers."""

        def flush(values: Tensor) -> Tensor:
            tiny = values.abs() < torch.finfo(values.dtype).smallest_normal
            return values.masked_fill(tiny, 0) if values.dtype == torch.bfloat16 else values

        weight = replace(self.weight, scales=flush(self.weight.scales))
        return Products(weight, flush(self.x), flush(self.grad))

    def gemm_stays_below_the_limit(self) -> Tensor:
        """(M, N): where each |W|, each group's sum of |x| * 2**bits, and the sum of |x W| do."""
        W, x = self.weight.dense.abs(), self.x.double().abs()
        of_groups = torch.zeros(len(x), len(self.weight.z), dtype=torch.float64).index_add_(1, self.weight.groups, x)
        in_groups = (of_groups * 2**self.weight.case.bits < LIMIT).all(1, keepdim=True)
        return (W < LIMIT).all(0) & in_groups & (x @ W < LIMIT)

    def dx_stays_below_the_limit(self) -> Tensor:
        """(M, K): where each |W| and the sum of |grad W| do."""
        W = self.weight.dense.abs().t()
        return (W < LIMIT).all(0) & (self.grad.double().abs() @ W < LIMIT)


def extremes(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator, spread: int | None = None) -> Tensor:
    """Finite numbers of all exponents of a dtype, subnormals too, or of ``spread`` neighbours; one in 16 is zero."""
    info = torch.finfo(dtype)
    first, last = round(math.log2(info.smallest_normal * info.eps)), math.frexp(info.max)[1] - 1
    if spread is not None:
        first = int(torch.randint(first, last + 1, (), generator=rng))
        last = min(last, first + spread)
    exponents = torch.randint(first, last + 1, shape, generator=rng)
    values = torch.ldexp(1 + torch.rand(shape, generator=rng, dtype=torch.float64), exponents)
    values *= torch.randint(0, 16, shape, generator=rng).sign() * (1 - 2 * torch.randint(0, 2, shape, generator=rng))
    return values.clamp(-info.max, info.max).to(dtype)


def of_extremes(case: Case, dtype: torch.dtype, rng: torch.Generator) -> Products:
    """Scales, x and grad of any size, x of sizes that lie near each other in half of the cases."""
    weight = build(case)
    scales = extremes(tuple(weight.scales.shape), case.scales_dtype, rng, 24)
    M, spread = int(torch.randint(1, 20, (), generator=rng)), (None, 24)[case.seed % 2]
    x, grad = (extremes((M, size), dtype, rng, spread) for size in (case.K, case.N))
    return Products(replace(weight, scales=scales), x, grad)


def that_cancel(case: Case, dtype: torch.dtype, rng: torch.Generator) -> Products:
    """Two groups of rows, and two halves of columns, with opposite scales: of a sum one term of many is left."""
    K, N = case.K // 2, case.N // 2
    quarter = build(replace(case, K=K, N=N, group_size=K, order="sorted"))
    weight = build(replace(case, group_size=K, order="sorted"), q=quarter.q.repeat(2, 2))
    weight.qzeros.zero_()
    weight.z.fill_(0 if case.v2 else 1)
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat_interleave(N, 1)
    weight.scales.copy_(signs * quarter.scales.double().repeat(2, 2) * torch.finfo(case.scales_dtype).max)
    if case.order == "raw":
        weight = replace(weight, case=replace(weight.case, order="raw"), row_order=weight.groups.to(torch.int32))
    x, grad = (extremes((5, size), dtype, rng, 8).repeat(1, 2) for size in (K, N))
    x[:, -1], grad[:, -1] = 0, 0
    return Products(weight, x, grad)


def at_the_limit(case: Case, dtype: torch.dtype, rng: torch.Generator) -> Products:
    """The largest |W|, and the largest sum of |x W| and of |grad W|, just below it."""
    weight = build(replace(case, scales_dtype=torch.float32))
    weight.scales.copy_(weight.scales.double() * (0.99 * LIMIT / weight.dense.abs().max()))
    W = weight.dense.abs()

    def operand(W: Tensor) -> Tensor:
        values = torch.randn(9, len(W), generator=rng, dtype=torch.float64)
        return (values * (0.98 * LIMIT / (values.abs() @ W).max())).to(dtype)

    return Products(weight, operand(W), operand(W.t()))


@functools.cache
def drawn(bits: int, dtype: torch.dtype) -> list[Products]:
    """Products of each kind, with weights in each order and scales of each dtype."""
    products = []
    rng = torch.Generator().manual_seed(bits)
    orders = [("sorted", True), ("perm", True), ("sorted", False), ("raw", False)]
    dtypes = itertools.cycle(DTYPES[DTYPES.index(dtype) :] + DTYPES[: DTYPES.index(dtype)])
    for seed, ((order, shuffled), scales_dtype) in enumerate(zip(orders, dtypes, strict=False)):
        case = Case(bits, 128, COLUMNS[bits], 32, order, shuffled, bool(bits % 2), scales_dtype, seed)
        products.append(of_extremes(case, dtype, rng))
        if order != "perm":
            products.append(that_cancel(case, dtype, rng))
        products.append(at_the_limit(case, dtype, rng))
    return products
