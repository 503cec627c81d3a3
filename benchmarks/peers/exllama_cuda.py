"""Our kernels on a GPU: those of the native library, chosen or named one by one, and Triton's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Unsupported
from exllama_ops.backends import cuda, serving, triton

# What is left to select_gemm, and the algorithms that it chooses from.
AUTO = "auto"
ALGORITHMS = ("scalar", "mma", "pipelined", "tiled", "dense")
VARIABLE = "EXLLAMA_OPS_CUDA_ALGORITHM"
# The choice of select_gemm, with launches that overlap where they can.
OVERLAPPING, OVERLAP_VARIABLE = "overlapping", "EXLLAMA_OPS_CUDA_OVERLAP"


def gemm(weight: Weight, algorithm: str, dtype: torch.dtype) -> Layer:
    """A copy of the weight for gptq_gemm by an algorithm of the native library, by `AUTO`, or by `OVERLAPPING`.

    Raises:
        Unsupported: the native library does not serve the ops.
    """
    _need_native()

    def run(x: Tensor, *arguments: Any) -> Tensor:
        with named(algorithm):
            out: Tensor = torch.ops.exllama.gptq_gemm(x, *arguments)
        return out

    return _layer(weight, dtype, run)


def gemm_dx(weight: Weight, dtype: torch.dtype) -> Layer:
    """A copy of the weight for gptq_gemm_dx by the native library, whose x is the gradient (M, N).

    Raises:
        Unsupported: the native library does not serve the ops.
    """
    _need_native()
    return _layer(weight, dtype, torch.ops.exllama.gptq_gemm_dx)


def triton_gemm(weight: Weight, dtype: torch.dtype) -> Layer:
    """A copy of the weight for gptq_gemm by the Triton backend, which is called past the dispatcher.

    Raises:
        Unsupported: Triton cannot compile here.
    """
    return _layer(weight, dtype, _triton_ops().gptq_gemm)


def triton_gemm_dx(weight: Weight, dtype: torch.dtype) -> Layer:
    """A copy of the weight for gptq_gemm_dx by the Triton backend, whose x is the gradient (M, N).

    Raises:
        Unsupported: Triton cannot compile here.
    """
    return _layer(weight, dtype, _triton_ops().gptq_gemm_dx)


def reasons_against_native() -> list[str]:
    """Why the native library does not serve the ops; builds it if need be."""
    if serving("gptq_gemm", "CUDA") is not cuda.BACKEND:
        return cuda.BACKEND.failure or ["EXLLAMA_OPS_BACKEND names another backend"]
    cuda.BACKEND.build()
    return cuda.BACKEND.failure


def reasons_against_triton() -> list[str]:
    """Why the Triton backend cannot run; imports its kernels if need be."""
    reasons = triton.BACKEND.reasons_against("gptq_gemm", "CUDA")
    if not reasons:
        triton.BACKEND.load("CUDA")
    return reasons or triton.BACKEND.failure


def _need_native() -> None:
    if reasons := reasons_against_native():
        raise Unsupported(f"the native CUDA kernels do not run: {'; '.join(reasons)}")


def _triton_ops() -> Any:
    if reasons := reasons_against_triton():
        raise Unsupported(f"the Triton kernels do not run: {'; '.join(reasons)}")
    from exllama_ops.backends.triton import ops

    return ops


def _layer(weight: Weight, dtype: torch.dtype, op: Callable[..., Tensor]) -> Layer:
    arguments = weight.op_weight.map(Tensor.clone).arguments
    return Layer(
        take=lambda x: x.to(dtype), run=lambda x: op(x, *arguments), give=lambda out: out, nbytes=weight.nbytes
    )


@contextmanager
def named(algorithm: str) -> Iterator[None]:
    """Have the library use an algorithm, or choose one itself whatever the environment says."""
    before = {name: os.environ.pop(name) for name in (VARIABLE, OVERLAP_VARIABLE) if name in os.environ}
    if algorithm == OVERLAPPING:
        os.environ[OVERLAP_VARIABLE] = "1"
    elif algorithm != AUTO:
        os.environ[VARIABLE] = algorithm
    _read_environment()
    try:
        yield
    finally:
        for name in (VARIABLE, OVERLAP_VARIABLE):
            os.environ.pop(name, None)
        os.environ.update(before)
        _read_environment()


def _read_environment() -> None:
    if cuda.BACKEND.library is not None:
        cuda.BACKEND.library.read_environment()
