"""The GPUs of this machine, found without touching one: a process that has not used CUDA can still fork afterwards."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch


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
