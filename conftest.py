"""What holds for every folder of tests, and for the examples of documents.

Tests that are marked slow are run by ``pytest --slow`` alone. The Python examples of README.md and docs/ are run as
tests, a page at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import examples

ROOT = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that are marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


class Page(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        if any(examples.examples(self.path)):
            yield PageItem.from_parent(self, name="examples")


class PageItem(pytest.Item):
    def runtest(self) -> None:
        examples.run_page(self.path)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path == ROOT / "README.md" or (file_path.suffix == ".md" and file_path.is_relative_to(ROOT / "docs")):
        return Page.from_parent(parent, path=file_path)
    return None
