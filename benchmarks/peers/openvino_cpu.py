"""OpenVINO's compressed MatMul, with float32 products or activations quantized to int8 in groups of 128."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Peer, needs


def _model(weight: Weight) -> Any:
    """x (M, K) -> x @ W: the pattern that the CPU plugin keeps compressed."""
    import openvino as ov
    from openvino import opset13 as ops

    case = weight.case
    integer = ov.Type.u4 if case.bits == 4 else ov.Type.u8

    def integers(values: Tensor) -> Any:
        shape = list(values.shape)
        if case.bits == 4:
            pairs = values.contiguous().flatten().unflatten(0, (-1, 2))
            values = pairs[:, 0] | pairs[:, 1] << 4
        tensor = ov.Tensor(values.contiguous().numpy(), shape, integer)
        # A constant that shares memory would read it after it is freed.
        return ops.convert(ops.constant(tensor, shared_memory=False), ov.Type.f16)

    q = integers(weight.q.t().reshape(case.N, -1, case.group_size))
    # A zero point of another type than the weight switches the int8 products off without a word.
    zeros = integers(weight.zeros.t().unsqueeze(-1))
    scales = ops.constant(weight.scales.t().contiguous().unsqueeze(-1).numpy())
    grouped = ops.multiply(ops.subtract(q, zeros), scales)
    W = ops.convert(ops.reshape(grouped, [case.N, case.K], False), ov.Type.f32)
    x = ops.parameter([-1, case.K], ov.Type.f32)
    return ov.Model([ops.matmul(x, W, False, True)], [x])


def _prepare(dynamic_group_size: int, weight: Weight, threads: int) -> Layer:
    import openvino as ov

    needs(weight, bits=(4, 8))
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(dynamic_group_size),
        "INFERENCE_NUM_THREADS": str(threads),
        "NUM_STREAMS": "1",
        "ENABLE_CPU_PINNING": "NO",
    }
    request = ov.Core().compile_model(_model(weight), "CPU", options).create_infer_request()

    def take(x: Tensor) -> Any:
        return ov.Tensor(x.float().numpy())

    def run(x: Any) -> Any:
        request.set_input_tensor(x)
        request.infer()
        return request.get_output_tensor()

    def give(out: Any) -> Tensor:
        return torch.from_numpy(out.data.copy())

    return Layer(take, run, give, nbytes=weight.nbytes)


PEERS = (
    Peer("OpenVINO fp32", partial(_prepare, 0), held=("avx512", "avx2"), packages=("openvino",)),
    # Held to AVX2, this one returns a tensor without elements.
    Peer("OpenVINO int8 g128", partial(_prepare, 128), held=("avx512",), packages=("openvino",)),
)
