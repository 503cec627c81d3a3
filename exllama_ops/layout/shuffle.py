"""Checkpoint order <-> shuffled order of packed weights."""

from __future__ import annotations

from torch import Tensor

from exllama_ops.layout.pack import pack_rows, unpack_rows


def inverse_permutation(perm: Tensor) -> Tensor:
    """The permutation that undoes ``perm``; by argsort, since what may be traced writes nothing in place."""
    return perm.argsort()


def shuffle(qweight: Tensor, perm: Tensor, bits: int) -> Tensor:
    """Sort the rows by ``perm``, then reorder the bits of each block: row i of the result is row ``perm[i]``.

    Args:
        qweight: (K * bits / 32, N) int32 in checkpoint order.
        perm: (K,) int32, ``argsort(g_idx)``; or empty for no permutation.
        bits: 2, 3, 4 or 8.

    Returns:
        A new tensor like qweight, in shuffled order.
    """
    values = unpack_rows(qweight, bits)
    if perm.numel():
        values = values.index_select(0, perm)
    return pack_rows(values, bits, "shuffled")


def unshuffle(qweight: Tensor, perm: Tensor, bits: int) -> Tensor:
    """The inverse of `shuffle`, with the same arguments: shuffled order in, checkpoint order out."""
    values = unpack_rows(qweight, bits, "shuffled")
    if perm.numel():
        values = values.index_select(0, inverse_permutation(perm))
    return pack_rows(values, bits)
