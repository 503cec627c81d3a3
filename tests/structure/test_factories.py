"""A caller's default device and default dtype change nothing: every tensor is made with a device and a dtype."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch.utils._device

PACKAGE = Path(__file__).parents[2] / "exllama_ops"

# What a default device changes, by torch's own list, and the constructors that take no device at all.
FACTORIES = {function.__name__ for function in torch.utils._device._device_constructors()} | {"fftfreq", "rfftfreq"}
LEGACY = {name for name in dir(torch) if name.endswith("Tensor") and name != "is_tensor"}


def faults(source: str) -> list[str]:
    """The calls of factories that leave something to the caller's defaults, as LINE: WHAT."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            found += [f"{node.lineno}: import {name.name}" for name in node.names if name.name in FACTORIES]
        elif isinstance(node, ast.Import):
            found += [f"{node.lineno}: torch as {a.asname}" for a in node.names if a.name == "torch" and a.asname]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in LEGACY:
            found.append(f"{node.lineno}: {node.func.id}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            call = ast.unparse(node.func)
            named = {keyword.arg for keyword in node.keywords}
            if call.startswith("torch.") and node.func.attr in LEGACY:
                found.append(f"{node.lineno}: {call}")
            if call.startswith("torch.") and node.func.attr in FACTORIES:
                found += [f"{node.lineno}: {call} without {name}" for name in ("device", "dtype") if name not in named]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_factory_call_names_its_device_and_dtype(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("torch.zeros(3, dtype=torch.int32)", "1: torch.zeros without device"),
        ("torch.full((1,), 8, device=d)", "1: torch.full without dtype"),
        ("torch.fft.fftfreq(3, dtype=d, device=d)", None),
        ("torch.fft.fftfreq(3, device=d)", "1: torch.fft.fftfreq without dtype"),
        ("torch.FloatTensor(3)", "1: torch.FloatTensor"),
        ("Tensor(3)", "1: Tensor"),
        ("from torch import Tensor, arange", "1: import arange"),
        ("import torch as t", "1: torch as t"),
        ("x.new_zeros(3); torch.zeros_like(x); tl.zeros((3,), tl.int32)", None),
        ("torch.tensor([1.0], dtype=d, device=None)", None),
    ],
)
def test_a_fault_is_found(source: str, fault: str | None) -> None:
    assert faults(source) == ([] if fault is None else [fault])
