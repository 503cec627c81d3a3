"""The CUDA library on an emulated device: its ops serve CPU tensors, in an operator namespace for each architecture."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from exllama_ops.ops import _library
from ptx_emulator.emulator import DEVICES, Emulator, build
from ptx_emulator.toolchain import WARNINGS

CSRC = Path(__file__).parents[2] / "csrc"
TORCH = Path(torch.__file__).parent


@functools.cache
def library(arch: int) -> Path:
    """csrc/cuda and its bindings, compiled for an architecture; cached on disk."""
    bindings = [CSRC / "bindings" / "cuda.cpp", CSRC / "bindings" / "checks.cpp"]
    return _build(arch, bindings, link=("-L", str(TORCH / "lib"), "-ltorch_cpu"))


@functools.cache
def plain_library(arch: int, sanitize: str | None = None) -> Path:
    """csrc/cuda and plain_calls.cpp, which need no torch."""
    return _build(arch, [Path(__file__).parent / "plain_calls.cpp"], sanitize=sanitize)


def _build(arch: int, bindings: list[Path], *, link: tuple[str, ...] = (), sanitize: str | None = None) -> Path:
    # The kernels are compiled with the options of both libraries, of which they need none: nvcc then runs once.
    return build(
        sorted((CSRC / "cuda").glob("*.cu")),
        arch=arch,
        bindings=bindings,
        include_dirs=[CSRC],
        system_include_dirs=[TORCH / "include"],
        defines=["EXLLAMA_CUDA_ON_CPU", "TORCH_TARGET_VERSION=0x020a000000000000"],
        nvcc_flags=["-Xcompiler", ",".join(WARNINGS)],
        link=link,
        sanitize=sanitize,
    )


# (rows, columns) of each product by the matmul with a wider result.
float32_products: list[tuple[int, int]] = []


@functools.cache
def _aten_for_cpu() -> torch.library.Library:
    """The matmul with a wider result, which gemm_dense calls and aten has for CUDA alone."""

    def multiply(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        assert out_dtype == torch.float32, "the result is rounded once, from float32"
        float32_products.append((len(a), b.shape[1]))
        return a.float() @ b.float()

    aten = torch.library.Library("aten", "IMPL")
    aten.impl("mm.dtype", multiply, "CPU")
    return aten


class EmulatedOps:
    """The ops of an emulated device, each call checked for faults.

    Attributes:
        device: its emulator.
        calls: what the last op asked of the CUDA runtime.
        unchecked: the ops without a record of their own.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.device = Emulator(library(arch), DEVICES[arch])
        self.calls: list[dict[str, Any]] = []
        _aten_for_cpu()
        namespace = f"exllama_sm_{arch}"
        self._schemas = torch.library.Library(namespace, "DEF")
        for schema in _library.schemas().values():
            self._schemas.define(schema)
        register = self.device.library.exllama_cuda_register
        register.restype = ctypes.c_char_p
        error = register(namespace.encode(), None)
        assert error is None, error
        self.unchecked = getattr(torch.ops, namespace)

    def set_batch_invariant(self, enabled: bool) -> None:
        """The library's setting, as `exllama_ops.set_batch_invariant` sets it."""
        self.device.library.exllama_cuda_set_batch_invariant(ctypes.c_bool(enabled))

    def read_environment(self) -> None:
        """Have the library read its variables, as it does when it is loaded: a test sets them afterwards."""
        self.device.library.exllama_cuda_read_environment()

    def __getattr__(self, name: str) -> Any:
        op = getattr(self.unchecked, name)

        def call(*args: Any) -> Any:
            self.read_environment()
            with self.device.record() as recording:
                result = op(*args)
            self.calls = recording.calls
            return result

        return call


@functools.cache
def ops(arch: int) -> EmulatedOps:
    """One device per architecture and process: its library cannot be unloaded."""
    return EmulatedOps(arch)
