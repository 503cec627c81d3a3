"""Device code compiled by NVRTC 12.9, which still knows the architectures that nvcc 13 has dropped.

It comes from the package index, without a toolkit: `PACKAGES`, by ``pip install --no-deps``.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

PACKAGES = "nvidia-cuda-nvrtc-cu12==12.9.86 nvidia-cuda-runtime-cu12 nvidia-cuda-cccl-cu12"

# What NVRTC has no headers of a host for; the kernels need no more of them.
_HEADERS = {
    "cstdint": """
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned uint32_t;
typedef unsigned long long uint64_t, uintptr_t;
""",
    "type_traits": """
#include <cuda/std/type_traits>
namespace std { using cuda::std::conditional_t; }
""",
    "iterator": """
namespace std {
template <typename T, unsigned long long n> constexpr unsigned long long size(const T (&)[n]) { return n; }
}
""",
}


def folder() -> Path | None:
    """Where the wheels lie, or None."""
    # Looking for a module in a package that is not there raises.
    if importlib.util.find_spec("nvidia") is None:
        return None
    found = importlib.util.find_spec("nvidia.cuda_nvrtc")
    if found is None or not found.submodule_search_locations:
        return None
    root = Path(next(iter(found.submodule_search_locations))).parent
    parts = ("cuda_nvrtc/lib/libnvrtc.so.12", "cuda_runtime/include/cuda_fp16.h")
    return root if all((root / part).is_file() for part in parts) else None


def compile_to_cubin(source: str, arch: int, include: Path) -> tuple[bytes, str]:
    """The machine code of device code for an architecture, and what ptxas says of its resources.

    Raises:
        RuntimeError: it does not compile; the text is the compiler's log.
    """
    root = folder()
    assert root is not None
    nvrtc = ctypes.CDLL(str(root / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"))
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(_HEADERS))(*(text.encode() for text in _HEADERS.values()))
    names = (ctypes.c_char_p * len(_HEADERS))(*(name.encode() for name in _HEADERS))
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernels.cu", len(_HEADERS), texts, names
    )
    assert created == 0
    includes = [include, root / "cuda_runtime" / "include", root / "cuda_cccl" / "include"]
    options = [
        "--std=c++17",
        "--device-as-default-execution-space",
        f"--gpu-architecture=sm_{arch}",
        "--ptxas-options=-v",
        *(f"--include-path={path}" for path in includes),
    ]
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), words)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    said = log.value.decode(errors="replace")
    if status:
        raise RuntimeError(said)
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, code)
    return code.raw, said
