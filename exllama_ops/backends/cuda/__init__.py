"""The native CUDA backend: csrc/cuda behind torch's stable ABI.

How the library is found, built and called is `exllama_ops.backends.native`'s. Nothing here asks the CUDA driver when
the package is imported. Where torch or the machine has no CUDA, nothing is looked for and nvcc never runs.
"""

from __future__ import annotations

import torch

from exllama_ops.backends import batch_invariant
from exllama_ops.backends.cuda import gpus
from exllama_ops.backends.cuda.library import CudaLibrary
from exllama_ops.backends.native import NativeBackend
from exllama_ops.backends.native.compile import ALL, CUDA, codes_for

__all__ = ["BACKEND", "CudaBackend"]


class CudaBackend(NativeBackend[CudaLibrary]):
    """Serves every op on CUDA tensors."""

    def __init__(self) -> None:
        super().__init__(CUDA, CudaLibrary)

    def reasons_against_device(self) -> list[str]:
        if torch.version.cuda is None:
            return ["torch was installed without CUDA"]
        # By NVML where it answers, which leaves the driver as it is.
        return [] if torch.cuda.device_count() > 0 else ["there is no CUDA device"]

    def codes(self) -> tuple[str, ...]:
        """What the GPUs here need, or all of it where nobody says what they are."""
        return codes_for(CUDA, gpus.capabilities()) or ALL

    def settings(self, library: CudaLibrary) -> str:
        return ", batch-invariant" if library.batch_invariant() else ""

    def prepare(self, library: CudaLibrary) -> None:
        batch_invariant.apply_to(library)


BACKEND = CudaBackend()
