"""The fragments of mma.sync against the layouts of CuTe, which are NVIDIA's: ``pip install --no-deps nvidia-cutlass``.

Triton's PTX, the other source that is not ours (test_triton.py), has no m16n8k8.
"""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ptx_emulator.emulator import Emulator, build
from ptx_emulator.tests.test_warp import SOURCE, as_bf16, lanes
from ptx_emulator.toolchain import cuda_include

Layouts = dict[tuple[str, str], np.ndarray]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """(32 threads, values) for the name and the operand of each instruction."""
    found = importlib.util.find_spec("cutlass_library")
    if found is None or found.origin is None:
        pytest.skip("needs the headers of CuTe: pip install --no-deps nvidia-cutlass")
    program = tmp_path_factory.mktemp("cute") / "layouts"
    folders = [Path(found.origin).parent / "source" / "include", cuda_include(), cuda_include() / "cccl"]
    include = [word for folder in folders for word in ("-isystem", str(folder))]
    source = Path(__file__).parent / "kernels" / "cute_layouts.cpp"
    subprocess.run(["g++", "-std=c++17", *include, str(source), "-o", str(program)], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in said.splitlines()]
    return {(name, operand): np.array(elements, int).reshape(32, -1) for name, operand, *elements in lines}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["two_mma_f16", "mma_f16", "mma_bf16"])
def test_fragments_lie_where_cute_has_them(layouts: Layouts, kernel: str) -> None:
    """Small integers, whose products are exact, laid out by CuTe. Two mma of half the depth are one product."""
    random = np.random.default_rng(3)
    a, b, c = (random.integers(-8, 9, shape) for shape in ((16, 16), (16, 8), (16, 8)))
    depth = 8 if kernel.startswith("two") else 16

    def words(values: np.ndarray, operand: str) -> np.ndarray:
        """(32, registers) of one mma."""
        bits = as_bf16(values)[0] if kernel.endswith("bf16") else values.astype(np.float16)
        return np.ascontiguousarray(bits.ravel(order="F")[layouts[kernel, operand]]).view(np.uint32)

    first = range(0, 16, depth)
    words_a = np.concatenate([words(a[:, k : k + depth], "a") for k in first], 1)
    words_b = np.concatenate([words(b[k : k + depth].T, "b") for k in first], 1)
    words_c = c.astype(np.float32).ravel(order="F")[layouts[kernel, "c"]].view(np.uint32)
    given = np.concatenate([operand.reshape(-1) for operand in (words_a, words_b, words_c)])
    got = np.empty(16 * 8, np.float32)
    got[layouts[kernel, "c"].reshape(-1)] = lanes(Emulator(build([SOURCE])), kernel, given, 128).view(np.float32)
    np.testing.assert_array_equal(got.reshape(16, 8, order="F"), a @ b + c)
