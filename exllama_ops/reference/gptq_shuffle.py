from __future__ import annotations

from torch import Tensor

from exllama_ops.layout.checks import check_gptq_shuffle
from exllama_ops.layout.shuffle import shuffle


def gptq_shuffle(qweight: Tensor, q_perm: Tensor, bit: int) -> None:
    """Reference of `torch.ops.exllama.gptq_shuffle`: checkpoint order to shuffled order, in place."""
    check_gptq_shuffle(qweight, q_perm, bit)
    qweight.copy_(shuffle(qweight, q_perm, bit))
