"""What `exllama_ops.testing.errors` declares for the Triton kernels, asked for by the weights of the tests."""

from __future__ import annotations

from torch import Tensor

from conformance.weights import Weight
from exllama_ops.backends.batch_invariant import is_batch_invariant
from exllama_ops.testing.errors import triton_dx_error, triton_gemm_error


def gemm_error(x: Tensor, weight: Weight, *, truncates: bool, tokens: int | None = None, experts: int = 1) -> float:
    """The relative error of gptq_gemm by the form that is chosen for x; ``truncates`` if it runs on tensor cores.

    Of gptq_moe_gemm, x are the rows of one expert, and ``tokens`` those of all ``experts``.
    """
    from exllama_ops.backends.triton import tiles
    from exllama_ops.layout.weight import Weight as Packed

    packed = Packed.of(*weight.args)
    M, device = max(1, x.shape[0] if tokens is None else tokens), tiles.device_of(x.device)
    plan = tiles.plan_gemm(M, packed, x.dtype, device, is_batch_invariant(), experts)
    return triton_gemm_error(plan, packed.bits, truncates=truncates).relative


def dx_error(N: int) -> float:
    """The relative error of gptq_gemm_dx."""
    return triton_dx_error(N).relative
