"""What holds for every folder of tests and for the doctests of documents.

Tests that are marked slow are run by ``pytest --slow`` alone.

Doctests keep their namespace, in which Dynamo's clean-up hooks look for names when a compiled function is collected.
In a namespace that was cleared they raise a KeyError out of the garbage collector, wherever it happens to run.
"""

from __future__ import annotations

import functools

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that are marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.runner.run = functools.partial(item.runner.run, clear_globs=False)
