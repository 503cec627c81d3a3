"""Doctests keep their namespace, in which Dynamo's clean-up hooks look for names when a compiled function is collected.

In a namespace that was cleared they raise a KeyError out of the garbage collector, wherever it happens to run.
"""

from __future__ import annotations

import functools

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.runner.run = functools.partial(item.runner.run, clear_globs=False)
