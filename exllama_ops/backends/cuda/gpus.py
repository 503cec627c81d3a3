"""The GPUs of this machine and their driver, asked without touching one, and whether a library can serve them.

A process that has not used CUDA can still fork afterwards, and takes no memory of a GPU.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator, Set

import torch

from exllama_ops.backends.native.compile import CUDA, PTX, Compiler, codes_for

Version = tuple[int, int]


def driver_version(name: str = "libcuda.so.1") -> Version | None:
    """The version of CUDA that the driver knows, or None if it does not say."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def toolkit_of(compiler: Compiler) -> Version | None:
    """The version of CUDA of an nvcc, or None if it does not say."""
    try:
        said = subprocess.run([*compiler.command, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    match = re.search(r"\brelease (\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else None


def reason_against_driver(driver: Version | None, toolkit: Version) -> str | None:
    """Why a driver runs nothing that a toolkit compiled: its major version is older. None if it does, or if unknown."""
    if driver is None or driver[0] >= toolkit[0]:
        return None
    return (
        f"the driver knows CUDA {_dotted(driver)}, and CUDA {_dotted(toolkit)} compiles the kernels: install a newer "
        "driver, or compile by the nvcc of the driver's version (CUDA_HOME or EXLLAMA_OPS_NVCC names it; then "
        "exllama-ops build --cuda --force)"
    )


def reason_against_gpu(capability: Version, codes: Set[str], driver: Version | None, toolkit: Version) -> str | None:
    """Why a library with some device code does not run on a GPU; None if it does.

    PTX serves where there is no machine code, if the driver is no older than the toolkit that made it.
    """
    if codes_for(CUDA, [capability])[0] in codes - {PTX}:
        return None
    has = f"the library has no code for compute capability {_dotted(capability)}"
    if PTX in codes and capability >= (9, 0):
        if driver is None or driver >= toolkit:
            return None
        has += f" but PTX of CUDA {_dotted(toolkit)}, and the driver knows CUDA {_dotted(driver)}"
    return (
        f"{has}: build it by an nvcc that has (CUDA_HOME or EXLLAMA_OPS_NVCC names it; then exllama-ops build --cuda "
        "--force)"
    )


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def capabilities() -> set[tuple[int, int]]:
    """The compute capabilities of the GPUs: by NVML, else by torch if it uses CUDA already. Empty if neither says."""
    found = set(_by_nvml("libnvidia-ml.so.1"))
    if not found and torch.cuda.is_initialized():
        found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return found


def _by_nvml(name: str) -> Iterator[tuple[int, int]]:
    """Those of the driver's library for management, which a container may lack and a Jetson has in part."""
    try:
        nvml = ctypes.CDLL(name)
        begin, count_of, handle_of, capability_of, end = (
            getattr(nvml, function)
            for function in (
                "nvmlInit_v2",
                "nvmlDeviceGetCount_v2",
                "nvmlDeviceGetHandleByIndex_v2",
                "nvmlDeviceGetCudaComputeCapability",
                "nvmlShutdown",
            )
        )
    except (OSError, AttributeError):
        return
    if begin():
        return
    try:
        count, major, minor = ctypes.c_uint(), ctypes.c_int(), ctypes.c_int()
        if count_of(ctypes.byref(count)):
            return
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if handle_of(ctypes.c_uint(index), ctypes.byref(handle)):
                continue  # one that this user may not see
            if not capability_of(handle, ctypes.byref(major), ctypes.byref(minor)):
                yield major.value, minor.value
    finally:
        end()
