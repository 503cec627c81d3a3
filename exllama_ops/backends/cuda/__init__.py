"""The native CUDA backend: csrc/cuda behind torch's stable ABI.

How the library is found, built and called is `exllama_ops.backends.native`'s. Nothing here touches a GPU when the
package is imported: NVML says which there are, and the driver which version of CUDA it knows. Where torch or the
machine has no CUDA, nothing is looked for and nvcc never runs.

A library need not serve every GPU: it may have no code for one, or be newer than the driver. If it serves none of them,
the next backend takes its place. If it serves some, or if NVML does not answer, each GPU's first call decides for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from exllama_ops.backends import batch_invariant
from exllama_ops.backends._types import NextBest
from exllama_ops.backends.cuda import gpus
from exllama_ops.backends.cuda.library import CudaLibrary
from exllama_ops.backends.native import NativeBackend, cache
from exllama_ops.backends.native.compile import ALL, CUDA, codes_for, find_compiler

__all__ = ["BACKEND", "CudaBackend", "CudaBackendWarning"]


class CudaBackendWarning(UserWarning):
    """The native CUDA kernels do not serve a GPU that is here."""


class CudaBackend(NativeBackend[CudaLibrary]):
    """Serves every op on CUDA tensors."""

    def __init__(self) -> None:
        super().__init__(CUDA, CudaLibrary)
        self._serves_every_gpu = False
        self._said: set[str] = set()

    def reasons_against_device(self) -> list[str]:
        if torch.version.cuda is None:
            return ["torch was installed without CUDA"]
        # By NVML where it answers, which leaves the driver as it is.
        return [] if torch.cuda.device_count() > 0 else ["there is no CUDA device"]

    def codes(self) -> tuple[str, ...]:
        """What the GPUs here need, or all of it where nobody says what they are."""
        return codes_for(CUDA, gpus.capabilities()) or ALL

    def reasons_against_compiler(self) -> list[str]:
        compiler = find_compiler(self.recipe)
        toolkit = None if compiler is None else gpus.toolkit_of(compiler)
        reason = None if toolkit is None else gpus.reason_against_driver(gpus.driver_version(), toolkit)
        return [reason] if reason else []

    def reasons_against_library(self, library: CudaLibrary) -> list[str]:
        reason = gpus.reason_against_driver(gpus.driver_version(), library.toolkit())
        if reason:
            return [reason]
        reasons = [_reason_against(library, capability) for capability in sorted(gpus.capabilities())]
        self._serves_every_gpu = bool(reasons) and not any(reasons)
        return [reason for reason in reasons if reason] if all(reasons) else []

    def serves_every_device(self) -> bool:
        return self._serves_every_gpu

    def for_devices(self, kernel: Callable[..., Any], next_best: NextBest) -> Callable[..., Any]:
        if self._serves_every_gpu:
            return kernel
        of_device: dict[torch.device, Callable[..., Any]] = {}

        def choose(device: torch.device) -> Callable[..., Any]:
            assert self.library is not None
            reason = _reason_against(self.library, torch.cuda.get_device_capability(device))
            if reason is None:
                return kernel
            self.say([reason])
            return next_best([reason])

        def compute(*args: Any) -> Any:
            if not isinstance(args[0], torch.Tensor):
                return kernel(*args)  # which refuses what is none
            device = args[0].device
            if device not in of_device:
                of_device[device] = choose(device)
            return of_device[device](*args)

        return compute

    def say(self, reasons: Sequence[str]) -> None:
        because = "; ".join(reasons)
        if because not in self._said:
            self._said.add(because)
            warnings.warn(
                f"exllama_ops: the native CUDA kernels do not serve every GPU here: {because}. The next backend "
                "computes there; exllama_ops.backends.report() has the order.",
                CudaBackendWarning,
                stacklevel=2,
            )

    def settings(self, library: CudaLibrary) -> str:
        return ", batch-invariant" if library.batch_invariant() else ""

    def prepare(self, library: CudaLibrary) -> None:
        batch_invariant.apply_to(library)


def _reason_against(library: CudaLibrary, capability: tuple[int, int]) -> str | None:
    return gpus.reason_against_gpu(capability, cache.codes_of(library.path), gpus.driver_version(), library.toolkit())


BACKEND = CudaBackend()
