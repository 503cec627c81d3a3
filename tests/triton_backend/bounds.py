"""What `exllama_ops.testing.errors` declares for the Triton kernels, asked for by the weights of the tests."""

from __future__ import annotations

from torch import Tensor

from conformance.weights import Weight
from exllama_ops.backends.batch_invariant import is_batch_invariant
from exllama_ops.testing.errors import triton_dx_error, triton_gemm_error


def gemm_error(x: Tensor, weight: Weight, *, truncates: bool) -> float:
    """The relative error of gptq_gemm by the form that is chosen for x; ``truncates`` if it runs on tensor cores."""
    from exllama_ops.backends.triton import tiles
    from exllama_ops.layout.weight import Weight as Packed

    packed = Packed.of(*weight.args)
    plan = tiles.plan_gemm(max(1, x.shape[0]), packed, x.dtype, tiles.device_of(x.device), is_batch_invariant())
    return triton_gemm_error(plan, packed.bits, truncates=truncates).relative


def dx_error(N: int) -> float:
    """The relative error of gptq_gemm_dx."""
    return triton_dx_error(N).relative
