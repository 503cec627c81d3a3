"""The ops that are held to the reference, by the backends that can be had without a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import exllama_ops
from conformance.backends import CPU_ISAS, BackendUnderTest
from cuda import emulated
from exllama_ops import backends
from properties.calls import FAULTS_OF_FORM, FAULTS_OF_MEMORY, MODERATE_SCALES, MODERATE_X, Call


@dataclass
class Subject:
    """Some ops.

    Args:
        isas: the instruction sets to call them on, best first; "" where there is no choice.
        options: of `properties.calls.calls`, for what they take.
        counts: of their calls so far, by op, instruction set and outcome.
    """

    backend: BackendUnderTest
    isas: tuple[str, ...] = ("",)
    options: dict[str, Any] = field(default_factory=dict)
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    @property
    def is_native_cpu(self) -> bool:
        return self.backend.precision is not None

    def use_isa(self, isa: str) -> None:
        """Let the native library use an instruction set from now on."""
        library = backends.cpu.BACKEND.library
        if self.is_native_cpu and library is not None:
            library.use_isa(isa)

    def backend_for(self, call: Call) -> BackendUnderTest:
        """The backend as it is set to compute a call."""
        if not self.is_native_cpu:
            return self.backend
        exllama_ops.set_cpu_matmul_precision(call.precision)
        return replace(self.backend, precision=call.precision)


@dataclass(frozen=True)
class _Backend(BackendUnderTest):
    """A backend that is known, which to ask for costs as much as a call."""

    served: str = ""

    @property
    def served_by(self) -> set[str]:
        return {self.served}


def _without(kind: str, kinds: Sequence[str]) -> tuple[str, ...]:
    return tuple(other for other in kinds if other != kind)


# Products that stay in the range of float32, and no index that only reading it proves wrong.
_AS_A_GPU: dict[str, Any] = {
    "faults": FAULTS_OF_FORM + FAULTS_OF_MEMORY,
    "x_values": MODERATE_X,
    "scale_values": MODERATE_SCALES,
    "size": 160,
}


def registered() -> Subject:
    """torch.ops.exllama on CPU tensors: the native library on every instruction set there is, or what else serves."""
    serving = backends.serving("gptq_gemm", "CPU")
    backend = _Backend("ops-cpu", torch.ops.exllama, "cpu", served=serving.name)
    if serving is backends.cpu.BACKEND:
        serving.build()
        assert serving.library is not None, serving.failure
        has = serving.library.isas()
        return Subject(replace(backend, precision="highest"), tuple(isa for isa in CPU_ISAS if has.get(isa)))
    if backend.never_overflows:
        return Subject(backend)
    options = dict(_AS_A_GPU)
    if backend.flushes_bfloat16:
        options |= {values: _without("subnormals", options[values]) for values in ("x_values", "scale_values")}
    return Subject(backend, options=options)


def emulated_cuda() -> Subject:
    """The CUDA library on an emulated device, which takes CPU tensors; its ops have no fakes and no autograd."""
    of_its_own = {
        "faults": _without("device", FAULTS_OF_FORM + FAULTS_OF_MEMORY),
        "contexts": ("plain", "no_grad", "inference_mode"),
    }
    backend = _Backend("cuda-emulated", emulated.ops(80), "cpu", served="cuda")
    return Subject(backend, options={**_AS_A_GPU, **of_its_own})
