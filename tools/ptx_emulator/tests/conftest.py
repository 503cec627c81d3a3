"""Emulation tests skip, with the reason counted, where there is no nvcc, no g++ or another processor."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptx_emulator.emulator import reasons_against


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not (reasons := reasons_against()):
        return
    skip = pytest.mark.skip(reason=f"cannot emulate CUDA: {'; '.join(reasons)}")
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(skip)
