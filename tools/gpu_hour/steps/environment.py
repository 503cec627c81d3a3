"""The machine: GPUs, driver, compilers, packages, memory, and which backend would serve each op and why."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import torch

from tools.gpu_hour.part import Options
from tools.gpu_hour.process import find
from tools.gpu_hour.records import Result

# What a later part skips by name where it is missing.
_PROGRAMS = ("nvcc", "g++", "compute-sanitizer", "ncu", "nvidia-smi")
_MODULES = ("triton", "pytest", "xdist", "matplotlib", "vllm", "gptqmodel", "gemlite", "humming")
_QUERY = "name,driver_version,memory.total,memory.free,clocks.max.sm,clocks.max.mem,power.limit,compute_mode"


def run(what: str, options: Options) -> Result:
    """Describe the machine, on which there may be no GPU: a library can be built there."""
    gpus = [] if options.dry else _gpus()
    programs = {name: find(name) for name in _PROGRAMS}
    modules = {name: importlib.util.find_spec(name) is not None for name in _MODULES}
    data: dict[str, Any] = {
        "gpus": [gpu["name"] for gpu in gpus],
        "devices": gpus,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "programs": programs,
        "modules": modules,
        "nvcc": _printed(programs["nvcc"] or "nvcc", "--version")[-1:],
        "nvidia_smi": _printed(programs["nvidia-smi"] or "nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv"),
        "info": _info(),
    }
    missing = [name for name, found in {**programs, **modules}.items() if not found]
    lines = [
        f"{gpu['name']}, {gpu['capability']}, {gpu['free_gb']:.0f} of {gpu['total_gb']:.0f} GB free" for gpu in gpus
    ]
    lines += [*data["nvidia_smi"], *data["nvcc"], f"not here: {', '.join(missing) or 'nothing'}"]
    summary = f"torch {torch.__version__}, CUDA {torch.version.cuda}, {len(gpus)} GPUs"
    not_walked = ["GPUs: the host stands in their place"] if options.dry else []
    return Result("passed", summary, lines, data=data, not_walked=not_walked)


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "l2_mb": properties.L2_cache_size / 2**20,
                "free_gb": free / 1e9,
                "total_gb": total / 1e9,
            }
        )
    return found


def _printed(*command: str) -> list[str]:
    """The lines that a program prints, or none where it cannot be run."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return ended.stdout.strip().splitlines()


def _info() -> Any:
    """What the library says of itself."""
    lines = _printed(sys.executable, "-m", "exllama_ops", "info", "--json")
    return json.loads(lines[-1]) if lines else None
