from __future__ import annotations

from torch import Tensor

from exllama_ops.layout.checks import check_gptq_shuffle
from exllama_ops.layout.shuffle import unshuffle


def gptq_unshuffle(qweight: Tensor, q_perm: Tensor, bit: int) -> Tensor:
    """Reference of `torch.ops.exllama.gptq_unshuffle`: shuffled order to checkpoint order, in new memory."""
    check_gptq_shuffle(qweight, q_perm, bit, op="gptq_unshuffle")
    return unshuffle(qweight, q_perm, bit)
