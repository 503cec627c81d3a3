"""The documents say what is: commands that CI runs, files that exist, no path of anybody's machine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/format.md",
    "benchmarks/README.md",
    "tests/data/README.md",
    "tools/ptx_emulator/README.md",
)


def shell_blocks(document: str) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    install, *tests = shell_blocks("README.md")[-1].strip().splitlines()
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert len(tests) == 2
    assert set(tests) <= set(ci)
    assert any(line.endswith(install.removeprefix("pip install ")) for line in ci)


def test_commands_that_may_install_torch_name_its_version() -> None:
    for document in DOCUMENTS:
        for block in shell_blocks(document):
            for line in block.splitlines():
                assert "pip install" not in line or "torch==2.13.0" in line, f"{document}: {line}"


def test_examples_that_are_no_doctests_are_python() -> None:
    """Those that need a GPU or a model; tests/gpu runs the former."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    examples = [block for block in blocks if not block.startswith(">>>")]
    assert len(examples) == 2
    for example in examples:
        compile(example, "README.md", "exec")


DOCTEST = """
>>> import torch
>>> class Model(torch.nn.Module):
...     def forward(self, x):
...         return len(x.shape) + x
>>> torch.compile(Model(), backend="eager")(torch.ones(1))
tensor([2.])
"""

# pytest's own hook formats what was raised, for which it parses Python: inside another parser that is an error.
RUN_DOCTEST = """
import gc, sys, pytest, torch
assert pytest.main(["-q", "-p", "no:unraisableexception", "--doctest-glob=*.md", "example.md"]) == 0
sys.unraisablehook = lambda raised: print("raised", repr(raised.exc_value))
torch._dynamo.reset()
gc.collect()
"""


def test_a_doctest_that_compiles_raises_nothing_when_it_is_collected(tmp_path: Path) -> None:
    (tmp_path / "example.md").write_text(DOCTEST)
    shutil.copy(ROOT / "conftest.py", tmp_path)
    command = [sys.executable, "-c", RUN_DOCTEST]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "raised" not in result.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or ((ROOT / document).parent / target).exists(), target


def test_the_tree_of_the_architecture_exists() -> None:
    tree = re.search(r"```\n(exllama_ops/\n.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    assert tree is not None
    named: set[Path] = set()
    top = ROOT
    for line in tree.group(1).splitlines():
        if match := re.match(r"(  )?(\w[\w./]*)", line):
            inside, name = match.groups()
            path = (top if inside else ROOT) / name
            top = top if inside else path
            named.add(path)
            assert path.exists(), line
    for base in ("exllama_ops", "csrc"):
        folders = {path for path in (ROOT / base).iterdir() if path.is_dir() and path.name != "__pycache__"}
        assert folders <= named


def test_every_results_file_has_its_command_in_the_readme_of_the_benchmarks() -> None:
    folder = ROOT / "benchmarks"
    commands = {line for block in shell_blocks("benchmarks/README.md") for line in block.splitlines()}
    for path in (folder / "results").glob("*.json"):
        assert json.loads(path.read_text())["command"] in commands, path


def test_no_tracked_file_knows_the_machine_it_was_written_on() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    machine = re.compile(r"(?<![\w.])/(work|home|root|tmp)/\w")
    for name in tracked.stdout.split("\0"):
        path = ROOT / name
        if path.is_file() and path.suffix in (".py", ".md", ".toml", ".json", ".cpp", ".h", ""):
            assert not machine.search(path.read_text()), name


def test_no_two_test_files_have_one_name() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names)), "pytest imports test files by their bare names"
