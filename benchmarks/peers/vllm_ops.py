"""vLLM's GPTQ kernels in float16: the original ExLlama ops, Marlin, and Machete, which is for compute capability 9.0.

By the signatures of vLLM 0.32: without an activation order, which it no longer has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Peer, needs


def _prepare_exllama(weight: Weight, threads: int) -> Layer:
    from vllm import _custom_ops as ops

    needs(weight, bits=(2, 3, 4, 8))
    bits, checkpoint = weight.case.bits, weight.checkpoint
    qweight, qzeros, scales = checkpoint.qweight.clone(), checkpoint.qzeros.clone(), checkpoint.scales.clone()
    ops.gptq_shuffle(qweight, bits)

    def run(x: Tensor) -> Tensor:
        out: Tensor = ops.gptq_gemm(
            a=x,
            b_q_weight=qweight,
            b_gptq_qzeros=qzeros,
            b_gptq_scales=scales,
            use_exllama=True,
            use_v2_format=True,
            bit=bits,
        )
        return out

    return Layer(take=lambda x: x.half(), run=run, give=lambda out: out, nbytes=weight.nbytes)


def _prepare_marlin(weight: Weight, threads: int) -> Layer:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    # It has zero points for 4 bits alone; 8 bits are symmetric.
    needs(weight, bits=(4, 8))
    case = weight.case
    qweight = ops.gptq_marlin_repack(
        b_q_weight=weight.checkpoint.qweight, size_k=case.K, size_n=case.N, num_bits=case.bits
    )
    scales = marlin_utils.marlin_permute_scales(weight.scales, size_k=case.K, size_n=case.N, group_size=case.group_size)
    zeros, kind = None, scalar_types.uint8b128
    if case.bits == 4:
        groups, kind = weight.scales.shape[0], scalar_types.uint4
        zeros = marlin_utils.marlin_zero_points(weight.zeros.int(), size_k=groups, size_n=case.N, num_bits=case.bits)
    workspace = marlin_utils.marlin_make_workspace_new(qweight.device)

    def run(x: Tensor) -> Tensor:
        out: Tensor = ops.marlin_gemm(
            a=x,
            c=None,
            b_q_weight=qweight,
            b_bias=None,
            b_scales=scales,
            a_scales=None,
            global_scale=None,
            b_zeros=zeros,
            workspace=workspace,
            b_q_type=kind,
            size_m=x.shape[0],
            size_n=case.N,
            size_k=case.K,
            use_fp32_reduce=True,
        )
        return out

    return Layer(
        take=lambda x: x.half(),
        run=run,
        give=lambda out: out,
        nbytes=sum(part.nbytes for part in (qweight, scales, zeros) if isinstance(part, torch.Tensor)),
        dense=weight.symmetric if zeros is None else None,
    )


def _prepare_machete(weight: Weight, threads: int) -> Layer:
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    needs(weight, bits=(4, 8))
    case, scales = weight.case, weight.scales.clone()
    kind = {4: scalar_types.uint4, 8: scalar_types.uint8}[case.bits]
    # It takes words whose columns are contiguous, and adds zeros that are multiplied by their scales before.
    words = ops.machete_prepack_B(
        weight.checkpoint.qweight.t().contiguous().t(),
        a_type=torch.float16,
        b_type=kind,
        group_scales_type=torch.float16,
    )
    zeros = -scales * weight.zeros.half()

    def run(x: Tensor) -> Tensor:
        out: Tensor = ops.machete_mm(
            a=x,
            b_q=words,
            b_type=kind,
            b_group_scales=scales,
            b_group_zeros=zeros,
            b_group_size=case.group_size,
        )
        return out

    nbytes = words.nbytes + scales.nbytes + zeros.nbytes
    return Layer(take=lambda x: x.half(), run=run, give=lambda out: out, nbytes=nbytes)


PEERS = (
    Peer("vLLM gptq_gemm fp16", _prepare_exllama, packages=("vllm",)),
    Peer("vLLM Marlin fp16", _prepare_marlin, packages=("vllm",)),
    Peer("vLLM Machete fp16", _prepare_machete, packages=("vllm",)),
)
