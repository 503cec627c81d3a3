"""tests/README.md says of every source file which tests guard it, and nothing that it names is missing."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = (".py", ".cpp", ".cu", ".h", ".cuh")
FOLDERS = ("exllama_ops", "csrc", "benchmarks", "tools", "_build_backend")


def files() -> list[str]:
    """The files of the tree, those that are not committed yet too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def table() -> list[tuple[list[str], list[str]]]:
    """Patterns of source files, and the tests that guard them."""
    _, _, section = (ROOT / "tests" / "README.md").read_text().partition("## Which tests guard which file")
    rows = re.findall(r"^\| (`.*) \| (.*) \|$", section, re.MULTILINE)
    return [(re.findall("`(.*?)`", sources), re.findall("`(.*?)`", tests)) for sources, tests in rows]


def is_test(name: str) -> bool:
    return name.startswith(("tests/", "tools/ptx_emulator/tests/"))


def sources() -> list[str]:
    return [
        name
        for name in files()
        if name.endswith(SOURCE) and not is_test(name) and (name.split("/")[0] in FOLDERS or "/" not in name)
    ]


def test_every_source_file_has_tests_that_guard_it() -> None:
    patterns = [pattern for patterns, tests in table() for pattern in patterns if tests]
    unguarded = [name for name in sources() if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    assert not unguarded, f"tests/README.md says of no test that guards {unguarded}"


def test_every_row_names_source_files_and_tests_that_exist() -> None:
    names = sources()
    assert len(table()) > 20
    for patterns, tests in table():
        for pattern in patterns:
            assert fnmatch.filter(names, pattern), f"no source file is {pattern}"
        assert tests, f"no tests guard {patterns}"
        for test in tests:
            assert (ROOT / test).exists(), f"{test}, which guards {patterns}, is not there"


def test_every_test_file_guards_something() -> None:
    guards = [test for _, tests in table() for test in tests]
    test_files = [name for name in files() if is_test(name) and Path(name).name.startswith("test_")]
    python = [name for name in test_files if name.endswith(".py")]
    assert python
    idle = [name for name in python if not any(name == guard or name.startswith(f"{guard}/") for guard in guards)]
    assert not idle, f"tests/README.md has no row for {idle}"
