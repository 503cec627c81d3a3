"""gptq_shuffle: checkpoint order to shuffled order, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_gptq_shuffle
from exllama_ops.ops import _library


def gptq_shuffle(qweight: Tensor, q_perm: Tensor, bit: int) -> None:
    """Sort the rows of a packed weight by ``q_perm`` and reorder its bits, in place: once per weight, at load.

    Row i of the result is row ``q_perm[i]`` of the checkpoint; docs/format.md shows the order of the bits.

    Args:
        qweight: (K * bit / 32, N) int32, contiguous, in checkpoint order. Overwritten.
        q_perm: (K,) int32, a permutation (``argsort(g_idx, stable=True)``), or empty for none, in memory of its own.
            On a CPU its values are checked. On a GPU a value outside of [0, K) stops the kernel, and a list with
            duplicates gives a meaningless weight.
        bit: 2, 3, 4 or 8.

    Raises:
        ValueError: a shape, dtype, device, stride or bit is wrong, q_perm shares memory with qweight, or on a CPU is
            no permutation. qweight is as it was.

    Source: `exllama_ops.reference.gptq_shuffle`.
    """
    torch.ops.exllama.gptq_shuffle(qweight, q_perm, bit)


def fake_gptq_shuffle(qweight: Tensor, q_perm: Tensor, bit: int) -> None:
    check_gptq_shuffle(qweight, q_perm, bit)


def count_the_write(keyset: Any, qweight: Tensor, q_perm: Tensor, bit: int) -> None:
    """Bump the version of qweight, by which autograd notices that a saved tensor was overwritten."""
    if qweight is not None:  # which the op itself refuses
        torch.autograd.graph.increment_version(qweight)
    torch.ops.exllama.gptq_shuffle.default.redispatch(
        keyset & torch._C._after_ADInplaceOrView_keyset, qweight, q_perm, bit
    )


_library.define_op("gptq_shuffle", "Tensor(a!) qweight, Tensor q_perm, int bit", "()", fake=fake_gptq_shuffle)
_library.no_gradient("gptq_shuffle")
_library.register_kernel("gptq_shuffle", "ADInplaceOrView", count_the_write, with_keyset=True)
