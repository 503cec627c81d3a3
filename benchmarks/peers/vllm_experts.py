"""vLLM's fused experts on CPUs, by the signatures of vLLM 0.32: one op for gate, up, silu, down and the weighted sum.

Both multiply with AMX. Experts of 4 bits take activations that are rounded to 8 bits. Dense ones are bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.peers.peer import Unsupported

if TYPE_CHECKING:
    from benchmarks.expert_layers import Experts

# Takes x (tokens, hidden), ids (tokens, k) int32 and weights (tokens, k) float32.
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def int4(experts: Experts) -> Run:
    """The same integers, scales and zero points."""
    from vllm import _custom_ops as ops

    _needs_amx()

    def packed(stack: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        qweight, qzeros, scales = stack
        words, zeros, scales = ops.convert_weight_packed_scale_zp(
            qweight,
            qzeros - 0x11111111,
            scales,
            ops.CPUQuantAlgo.GPTQ,  # it adds the 1 of v1
        )
        return words, zeros, scales

    into, into_zeros, into_scales = packed(experts.gate_up)
    down, down_zeros, down_scales = packed(experts.down)

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(x)
        ops.fused_experts_cpu(
            out,
            hidden_states=x,
            w1=into,
            w2=down,
            topk_weights=weights,
            topk_ids=ids,
            moe_comp_method=ops.CPUQuantMethod.INT4_W4A8,
            w1_scale=into_scales,
            w2_scale=down_scales,
            w1_zero=into_zeros,
            w2_zero=down_zeros,
            block_size=None,
        )
        return out

    return run


def dense(experts: Experts) -> Run:
    """Dequantized."""
    from vllm import _custom_ops as ops

    _needs_amx()

    def packed(stack: tuple[Tensor, ...]) -> Tensor:
        dense = torch.stack([experts.dense(stack, expert).T.bfloat16() for expert in range(stack[0].shape[0])])
        words: Tensor = ops.cpu_prepack_moe_weight(dense, "amx")
        return words

    into, down = packed(experts.gate_up), packed(experts.down)

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(x)
        ops.cpu_fused_moe(
            out,
            input=x,
            w13=into,
            w2=down,
            w13_bias=None,
            w2_bias=None,
            topk_weights=weights,
            topk_ids=ids,
            act="silu",
            isa="amx",
        )
        return out

    return run


def _needs_amx() -> None:
    if not torch.cpu._is_amx_tile_supported():
        raise Unsupported("is for CPUs with AMX")


WAYS: dict[str, Callable[[Experts], Run]] = {"vLLM int4": int4, "vLLM bf16": dense}
