"""A bit width that csrc/layout knows and csrc/cuda does not: the compiler refuses it, and names what is missing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from exllama_ops.backends.native.compile import CUDA, find_compiler

ROOT = Path(__file__).parents[2]
COMPILER = find_compiler(CUDA)

# Every kernel unpacks its words by one of these.
UNPACKING = {
    "value_of in words.cuh": "template __device__ uint32_t value_of<6, false>(const uint32_t*, int);",
    "PlacedFields in words.cuh": "template struct PlacedFields<6, false>;",
    "MmaLane in mma_operands.cuh": "template struct Pairs<6, __half>;",
}


@pytest.mark.skipif(COMPILER is None, reason="needs nvcc")
def test_a_width_without_unpacking_does_not_compile(tmp_path: Path) -> None:
    assert COMPILER is not None
    source = tmp_path / "width.cu"
    source.write_text(
        '#include "cuda/mma_operands.cuh"\nnamespace exllama::cuda {\n' + "\n".join(UNPACKING.values()) + "\n}\n"
    )
    command = [*COMPILER.command, "-std=c++17", "-arch=compute_80", "-ptx", "-I", str(ROOT / "csrc"), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode != 0
    for place in UNPACKING:
        assert f"of this bit width: add them to {place}" in result.stderr, place
