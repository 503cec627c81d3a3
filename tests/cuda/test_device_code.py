"""Every kernel compiles for every architecture, without spills where it matters; minutes: ``pytest --slow``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cuda import nvrtc

ROOT = Path(__file__).parents[2]
NVCC = shutil.which(os.environ.get("EXLLAMA_OPS_NVCC", "nvcc"))
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

pytestmark = pytest.mark.slow

# One kernel of each kind and width; those that nvcc compiles from the .cu files differ in types alone.
KERNELS = """
#include "cuda/dequantize.cuh"
#include "cuda/gemm_mma.cuh"
#include "cuda/gemm_scalar.cuh"
#include "cuda/gemm_tiled.cuh"
#include "cuda/shuffle.cuh"
#include "cuda/split_k.cuh"
using namespace exllama::cuda;
#define INSTANTIATE(bits, shuffled) \\
  template __global__ void gemm_scalar<bits, shuffled, 1>( \\
      Parts, const void*, DType, int64_t, int64_t, float*, void*); \\
  template __global__ void gemm_scalar<bits, shuffled, 2>( \\
      Parts, const void*, DType, int64_t, int64_t, float*, void*); \\
  template __global__ void gemm_scalar<bits, shuffled, 4>( \\
      Parts, const void*, DType, int64_t, int64_t, float*, void*); \\
  template __global__ void gemm_scalar<bits, shuffled, 8>( \\
      Parts, const void*, DType, int64_t, int64_t, float*, void*); \\
  template __global__ void gemm_tiled<bits, shuffled, false>(Parts, const void*, DType, int64_t, void*); \\
  template __global__ void gemm_tiled<bits, shuffled, true>(Parts, const void*, DType, int64_t, void*); \\
  template __global__ void dequantize_columns<bits, shuffled>(Weight, int64_t, int64_t, void*, DType); \\
  template __global__ void reorder<bits, shuffled>(const uint32_t*, const int32_t*, int64_t, int64_t, uint32_t*);
namespace exllama::cuda {
INSTANTIATE(2, true) INSTANTIATE(3, true) INSTANTIATE(4, true) INSTANTIATE(8, true)
INSTANTIATE(2, false) INSTANTIATE(3, false) INSTANTIATE(4, false) INSTANTIATE(8, false)
template __global__ void gemm_mma<4, __half, 1, 128>(Parts, const __half*, int64_t, MmaShape, float*, __half*);
template __global__ void gemm_mma<8, __nv_bfloat16, 1, 128>(
    Parts, const __nv_bfloat16*, int64_t, MmaShape, float*, __nv_bfloat16*);
}
"""


def spills(said: str) -> dict[str, int]:
    """The bytes that kernels spill, by what ptxas says of all."""
    found = re.findall(r"properties for (\w+)\n.*?(\d+) bytes spill stores", said)
    return {kernel: int(stores) for kernel, stores in found if int(stores)}


@pytest.mark.skipif(nvrtc.folder() is None, reason="needs NVRTC 12.9: pip install --no-deps " + nvrtc.PACKAGES)
@pytest.mark.parametrize("arch", [pytest.param(arch, id=f"sm_{arch}") for arch in (60, 61, 70)])
def test_device_code_compiles_for_architectures_before_turing(arch: int) -> None:
    cubin, said = nvrtc.compile_to_cubin(KERNELS, arch, ROOT / "csrc")
    assert cubin
    assert said.count("Used ") > 40
    assert spills(said) == {}


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("arch", [pytest.param(arch, id=f"sm_{arch}") for arch in (75, 80, 86, 89, 90, 100, 120)])
def test_no_kernel_spills_registers(arch: int, source: Path, tmp_path: Path) -> None:
    flags = ["-O3", "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v"]
    command = [str(NVCC), *flags, str(source), "-o", str(tmp_path / "kernels.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert spills(result.stderr) == {}
