"""The backends under test, and memory that is poisoned before use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from conformance.backends import BackendUnderTest
from exllama_ops import reference


@pytest.fixture(
    params=[
        pytest.param(("reference", "cpu"), id="reference"),
        pytest.param(("ops", "cpu"), id="ops-cpu"),
        pytest.param(("ops", "cuda"), id="ops-cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> BackendUnderTest:
    source, device = request.param
    return BackendUnderTest(f"{source}-{device}", reference if source == "reference" else torch.ops.exllama, device)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN and the largest integers, so that a read of unwritten memory shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
