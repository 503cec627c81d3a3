"""What holds for every test: the ops are registered, and GPU tests skip with a counted reason without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

import exllama_ops  # noqa: F401  (registers torch.ops.exllama)

# Workers of pytest-xdist share the cores: as many threads each as there are cores waits more than it computes.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
