"""Quantized weights as Python integers, their exact arithmetic, and the bounds that float results must keep.

Nothing here comes from exllama_ops. Words are cut out of one big integer, scales and activations are the rationals that
their floats stand for, and a result is rounded by `round_once`.
"""

import functools
import math
from fractions import Fraction
from operator import mul
from typing import NamedTuple

import torch

# p, the significant bits, and the exponent of the smallest normal number.
PRECISION = {torch.float16: (11, -14), torch.bfloat16: (8, -126), torch.float32: (24, -126)}

BLOCK = {2: 16, 3: 32, 4: 8, 8: 4}

# The values in each half word of a shuffled block, lowest bits first; 3 bits leave the top bit of a half word over.
_HALVES = {
    2: [range(0, 16, 2), range(1, 16, 2)],
    3: [range(0, 10, 2), range(1, 10, 2), range(10, 20, 2), range(11, 20, 2), range(20, 30, 2), range(21, 30, 2)],
    4: [range(0, 8, 2), range(1, 8, 2)],
    8: [range(2), range(2, 4)],
}


def _shuffled_stream(bits):
    """Bit i of the shuffled words of a block is this list's i-th bit of its checkpoint words."""
    stream = []
    for half, values in enumerate(_HALVES[bits]):
        stream += [bits * j + b for j in values for b in range(bits)]
        if bits == 3:
            stream.append(3 * (30 + half % 2) + half // 2)
    return stream


SHUFFLED_STREAM = {bits: _shuffled_stream(bits) for bits in _HALVES}


def words_of(values, bits, shuffled=False):
    """The int32 words of a list of values."""
    number = sum(value << bits * j for j, value in enumerate(values))
    if shuffled:
        block_bits = BLOCK[bits] * bits
        number = sum(
            (number >> block_bits * block + source & 1) << block_bits * block + target
            for block in range(len(values) // BLOCK[bits])
            for target, source in enumerate(SHUFFLED_STREAM[bits])
        )
    words = [number >> 32 * i & 0xFFFFFFFF for i in range(len(values) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def pack_along_k(q, bits, shuffled=False):
    """qweight of rows of integers q[k][n]."""
    columns = [words_of(column, bits, shuffled) for column in zip(*q, strict=True)]
    return torch.tensor(columns, dtype=torch.int32).t().contiguous()


def pack_along_n(stored, bits):
    """qzeros of rows of integers stored[g][n]."""
    return torch.tensor([words_of(row, bits) for row in stored], dtype=torch.int32)


class ExactWeight:
    """A random weight as integers, and the arguments by which the ops take it.

    Args:
        order: "shuffled" and "checkpoint" have groups k // group_size. "perm" is shuffled and "raw" in checkpoint
            order, both with the groups of an act-order weight. "any" has a raw g_idx of no pattern at all.
    """

    ORDERS = ("shuffled", "perm", "checkpoint", "raw", "any")

    def __init__(self, bits, K, N, group_size, order, *, v2=True, scales_dtype=torch.float16, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def integers(limit, *shape):
            return torch.randint(0, limit, shape, generator=generator).tolist()

        self.bits, self.K, self.N, self.v2, self.group_size = bits, K, N, v2, group_size
        G = -(-K // group_size)
        self.q = integers(2**bits, K, N)
        self.stored = integers(2**bits, G, N)
        self.stored[0][0] = 2**bits - 1
        self.scales = (torch.randn(G, N, generator=generator) * 0.05).to(scales_dtype)
        self.groups = [k // group_size for k in range(K)]
        self.perm = None
        if order in ("perm", "raw"):
            shuffled_rows = torch.randperm(K, generator=generator).tolist()
            self.groups = [self.groups[k] for k in shuffled_rows]
        if order == "any":
            self.groups = integers(G, K)
        if order == "perm":
            self.perm = [k for _, k in sorted((group, k) for k, group in enumerate(self.groups))]
        self.use_exllama = order in ("shuffled", "perm")
        self.has_g_idx = order in ("raw", "any")

    @property
    def z(self):
        """The zero points: what is stored, and one more in v1."""
        return [[field + (0 if self.v2 else 1) for field in row] for row in self.stored]

    def arguments(self):
        """What the ops take, from qweight on."""
        rows = range(self.K) if self.perm is None else self.perm
        g_idx = self.perm if self.perm is not None else self.groups if self.has_g_idx else []
        return (
            pack_along_k([self.q[k] for k in rows], self.bits, self.use_exllama),
            pack_along_n(self.stored, self.bits),
            self.scales.clone(),
            torch.tensor(g_idx, dtype=torch.int32),
            self.use_exllama,
            self.bits,
            self.v2,
            self.group_size,
        )

    def exact(self):
        """W, in the rows of the checkpoint."""
        scales, z = exact(self.scales), self.z
        rows = [
            [scales.rows[g][n] * (self.q[k][n] - z[g][n]) for n in range(self.N)] for k, g in enumerate(self.groups)
        ]
        return ExactMatrix(rows, scales.denominator)


class ExactMatrix(NamedTuple):
    """The rationals rows[i][j] / denominator."""

    rows: list[list[int]]
    denominator: int

    def t(self):
        return ExactMatrix([list(column) for column in zip(*self.rows, strict=True)], self.denominator)

    def size(self):
        """The absolute values."""
        return ExactMatrix([[abs(value) for value in row] for row in self.rows], self.denominator)

    def __matmul__(self, other):
        columns = other.t().rows
        rows = [[sum(map(mul, row, column)) for column in columns] for row in self.rows]
        return ExactMatrix(rows, self.denominator * other.denominator)

    def __getitem__(self, place):
        row, column = place
        return Fraction(self.rows[row][column], self.denominator)


def exact(tensor):
    """The values of a 2-D float tensor as they are."""
    ratios = [[value.as_integer_ratio() for value in row] for row in tensor.double().tolist()]
    denominator = max((power for row in ratios for _, power in row), default=1)
    return ExactMatrix([[value * (denominator // power) for value, power in row] for row in ratios], denominator)


def _exponent(value):
    """floor(log2(abs(value))) of a rational other than 0."""
    numerator, denominator = abs(value.numerator), value.denominator
    guess = numerator.bit_length() - denominator.bit_length()
    return guess if Fraction(numerator, denominator) >= power_of_2(guess) else guess - 1


@functools.cache
def power_of_2(exponent):
    return Fraction(2) ** exponent


def ulp(value, dtype):
    """The distance of the floats of dtype around a rational: that of the subnormals below the normal numbers."""
    precision, smallest = PRECISION[dtype]
    exponent = smallest if value == 0 else max(_exponent(value), smallest)
    return power_of_2(exponent - precision + 1)


def round_once(value, dtype):
    """The float of dtype nearest to a rational, ties to even, as a Python float; inf beyond the largest one."""
    unit = ulp(value, dtype)
    rounded = round(value / unit) * unit
    return float(rounded) if abs(rounded) <= largest(dtype) else math.copysign(math.inf, value)


@functools.cache
def round_product(scale, factor, dtype):
    """A float times an integer, exactly and then rounded once."""
    return round_once(Fraction(scale) * factor, dtype)


@functools.cache
def largest(dtype):
    return Fraction(torch.finfo(dtype).max)


def bound(total, size, result, terms, dtype):
    """How far a result may lie from ``total``, the exact sum of ``terms`` products of absolute sum ``size``.

    1. The sum in float64, u = 2**-53, is off by at most ``terms * u * size``, in any order, with or without FMA and
       without a term in u**2. W is exact there (24 + 9 bits), each product rounds at most once, and each sum once. See
       Jeannerod and Rump, Improved error bounds for inner products in floating-point arithmetic, 2013.
    2. Rounding that sum to float32 is off by at most 2**-24 of it, itself at most ``abs(total)`` and the error of 1;
       2**-150 among the subnormals. As abs(total) <= size, 1 and 2 stay within
       ``(2**-24 + terms * 2**-53) * size`` (the rounding is off by 2**-24 / (1 + 2**-24), which pays for the rest).
    3. Rounding to the result's dtype is off by at most half an ulp of the result; that includes step 2 in float32.
    """
    double = terms * power_of_2(-53) * size
    single = max(power_of_2(-24) * (abs(total) + double), power_of_2(-150))
    return double + single + ulp(result, dtype) / 2


def assert_within_bound(result, A, B):
    """Check a float tensor against A @ B element by element."""
    sums, sizes = A @ B, A.size() @ B.size()
    dtype, terms = result.dtype, len(B.rows)
    for m, row in enumerate(result.double().tolist()):
        for n, value in enumerate(row):
            total, size = sums[m, n], sizes[m, n]
            if math.isinf(value):
                # A result is inf from half an ulp above the largest number on.
                limit = largest(dtype)
                assert abs(total) + bound(total, size, limit, terms, dtype) >= limit + ulp(limit, dtype) / 2, (m, n)
                assert (value > 0) == (total > 0), (m, n)
            else:
                error = abs(Fraction(value) - total)
                assert error <= bound(total, size, Fraction(value), terms, dtype), (m, n, value, float(total))
