"""A new bit width is in every table of the tests, or is refused by the name of the table that lacks it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run
from conformance import extremes, test_gemm, weights
from exllama_ops.layout.formats import FORMATS, SUPPORTED_BITS
from layout import slow_words
from reference import exact_arithmetic

ROOT = Path(__file__).parents[2]

# What tests know of a width by themselves, so that it does not come from the code under test.
TABLES: dict[str, Mapping[int, Any]] = {
    "BLOCK_VALUES of tests/conformance/weights.py": weights.BLOCK_VALUES,
    "COLUMNS of tests/conformance/extremes.py": extremes.COLUMNS,
    "SHAPES of tests/conformance/test_gemm.py": test_gemm.SHAPES,
    "SMALL_SHAPES of tests/conformance/test_gemm.py": test_gemm.SMALL_SHAPES,
    "OVERFLOWING of tests/conformance/test_gemm.py": test_gemm.OVERFLOWING,
    "BLOCK_VALUES of tests/layout/slow_words.py": slow_words.BLOCK_VALUES,
    "BLOCK_WORDS of tests/layout/slow_words.py": slow_words.BLOCK_WORDS,
    "BLOCK of tests/reference/exact_arithmetic.py": exact_arithmetic.BLOCK,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_tests_has_every_width(name: str) -> None:
    missing, unknown = FORMATS.keys() - TABLES[name].keys(), TABLES[name].keys() - FORMATS.keys()
    assert not missing, f"FORMATS has the widths {sorted(missing)}, which {name} lacks"
    assert not unknown, f"{name} has the widths {sorted(unknown)}, which FORMATS lacks"


def test_the_blocks_that_tests_know_are_those_of_the_formats() -> None:
    for name in ("BLOCK_VALUES of tests/conformance/weights.py", "BLOCK_VALUES of tests/layout/slow_words.py"):
        assert dict(TABLES[name]) == {bits: row.block_values for bits, row in FORMATS.items()}


def test_benchmarks_take_every_width() -> None:
    """The command line knows the widths before anything of the package may be imported."""
    assert run.WIDTHS == SUPPORTED_BITS


def test_no_test_lists_the_widths_itself() -> None:
    """Such a list would leave a new width out of the test, and nothing would say so."""
    pin = "tests/layout/test_pack_words.py"
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.List | ast.Tuple):
                values = tuple(item.value for item in node.elts if isinstance(item, ast.Constant))
                is_list = values == SUPPORTED_BITS and len(node.elts) == len(values)
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert not is_list or where.startswith(pin), f"{where}: take SUPPORTED_BITS of layout/formats.py"
