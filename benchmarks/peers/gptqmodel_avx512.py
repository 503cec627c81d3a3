"""GPTQModel's CPU kernel (torch_cpu_avx512), in bfloat16, compiled from the sources of its installed distribution.

Its Python package is not imported: that pulls in all of its requirements. What it does there is done here: its flags,
its packing op, float32 scales.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Peer, needs

_NAME = "gptqmodel_int4_qzero_group_scaled_cpu"
_FLAGS = "-O3 -fopenmp -mfma -mf16c -mavx512f -mavx512bf16 -mavx512vl -mavx512dq -mavx512bw -mavx512vbmi"


@cache
def _ops() -> Any:
    from torch.utils import cpp_extension

    package = importlib.util.find_spec("gptqmodel_ext")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'gptqmodel_ext'")
    folder = Path(package.origin).parent / "int4_qzero_group_scaled_cpu"
    cpp_extension.load(
        name=_NAME,
        sources=[str(path) for path in sorted(folder.glob("*.cpp"))],
        extra_cflags=[*_FLAGS.split(), "-std=c++20"],
        extra_ldflags=["-fopenmp"],
        extra_include_paths=[str(folder)],
        is_python_module=False,
    )
    return getattr(torch.ops, _NAME)


def _prepare(weight: Weight, threads: int) -> Layer:
    case = weight.case
    needs(weight, bits=(4,))
    ops = _ops()
    no_order = torch.empty(0, dtype=torch.int32)
    checkpoint = weight.checkpoint
    packed, zeros = ops.pack_gptq_int4(checkpoint.qweight, checkpoint.qzeros, no_order, case.N, case.K)
    scales = weight.scales.float()
    multiply = ops.gemm_int4_qzero_group_scaled_cpu_forward

    def run(x: Tensor) -> Any:
        return multiply(x, packed, zeros, scales, case.group_size, None)

    nbytes = packed.nbytes + zeros.nbytes + scales.nbytes
    return Layer(take=lambda x: x.bfloat16(), run=run, give=lambda out: torch.as_tensor(out), nbytes=nbytes)


PEERS = (Peer("GPTQModel avx512 bf16", _prepare, packages=("gptqmodel",)),)
