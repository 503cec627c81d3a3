"""The class of a peer by what it computes here, whatever its label says.

An option of a library that asks for int8 activations may do nothing on some CPUs, or for some weights. So every peer
multiplies a probe. Its small values lie beside outliers 300 times as large: floats keep them, while a group of bytes
with one scale rounds all of them to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.peer import Kind, Unsupported

# Above 2 * 127, at which the small values of an int8 group are half a step. Exact in float16 and bfloat16.
_OUTLIER = 300.0
# The smallest group that a library quantizes with one scale: each has an outlier.
_EVERY = 32
# Of the small values' products: bfloat16 loses an eighth to its rounding of the large ones, int8 all. More is wrong.
_LOST = 0.5
_WRONG = 2.0


def probe(M: int, K: int) -> Tensor:
    """(M, K) float16: ones of either sign, and in every 32 of them an outlier."""
    x = torch.randint(2, (M, K), generator=torch.Generator().manual_seed(3)).half() * 2 - 1
    x[:, ::_EVERY] *= _OUTLIER
    return x


def class_of(out: Tensor, x: Tensor, dense: Tensor) -> Kind:
    """How activations entered a product.

    Args:
        out: (M, N), what the peer made of the probe.
        x: (M, K), the probe.
        dense: (K, N) float32, the weight that the peer holds.

    Raises:
        Unsupported: it is the product of another weight.
    """
    small = x.clone()
    small[:, ::_EVERY] = 0
    lost = (out.float() - x.float() @ dense).norm() / (small.float() @ dense).norm()
    if not lost < _WRONG:
        raise Unsupported("computes something else than the product of its weight")
    return "int8" if lost > _LOST else "float"
