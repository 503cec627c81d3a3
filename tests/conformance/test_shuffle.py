"""gptq_shuffle and gptq_unshuffle, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conformance.backends import BackendUnderTest
from conformance.weights import BLOCK_VALUES, Case, build

CASES = [
    Case(bits, BLOCK_VALUES[bits] * blocks, BLOCK_VALUES[bits] * columns, 8, order)
    for bits in BLOCK_VALUES
    for blocks in (1, 2, 5, 13)
    for columns in (1, 3)
    for order in ("sorted", "perm")
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shuffle_gives_the_words_of_the_format(backend: BackendUnderTest, case: Case) -> None:
    checkpoint = build(replace(case, shuffled=False)).qweight.to(backend.device)
    shuffled = build(case).to(backend.device)
    assert backend.ops.gptq_shuffle(checkpoint, shuffled.row_order, case.bits) is None
    assert torch.equal(checkpoint, shuffled.qweight)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unshuffle_gives_the_words_of_the_checkpoint(backend: BackendUnderTest, case: Case) -> None:
    checkpoint = build(replace(case, shuffled=False)).qweight
    shuffled = build(case).to(backend.device)
    result = backend.ops.gptq_unshuffle(shuffled.qweight, shuffled.row_order, case.bits)
    assert torch.equal(result.cpu(), checkpoint)


@pytest.mark.parametrize("bits", BLOCK_VALUES)
def test_shuffle_writes_only_the_tensor_it_is_given(backend: BackendUnderTest, bits: int) -> None:
    """A view into a larger buffer: what lies around it stays."""
    weight = build(Case(bits, BLOCK_VALUES[bits] * 2, BLOCK_VALUES[bits], 8, shuffled=False)).to(backend.device)
    rows = weight.qweight.shape[0]
    buffer = torch.full((rows + 2, weight.qweight.shape[1]), 0x5A5A5A5A, dtype=torch.int32, device=backend.device)
    buffer[1:-1] = weight.qweight
    backend.ops.gptq_shuffle(buffer[1:-1], weight.row_order, bits)
    assert (buffer[0] == 0x5A5A5A5A).all()
    assert (buffer[-1] == 0x5A5A5A5A).all()
    assert torch.equal(backend.ops.gptq_unshuffle(buffer[1:-1], weight.row_order, bits), weight.qweight)
