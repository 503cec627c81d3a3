"""What holds for every test: the ops are registered, and GPU tests skip with a counted reason without a GPU."""

from __future__ import annotations

import pytest
import torch

import exllama_ops  # noqa: F401  (registers torch.ops.exllama)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
