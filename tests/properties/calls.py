"""Random calls of the ops, as hypothesis draws them: what a call looks like, and the seed of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch

from conformance.weights import BLOCK_VALUES, DTYPES

OPS = ("gptq_shuffle", "gptq_unshuffle", "gptq_dequantize", "gptq_gemm", "gptq_gemm_dx", "gptq_gemm_multi")
CONTEXTS = ("plain", "no_grad", "inference_mode", "function", "requires_grad")
# The order of rows: none at all, a permutation of a shuffled weight, the two lists of a filled one, or the group of
# each row of one that is not shuffled.
ORDERS = {
    True: ("none", "identity", "permutation", "filled"),
    False: ("none", "sorted", "random", "one group"),
}
PERMUTATIONS = ("none", "identity", "permutation")

# Kinds of numbers: those whose products stay in the range of float32, and others.
MODERATE_X = ("normal", "subnormals", "zeros", "outliers", "one-hot", "not finite")
MODERATE_SCALES = ("small", "signed", "subnormals", "zeros")
EXTREMES = ("extremes", "largest", "any finite", "any bits")

# What may be wrong with arguments: what a fake sees too, what only their memory shows, and what only their values show.
FAULTS_OF_FORM = ("none", "dtype", "device", "rank", "size", "strides", "option", "lists")
FAULTS_OF_MEMORY = ("overlap", "freed", "shrunk")
FAULTS_OF_INDICES = ("range", "duplicate")
FAULTS = FAULTS_OF_FORM + FAULTS_OF_MEMORY + FAULTS_OF_INDICES


@dataclass(frozen=True)
class Fault:
    """One of FAULTS, and the argument that has it, where its kind leaves a choice."""

    kind: str
    argument: str


@dataclass(frozen=True)
class Call:
    """A call of an op.

    Args:
        K: rows of the words.
        columns: N of each part; gptq_gemm_multi alone has several.
        group_size: what the op is told.
        groups: G.
        x_values: the kinds of numbers in the rows of x or grad, in turn.
        placed: whether tensors are views, of strides and offsets that an op must take.
        shared: whether tensors lie in one another's memory, or side by side where one is written.
        seed: of every number, and of choices within a kind.
    """

    op: str
    bits: int
    K: int
    columns: tuple[int, ...]
    group_size: int
    groups: int
    shuffled: bool
    order: str
    v2: bool
    scales_dtypes: tuple[torch.dtype, ...]
    scale_values: str
    M: int
    dtype: torch.dtype
    x_values: tuple[str, ...]
    placed: bool
    shared: bool
    faults: tuple[Fault, ...]
    precision: str
    threads: int
    context: str
    seed: int

    @property
    def in_features(self) -> int:
        """Rows of W: all of those of the words, or some of a filled weight."""
        unit = BLOCK_VALUES[self.bits]
        return unit * (1 + self.seed % (self.K // unit)) if self.order == "filled" else self.K

    @property
    def is_raw(self) -> bool:
        """Whether g_idx gives the group of every row."""
        return not self.shuffled and self.order != "none"


def tensor_arguments(op: str) -> tuple[str, ...]:
    """The names of an op's arguments that are tensors or lists of them."""
    if op in ("gptq_shuffle", "gptq_unshuffle"):
        return "qweight", "q_perm"
    first = {"gptq_dequantize": (), "gptq_gemm_dx": ("grad",)}.get(op, ("x",))
    return *first, "qweight", "qzeros", "scales", "g_idx"


# A strategy costs more to make than to draw from. Hypothesis draws the first of its choices more often than others.
_UP_TO = [st.integers(0, most) for most in range(1 << 10)]
_FLAG = st.booleans()
_SEED = st.integers(0, 2**32 - 1)
_OP = st.sampled_from(OPS)
_BITS = st.sampled_from(list(BLOCK_VALUES))
_ORDER = {shuffled: st.sampled_from(orders) for shuffled, orders in ORDERS.items()}
_PERMUTATION = st.sampled_from(PERMUTATIONS)
_GROUP_SIZE = st.sampled_from((1, 2, 3, 5, 8, 16, 24, 32, 48, 96, 128, 160, 2**31, 2**40, 2**63 - 1))
_TOKENS = st.sampled_from((*range(2, 10), *range(2, 10), 16, 17, 31, 33, 64, 70, 300, 1, 1, 0))
_DTYPE = st.sampled_from(DTYPES)
_PRECISION = st.sampled_from(("high", "highest", "medium"))
_THREADS = st.sampled_from((1, 1, 1, 2, 2, 5))
_FAULT_COUNT = st.sampled_from((0, 0, 0, 0, 0, 0, 1, 1, 1, 2))
_ARGUMENT = {op: st.sampled_from(tensor_arguments(op)) for op in OPS}


