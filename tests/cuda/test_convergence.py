"""All lanes of a warp reach each tensor-core instruction together, in the machine code that the library has."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.sass import kernels
from cuda.convergence import reached_by_some_lanes
from exllama_ops.backends.native.compile import CUDA, find_compiler

ROOT = Path(__file__).parents[2]
COMPILER = find_compiler(CUDA)


def disassembler() -> str | None:
    """Triton brings one; a toolkit has one too."""
    found = importlib.util.find_spec("triton")
    folders = [Path(found.origin).parent / "backends" / "nvidia" / "bin"] if found and found.origin else []
    return shutil.which("nvdisasm", path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


NVDISASM = disassembler()
pytestmark = pytest.mark.skipif(COMPILER is None or NVDISASM is None, reason="needs nvcc and nvdisasm")

# A product where all lanes are, by the number of the warp too; and three where some are not.
PRODUCTS = """
#include "cuda/mma_operands.cuh"
using namespace exllama::cuda;
__device__ void product(float* out, const uint32_t* in) {
  const int lane = threadIdx.x % 32;
  float d[4] = {};
  const uint32_t a[4] = {in[lane], in[lane + 32], in[lane + 64], in[lane + 96]};
  mma<__half>(d, a, in[lane + 128], in[lane + 160]);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = d[i];
}
__global__ void together(float* out, const uint32_t* in, int trips) {
  for (int i = 0; i < trips; ++i) product(out + 128 * i, in);
}
__global__ void by_warp(float* out, const uint32_t* in, int trips) {
  const int warp = threadIdx.x / 32;
  for (int i = warp; i < trips; i += 4) product(out + 128 * i, in);
  if (warp == 2) product(out, in + trips);
}
__global__ void branch(float* out, const uint32_t* in) {
  if (threadIdx.x < 8) product(out, in);
  __syncthreads();
  out[threadIdx.x] += 1;
}
__global__ void trips_of_a_lane(float* out, const uint32_t* in) {
  for (uint32_t i = 0; i < in[threadIdx.x]; ++i) product(out + 128 * i, in);
}
__global__ void some_have_left(float* out, const uint32_t* in) {
  if (in[threadIdx.x] > 3) return;
  product(out, in);
}
"""
CODES = [
    pytest.param(virtual, code, id=code)
    for virtual, codes in CUDA.device_code.items()
    for code in codes
    if code != virtual and virtual != "compute_60"
]
# Files that launch a kernel with `mma`; what a kernel for later GPUs is for sm_75 has none.
SOURCES = [path for path in sorted((ROOT / "csrc" / "cuda").glob("gemm_*.cu")) if "mma" in path.read_text()]
WITHOUT_TENSOR_CORES = {(path.stem, "sm_75") for path in SOURCES if path.stem != "gemm_mma"}


def machine_code(source: Path, virtual: str, code: str, folder: Path) -> dict[str, str]:
    """The text of each kernel's machine code."""
    assert COMPILER is not None
    known = subprocess.run([*COMPILER.command, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    if code not in known.split():
        pytest.skip(f"this nvcc does not know {code}")
    cubin = folder / f"{code}.cubin"
    flags = [*CUDA.compile_flags, "-I", str(ROOT / "csrc"), "-gencode", f"arch={virtual},code={code}", "-cubin"]
    subprocess.run([*COMPILER.command, *flags, str(source), "-o", str(cubin)], check=True)
    said = subprocess.run([str(NVDISASM), "-c", str(cubin)], capture_output=True, text=True, check=True)
    return kernels(said.stdout)


def tensor_core_instructions(text: str) -> int:
    return text.count("HMMA.")


@pytest.mark.parametrize(("virtual", "code"), [("compute_75", "sm_75"), ("compute_90", "sm_90")])
def test_lanes_that_part_before_a_product_are_seen(virtual: str, code: str, tmp_path: Path) -> None:
    source = tmp_path / "products.cu"
    source.write_text(PRODUCTS)
    found = {
        name: (len(reached_by_some_lanes(text)), tensor_core_instructions(text))
        for name, text in machine_code(source, virtual, code, tmp_path).items()
    }
    assert len(found) == 5
    for name, (apart, all_of_them) in found.items():
        assert all_of_them > 0
        is_right = "together" in name or "by_warp" in name
        assert apart == 0 if is_right else apart > 0, name


@pytest.mark.slow
@pytest.mark.parametrize(("virtual", "code"), CODES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_all_lanes_reach_each_product_of_the_kernels(source: Path, virtual: str, code: str, tmp_path: Path) -> None:
    found = machine_code(source, virtual, code, tmp_path)
    assert sum(map(tensor_core_instructions, found.values())) > 0 or (source.stem, code) in WITHOUT_TENSOR_CORES
    assert {name: lines for name, text in found.items() if (lines := reached_by_some_lanes(text))} == {}
