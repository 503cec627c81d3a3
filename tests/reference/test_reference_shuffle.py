"""reference.gptq_shuffle and reference.gptq_unshuffle against words cut out of big integers."""

import exact_arithmetic
import pytest
import torch

from exllama_ops import reference
from exllama_ops.layout.formats import SUPPORTED_BITS

every_width = pytest.mark.parametrize("bits", SUPPORTED_BITS)
every_shape = pytest.mark.parametrize(("blocks", "N"), [(1, 3), (3, 5)])
with_and_without_perm = pytest.mark.parametrize("with_perm", [False, True])


def case(bits, blocks, N, with_perm, seed=0):
    """(checkpoint words, perm, shuffled words)"""
    generator = torch.Generator().manual_seed(seed)
    K = blocks * exact_arithmetic.BLOCK[bits]
    q = torch.randint(0, 2**bits, (K, N), generator=generator).tolist()
    perm = torch.randperm(K, generator=generator).tolist() if with_perm else []
    rows = [q[k] for k in perm] if with_perm else q
    return (
        exact_arithmetic.pack_along_k(q, bits),
        torch.tensor(perm, dtype=torch.int32),
        exact_arithmetic.pack_along_k(rows, bits, shuffled=True),
    )


@every_width
@every_shape
@with_and_without_perm
def test_shuffle_writes_the_shuffled_words_in_place_and_returns_nothing(bits, blocks, N, with_perm):
    qweight, perm, expected = case(bits, blocks, N, with_perm)
    memory = qweight.data_ptr()
    assert reference.gptq_shuffle(qweight, perm, bits) is None
    assert qweight.data_ptr() == memory
    assert torch.equal(qweight, expected)


@every_width
@every_shape
@with_and_without_perm
def test_unshuffle_gives_the_checkpoint_words_in_new_memory(bits, blocks, N, with_perm):
    expected, perm, shuffled = case(bits, blocks, N, with_perm)
    before = shuffled.clone()
    result = reference.gptq_unshuffle(shuffled, perm, bits)
    assert torch.equal(result, expected)
    assert torch.equal(shuffled, before)
    assert result.untyped_storage().data_ptr() != shuffled.untyped_storage().data_ptr()


@every_width
@with_and_without_perm
def test_shuffle_and_unshuffle_leave_the_permutation(bits, with_perm):
    qweight, perm, _ = case(bits, 2, 4, with_perm)
    before = perm.clone()
    reference.gptq_shuffle(qweight, perm, bits)
    reference.gptq_unshuffle(qweight, perm, bits)
    assert torch.equal(perm, before)


@every_width
def test_shuffle_writes_through_a_contiguous_view(bits):
    qweight, perm, expected = case(bits, 2, 4, True)
    memory = torch.stack([qweight, torch.zeros_like(qweight)])
    reference.gptq_shuffle(memory[0], perm, bits)
    assert torch.equal(memory[0], expected)
    assert not memory[1].any()


def test_a_refused_shuffle_leaves_the_weight():
    qweight, _, _ = case(4, 2, 4, False)
    before = qweight.clone()
    with pytest.raises(ValueError, match=r"^gptq_shuffle: q_perm must be empty or have shape"):
        reference.gptq_shuffle(qweight, torch.arange(7, dtype=torch.int32), 4)
    assert torch.equal(qweight, before)


def test_unshuffle_errors_carry_its_own_name():
    qweight, perm, _ = case(4, 2, 4, True)
    with pytest.raises(ValueError, match=r"^gptq_unshuffle: bit must be one of"):
        reference.gptq_unshuffle(qweight, perm, 5)
