from __future__ import annotations

from torch import Tensor

from exllama_ops.layout.checks import check_gptq_unshuffle, check_index_values
from exllama_ops.layout.shuffle import unshuffle


def gptq_unshuffle(qweight: Tensor, q_perm: Tensor, bit: int) -> Tensor:
    """Reference of `torch.ops.exllama.gptq_unshuffle`: shuffled order to checkpoint order, in new memory."""
    check_gptq_unshuffle(qweight, q_perm, bit)
    check_index_values("gptq_unshuffle", "q_perm", q_perm, qweight.shape[0] * 32 // bit, permutation=True)
    return unshuffle(qweight, q_perm, bit)
