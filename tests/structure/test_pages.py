"""Pages say what is: docs/ops.md all public names, docs/settings.md all variables, docs/performance.md the results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import exllama_ops
from benchmarks import speeds
from exllama_ops.integrations.slot import GptqSlot
from exllama_ops.kernel import ExllamaLinearKernel
from exllama_ops.nn import ExllamaLinear
from exllama_ops.nn.packed_module import PackedModule
from exllama_ops.ops import _library

ROOT = Path(__file__).parents[2]
SOURCES = ("exllama_ops", "csrc", "benchmarks", "_build_backend", "tests", "tools")
VARIABLE = re.compile(r"EXLLAMA_OPS_[A-Z_]*[A-Z]")


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text()


def test_the_page_of_the_ops_has_every_public_name() -> None:
    page = text_of("ops.md")
    for name in exllama_ops.__all__:
        assert re.search(rf"`{name}\b", page), name


def test_the_page_of_the_ops_has_the_schemas() -> None:
    block = re.search(r"```\n(gptq_gemm\(.*?)```", text_of("ops.md"), re.DOTALL)
    assert block is not None
    schemas = [schema for name, schema in _library.schemas().items() if name == _library.op_of(name)]
    assert sorted(block.group(1).splitlines()) == sorted(schemas)


def test_the_page_of_the_ops_has_every_argument() -> None:
    listed = set(re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|.*\|$", text_of("ops.md"), re.MULTILINE))
    names = {name for pair in listed for name in pair}
    for name, schema in _library.schemas().items():
        for argument in re.findall(r"(\w+)(?:=\w+)?[,)]", schema.partition("(")[2].partition(" -> ")[0]):
            assert argument in names or argument == "a", f"{name}: {argument}"


@pytest.mark.parametrize("module", [ExllamaLinear, PackedModule, ExllamaLinearKernel, GptqSlot])
def test_the_page_of_the_ops_has_every_member_of_the_modules(module: type) -> None:
    page = text_of("ops.md")
    inherited_or_told_elsewhere = {"forward", "extra_repr", "SUPPORTED_QUANT_TYPES", "get_min_capability"}
    classes = [one for one in module.__mro__ if one.__module__.startswith("exllama_ops.")]
    for name in [name for one in classes for name in vars(one)]:
        if not name.startswith("_") and name not in inherited_or_told_elsewhere:
            assert f"`{name}" in page, name


def test_the_page_of_the_settings_has_every_variable() -> None:
    used: set[str] = set()
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                used |= set(VARIABLE.findall(path.read_text()))
    listed = set(re.findall(r"^\| `(EXLLAMA_OPS_[A-Z_]+)` \|", text_of("settings.md"), re.MULTILINE))
    assert listed == used


def test_the_page_of_the_settings_has_every_setter() -> None:
    setters = {name for name in exllama_ops.__all__ if name.startswith("set_")}
    assert setters == set(re.findall(r"\| `(set_\w+)` \|", text_of("settings.md")))


@pytest.mark.parametrize("setter", ["set_cpu_matmul_precision", "set_batch_invariant"])
def test_the_docstring_of_a_setter_names_its_variable(setter: str) -> None:
    (variable,) = re.findall(rf"^\| `(\w+)` \|.*`{setter}` \|", text_of("settings.md"), re.MULTILINE)
    assert variable in (getattr(exllama_ops, setter).__doc__ or "")


@pytest.mark.parametrize("page", speeds.PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert text.count("<!-- table: ") > 0
    assert speeds.filled(text) == text, "run `python -m benchmarks.speeds`"
