"""gptq_unshuffle: shuffled order back to checkpoint order."""

from __future__ import annotations

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_gptq_unshuffle
from exllama_ops.ops import _library, _vmap


def gptq_unshuffle(qweight: Tensor, q_perm: Tensor, bit: int) -> Tensor:
    """Undo `gptq_shuffle` with the same ``q_perm``: shuffled order in, checkpoint order out.

    Args:
        qweight: (K * bit / 32, N) int32, contiguous, in shuffled order.
        q_perm: (K,) int32, the permutation that the weight was shuffled with, or empty for none.
        bit: 2, 3, 4 or 8.

    Returns:
        A new tensor like qweight.

    Raises:
        ValueError: a shape, dtype, device, stride or bit is wrong, or on a CPU q_perm is no permutation.

    Source: `exllama_ops.reference.gptq_unshuffle`.
    """
    result: Tensor = torch.ops.exllama.gptq_unshuffle(qweight, q_perm, bit)
    return result


def fake_gptq_unshuffle(qweight: Tensor, q_perm: Tensor, bit: int) -> Tensor:
    check_gptq_unshuffle(qweight, q_perm, bit)
    return torch.empty_like(qweight)


_library.define_op("gptq_unshuffle", "Tensor qweight, Tensor q_perm, int bit", "Tensor", fake=fake_gptq_unshuffle)
_library.no_gradient("gptq_unshuffle")
_library.register_vmap("gptq_unshuffle", _vmap.one_by_one)
