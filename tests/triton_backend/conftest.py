"""The emulated device. Triton is imported where a test asks for it, and not before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: Triton keeps a compiled kernel in the process, and the emulator asks for its file later."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, triton_cache: Path) -> Iterator[Any]:
    """An `EmulatedDriver`, on which kernels are launched; fresh memory is poisoned."""
    from exllama_ops.backends.triton import gemm, gemm_dx, moe_gemm, tiles
    from triton_backend.emulated import A100, emulated_device

    monkeypatch.setenv("TRITON_CACHE_DIR", str(triton_cache))
    for module in (tiles, gemm, gemm_dx, moe_gemm):
        monkeypatch.setattr(module, "device_of", lambda device: A100)
    torch.use_deterministic_algorithms(True)
    with emulated_device() as emulated:
        yield emulated
    torch.use_deterministic_algorithms(False)
