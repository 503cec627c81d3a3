"""The import rule of ARCHITECTURE.md, and what importing the package must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "exllama_ops"

# part of the package -> the parts it may import
PARTS: dict[str, set[str]] = {
    "layout": set(),
    "extras": set(),
    "cache": set(),
    "progress": set(),
    "huge_pages": set(),
    "reference": {"layout"},
    "ops": {"layout"},
    "backends": {"ops", "reference", "layout", "cache", "progress"},
    "prepare": {"layout", "huge_pages"},
    "checkpoint": {"layout", "extras", "progress", "huge_pages"},
    "kernel": {"prepare", "layout"},
    "nn": {"prepare", "layout", "ops", "backends", "huge_pages"},
    "compile": {"nn", "ops", "backends", "reference", "layout", "extras", "cache", "progress"},
    "integrations": {
        "compile",
        "nn",
        "kernel",
        "backends",
        "prepare",
        "checkpoint",
        "layout",
        "extras",
        "cache",
        "progress",
    },
    "cli": {"integrations", "checkpoint", "backends", "extras", "cache", "progress"},
    "testing": {"layout", "backends"},  # which nothing of the package imports
}
# optional dependency -> the parts that may import it
EXTRAS: dict[str, set[str]] = {
    "safetensors": {"checkpoint"},
    "huggingface_hub": {"checkpoint"},
    "tqdm": {"checkpoint", "integrations"},
    "transformers": {"integrations"},
    "accelerate": {"integrations"},
    "peft": {"integrations"},
    "gguf": {"integrations"},
    "vllm": {"integrations"},
    "filelock": {"compile", "integrations"},
    "triton": {"backends"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every module named by an import statement, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    for name in imported(path):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if root == "exllama_ops" and target in PARTS:
            assert target == part or target in PARTS[part], f"{part} must not import {name}"
        elif root == "exllama_ops" and part != "cli":  # cli is a user of the whole
            assert target == "__version__", f"{part} imports {name}: name the part it comes from"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_dependencies_stay_in_their_parts(path: Path) -> None:
    for name in imported(path):
        root = name.partition(".")[0]
        known = root in ("torch", "exllama_ops") or root in sys.stdlib_module_names
        assert known or part_of(path) in EXTRAS[root], f"{path} must not import {root}"


def test_importing_the_package_registers_the_ops_and_touches_nothing_else() -> None:
    code = """
import sys, warnings
warnings.simplefilter("error")
import torch, torch.utils.flop_counter  # which imports Triton, if there is one
before = set(sys.modules)
import exllama_ops
torch.ops.exllama.gptq_gemm.default
torch.ops.exllama.gptq_shuffle.default
assert not torch.cuda.is_initialized()
heavy = {"transformers", "safetensors", "huggingface_hub", "accelerate", "triton", "torch._dynamo", "torch._inductor"}
heavy |= {"peft", "vllm", "exllama_ops.testing"}
print(sorted(heavy & (set(sys.modules) - before)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
    assert result.stderr == ""


def test_every_lazy_name_exists() -> None:
    import exllama_ops

    for name in exllama_ops.__all__:
        assert getattr(getattr(exllama_ops, name), "__name__", name) == name  # a constant has none
    assert set(exllama_ops._LAZY) <= set(exllama_ops.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = exllama_ops.nothing


def test_the_emulator_knows_nothing_of_the_project() -> None:
    """tools/ptx_emulator is a tool of its own: it runs the CUDA code of anybody."""
    for path in (PACKAGE.parent / "tools" / "ptx_emulator").rglob("*.py"):
        for name in imported(path):
            assert name.partition(".")[0] not in ("exllama_ops", "cuda", "conformance", "benchmarks"), f"{path}: {name}"