def calls(
    *,
    faults: Sequence[str] = FAULTS,
    contexts: Sequence[str] = CONTEXTS,
    x_values: Sequence[str] = MODERATE_X + EXTREMES,
    scale_values: Sequence[str] = MODERATE_SCALES + EXTREMES,
    size: int = 400,
) -> st.SearchStrategy[Call]:
    """Calls of all ops, with some of the faults, contexts and kinds of numbers.

    Args:
        size: what K is at most, more or less, and N half of it.
    """
    of_one_op = {"overlap": "gptq_shuffle", "lists": "gptq_gemm_multi"}
    kinds = {op: [kind for kind in faults if of_one_op.get(kind, op) == op] for op in OPS}
    return _calls(
        {op: st.sampled_from(kinds[op]) if kinds[op] else st.nothing() for op in OPS},
        st.sampled_from(contexts),
        st.sampled_from(x_values),
        st.sampled_from(scale_values),
        size,
    )


@st.composite
def _calls(
    draw: Any,
    fault_kinds: dict[str, st.SearchStrategy[str]],
    contexts: st.SearchStrategy[str],
    x_values: st.SearchStrategy[str],
    scale_values: st.SearchStrategy[str],
    size: int,
) -> Call:
    op, bits = draw(_OP), draw(_BITS)
    unit = BLOCK_VALUES[bits]

    def multiple(most: int) -> int:
        """A multiple of the unit, and an odd one four times of five."""
        half = draw(_UP_TO[max(1, most // unit // 2)])
        return unit * (2 * half if half and draw(_UP_TO[4]) == 4 else 2 * half + 1)

    K = multiple(size)
    parts = 1 + draw(_UP_TO[3]) if op == "gptq_gemm_multi" else 1
    widest = size // 6 if parts > 2 else size // 2 if draw(_UP_TO[31]) else 3 * size
    columns = tuple(multiple(widest) for _ in range(parts))
    shuffled = op in ("gptq_shuffle", "gptq_unshuffle") or draw(_FLAG)
    order = draw(_PERMUTATION if op in ("gptq_shuffle", "gptq_unshuffle") else _ORDER[shuffled])
    if not shuffled and order != "none":
        groups, group_size = 1 + draw(_UP_TO[11]), draw(_GROUP_SIZE)
    else:
        group_size = 1 + draw(_UP_TO[K + 40]) if draw(_FLAG) else draw(_GROUP_SIZE)
        groups = -(-K // group_size)
        if K % groups == 0 and draw(_FLAG):
            group_size = 0
    fault_count = 0 if fault_kinds[op].is_empty else draw(_FAULT_COUNT)
    return Call(
        op=op,
        bits=bits,
        K=K,
        columns=columns,
        group_size=group_size,
        groups=groups,
        shuffled=shuffled,
        order=order,
        v2=draw(_FLAG),
        scales_dtypes=tuple(draw(_DTYPE) for _ in columns),
        scale_values=draw(scale_values),
        M=draw(_TOKENS),
        dtype=draw(_DTYPE),
        x_values=tuple(draw(x_values) for _ in range(1 + draw(_UP_TO[1]))),
        placed=draw(_FLAG),
        shared=draw(_UP_TO[3]) == 3,
        faults=tuple(Fault(draw(fault_kinds[op]), draw(_ARGUMENT[op])) for _ in range(fault_count)),
        precision=draw(_PRECISION),
        threads=draw(_THREADS),
        context=draw(contexts),
        seed=draw(_SEED),
    )
