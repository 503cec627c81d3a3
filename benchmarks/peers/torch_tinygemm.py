"""torch.ops.aten._weight_int4pack_mm, the int4 kernel that torch has for CUDA ("tinygemm"), in bfloat16 alone."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Peer, Unsupported, needs

# Rows of W in a tile, as the tensor cores take them, and how many tiles may lie side by side.
_TILE_ROWS = 16
_INNER_TILES = (8, 4, 2)


def _prepare(weight: Weight, threads: int) -> Layer:
    needs(weight, bits=(4,))
    case = weight.case
    inner_tiles = next((tiles for tiles in _INNER_TILES if case.K % (tiles * _TILE_ROWS) == 0), None)
    if inner_tiles is None or case.N % 8:
        raise Unsupported(f"takes K in multiples of 32 and N of 8; this weight has K={case.K}, N={case.N}")
    q = weight.q.t()
    # Two values of a column in a byte, the first in the higher bits.
    pairs = (q[:, ::2] << 4 | q[:, 1::2]).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, inner_tiles)
    scales = weight.scales.float()
    # Its weight is (q - 8) * scale + zero.
    scales_and_zeros = torch.stack([scales, (8 - weight.zeros.float()) * scales], -1).bfloat16().contiguous()

    def run(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, case.group_size, scales_and_zeros)
        return out

    nbytes = packed.nbytes + scales_and_zeros.nbytes
    return Layer(take=lambda x: x.bfloat16(), run=run, give=lambda out: out, nbytes=nbytes)


PEERS = (Peer("torch tinygemm bf16", _prepare, packages=("torch",)),)
