"""OpenVINO's grouped product of compressed weights (opset 17), by float32 or bfloat16 products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Takes x and the offsets of the experts, and returns what is timed.
Bind = Callable[[Tensor, Tensor], Callable[[], Any]]


def _prepare(precision: str, words: Sequence[Tensor], K: int, N: int, threads: int) -> Bind:
    """The grouped product of a stack: qweight, qzeros and scales, whose bytes are taken as they lie in memory."""
    import openvino as ov
    from openvino import opset13 as ops
    from openvino.opset17 import grouped_matmul

    qweight, qzeros, scales = words
    E, G = scales.shape[:2]

    def integers(tensor: Tensor, shape: list[int]) -> Any:
        values = ov.Tensor(tensor.contiguous().view(torch.uint8).numpy(), shape, ov.Type.u4)
        # A constant that shares memory would read it after it is freed.
        return ops.convert(ops.constant(values, shared_memory=False), ov.Type.f16)

    q, zeros = integers(qweight, [E, N, G, K // G]), integers(qzeros, [E, N, G, 1])
    factors = ops.constant(scales.half().view(E, N, G, 1).numpy(), shared_memory=False)
    W = ops.reshape(ops.multiply(ops.subtract(q, zeros), factors), [E, N, K], False)
    x, ends = ops.parameter([-1, K], ov.Type.f32), ops.parameter([E], ov.Type.i32)
    model = ov.Model([grouped_matmul(x, ops.convert(W, ov.Type.f32), ends)], [x, ends])
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": str(threads),
        "NUM_STREAMS": "1",
        "ENABLE_CPU_PINNING": "NO",
    }
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()

    def bind(x: Tensor, offsets: Tensor) -> Callable[[], Any]:
        inputs = [ov.Tensor(x.float().numpy()), ov.Tensor(offsets[1:].contiguous().numpy())]

        def run() -> Any:
            request.set_input_tensors(0, inputs[:1])
            request.set_input_tensors(1, inputs[1:])
            request.infer()
            return request.get_output_tensor()

        return run

    return bind


WAYS: dict[str, Callable[[Sequence[Tensor], int, int, int], Bind]] = {
    "OpenVINO fp32": partial(_prepare, "f32"),
    "OpenVINO bf16": partial(_prepare, "bf16"),
}
