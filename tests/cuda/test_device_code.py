"""Every kernel compiles for every architecture, and needs no local memory; minutes: ``pytest --slow``."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import pytest

from cuda import nvrtc
from exllama_ops.backends.native.compile import CUDA, Compiler, find_compiler

ROOT = Path(__file__).parents[2]
COMPILER = find_compiler(CUDA)
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

pytestmark = pytest.mark.slow

# One kernel of each kind and width; those that nvcc compiles from the .cu files differ in types alone.
KERNELS = """
#include "cuda/add_limbs.cuh"
#include "cuda/add_splits.cuh"
#include "cuda/dequantize.cuh"
#include "cuda/gather.cuh"
#include "cuda/gemm_mma.cuh"
#include "cuda/gemm_scalar.cuh"
#include "cuda/gemm_tiled.cuh"
#include "cuda/shuffle.cuh"
using namespace exllama::cuda;
#define INSTANTIATE(bits, shuffled) \\
  template __global__ void gemm_scalar<bits, shuffled, 1>( \\
      Parts, const void*, DType, int64_t, int64_t, Splits, void*); \\
  template __global__ void gemm_scalar<bits, shuffled, 2>( \\
      Parts, const void*, DType, int64_t, int64_t, Splits, void*); \\
  template __global__ void gemm_scalar<bits, shuffled, 4>( \\
      Parts, const void*, DType, int64_t, int64_t, Splits, void*); \\
  template __global__ void gemm_scalar<bits, shuffled, 8>( \\
      Parts, const void*, DType, int64_t, int64_t, Splits, void*); \\
  template __global__ void gemm_tiled<bits, shuffled, false>(Parts, const void*, DType, int64_t, void*); \\
  template __global__ void gemm_tiled<bits, shuffled, true>(Parts, const void*, DType, int64_t, void*); \\
  template __global__ void dequantize_columns<bits, shuffled, false>(Weight, DenseW); \\
  template __global__ void dequantize_columns<bits, shuffled, true>(Weight, DenseW); \\
  template __global__ void dequantize_eights<bits, shuffled, false>(Weight, DenseW); \\
  template __global__ void dequantize_eights<bits, shuffled, true>(Weight, DenseW); \\
  template __global__ void reorder<bits, shuffled>(const uint32_t*, const int32_t*, int64_t, int64_t, uint32_t*);
namespace exllama::cuda {
INSTANTIATE(2, true) INSTANTIATE(3, true) INSTANTIATE(4, true) INSTANTIATE(8, true)
INSTANTIATE(2, false) INSTANTIATE(3, false) INSTANTIATE(4, false) INSTANTIATE(8, false)
#define INSTANTIATE_GATHER(T) \\
  template __global__ void gather_columns<T, true>( \\
      const T*, int64_t, const int32_t*, int64_t, uint32_t, Experts, int64_t, T*); \\
  template __global__ void gather_columns<T, false>( \\
      const T*, int64_t, const int32_t*, int64_t, uint32_t, Experts, int64_t, T*); \\
  template __global__ void gather_rows<T>(const T*, int64_t, const int32_t*, int64_t, int64_t, T*);
INSTANTIATE_GATHER(uint16_t) INSTANTIATE_GATHER(uint32_t)
template __global__ void gemm_mma<4, __half, 1, 128>(Parts, const __half*, int64_t, MmaCut, Splits, __half*);
template __global__ void gemm_mma<8, __nv_bfloat16, 1, 128>(
    Parts, const __nv_bfloat16*, int64_t, MmaCut, Splits, __nv_bfloat16*);
}
"""


# How many __global__ functions a file has: widths, orders of words, rows of x (or dtypes, tiles and units).
INSTANCES = {
    "add_limbs": 1,
    "dequantize": 4 * 2 * 4,
    "device": 0,
    "gather": 2 * 3,
    "gemm": 1,
    "gemm_mma": 4 * 2 * 3 * 2,
    # No unit of 32 rows with 3 bits; 32 and 64 rows of x.
    "gemm_pipelined": (4 * 2 - 1) * 2 * 2,
    "gemm_scalar": 4 * 2 * 4,
    "gemm_tiled": 4 * 2 * 2,
    "overlap": 1,
    "shuffle": 4 * 2 + 1,
    "tickets": 0,
}


def local_bytes(said: str) -> dict[str, int]:
    """What each kernel has in local memory, by what ptxas says: its stack frame, where spilled registers lie too."""
    of_kernel = r"Function properties for (\w+)\n[^\d\n]*(\d+) bytes stack frame, (\d+) bytes spill stores"
    found = re.findall(of_kernel, said)
    return {kernel: max(int(stack), int(stores)) for kernel, stack, stores in found}


@pytest.mark.skipif(nvrtc.folder() is None, reason="needs NVRTC 12.9: pip install --no-deps " + nvrtc.PACKAGES)
@pytest.mark.parametrize("arch", [pytest.param(arch, id=f"sm_{arch}") for arch in (60, 61, 70)])
def test_device_code_compiles_for_architectures_before_turing(arch: int) -> None:
    cubin, said = nvrtc.compile_to_cubin(KERNELS, arch, ROOT / "csrc")
    assert cubin
    kernels = local_bytes(said)
    assert len(kernels) == sum(INSTANCES.values()) - INSTANCES["gemm_mma"] - INSTANCES["gemm_pipelined"] + 2
    assert set(kernels.values()) == {0}


def test_every_file_of_kernels_is_counted() -> None:
    assert {source.stem for source in SOURCES} == set(INSTANCES)


@functools.cache
def known_codes(compiler: Compiler) -> str:
    return subprocess.run([*compiler.command, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(COMPILER is None, reason="needs nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("virtual", "code"),
    [
        pytest.param(virtual, code, id=code)
        for virtual, codes in CUDA.device_code.items()
        for code in codes
        if code != virtual
    ],
)
def test_no_kernel_has_local_memory(virtual: str, code: str, source: Path, tmp_path: Path) -> None:
    """In the machine code that the library has. Spills lie there, and arrays whose index ptxas does not know."""
    assert COMPILER is not None
    if code not in known_codes(COMPILER).split():
        pytest.skip(f"this nvcc does not know {code}")
    flags = [*CUDA.compile_flags, "-gencode", f"arch={virtual},code={code}", "-cubin", "-Xptxas", "-v"]
    command = [*COMPILER.command, *flags, str(source), "-o", str(tmp_path / "kernels.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kernels = local_bytes(result.stderr)
    assert len(kernels) == INSTANCES[source.stem]
    assert {kernel: bytes for kernel, bytes in kernels.items() if bytes} == {}
