from __future__ import annotations

from torch import Tensor

from exllama_ops.layout.checks import check_gptq_shuffle, check_index_values
from exllama_ops.layout.shuffle import shuffle

_PART_WORDS = 65536


def gptq_shuffle(qweight: Tensor, q_perm: Tensor, bit: int) -> None:
    """Reference of `torch.ops.exllama.gptq_shuffle`: checkpoint order to shuffled order, in place."""
    check_gptq_shuffle(qweight, q_perm, bit)
    check_index_values("gptq_shuffle", "q_perm", q_perm, qweight.shape[0] * 32 // bit, permutation=True)
    # Columns do not depend on each other. Loading shuffles every layer of a model, and temporaries of whole matrices
    # would scatter the heap between the weights that stay.
    for columns in qweight.split(max(1, _PART_WORDS // qweight.shape[0]), 1):
        columns.copy_(shuffle(columns, q_perm, bit))
