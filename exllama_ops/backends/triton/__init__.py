"""The Triton backend: every GPU that Triton compiles for, without nvcc or a native library.

Importing this module imports no Triton, and the first call of an op does. On a CPU the kernels run in Triton's
interpreter, which is for tests: only if TRITON_INTERPRET=1 and EXLLAMA_OPS_BACKEND=triton both ask for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from exllama_ops.backends._types import VARIABLE, NextBest
from exllama_ops.layout.weight import Weight

__all__ = ["BACKEND", "OPS", "TritonBackend"]

# The ops that have kernels in `exllama_ops.backends.triton.ops`, whose import takes Triton; a test compares the two.
OPS = (
    "gptq_dequantize",
    "gptq_gemm",
    "gptq_gemm_dx",
    "gptq_gemm_multi",
    "gptq_moe_gemm",
    "gptq_moe_gemm_dx",
    "gptq_shuffle",
    "gptq_unshuffle",
)

# What Triton compiles for at all; its tl.dot uses tensor cores from 8.0 on.
_FIRST_CAPABILITY = (7, 5)


class TritonBackend:
    """Serves the ops of `OPS` on GPUs, and on CPU tensors in Triton's interpreter."""

    name = "triton"

    def __init__(self) -> None:
        # Why the kernels cannot run, found out at the first call; empty while they may.
        self.failure: list[str] = []
        self._lock = threading.Lock()
        self._ops: Any = None

    def reasons_against(self, op: str, dispatch_key: str) -> list[str]:
        if not is_installed():
            if torch.version.hip is not None or torch.version.xpu is not None:
                return ["Triton is not installed, which PyTorch brings for this device, by another name than triton"]
            return ['Triton is not installed: pip install "exllama-ops[triton]"']
        if op not in OPS:
            return [f"it has no kernel of {op}"]
        return self.failure or self.reasons_against_device(dispatch_key)

    def reasons_against_device(self, dispatch_key: str) -> list[str]:
        """Why no device can be there for a dispatch key, found without touching one."""
        if dispatch_key == "CPU":
            if _is_interpreting() and os.environ.get(VARIABLE) == self.name:
                return []
            return [f"on a CPU its kernels are interpreted, if TRITON_INTERPRET=1 and {VARIABLE}={self.name}"]
        if _is_interpreting():
            return ["TRITON_INTERPRET=1 is for CPU tensors"]
        if dispatch_key == "XPU":
            return ["torch was installed without XPU"] if torch.version.xpu is None else []
        if torch.version.cuda is None and torch.version.hip is None:
            return ["torch was installed without CUDA and ROCm"]
        return [] if torch.cuda.device_count() > 0 else ["there is no CUDA or ROCm device"]

    def is_settled(self) -> bool:
        return self._ops is not None

    def detail(self, dispatch_key: str) -> str:
        if _is_interpreting():
            return "interpreted"
        if dispatch_key == "XPU":
            tested = "no Intel GPU has run its kernels, nor were they compiled for one"
        elif torch.version.hip is not None:
            tested = "no AMD GPU has run its kernels: they were only compiled, for gfx942 and gfx1100"
        else:
            tested = (
                "no NVIDIA GPU has run its kernels: they were emulated as compiled for 8.0, for others only compiled"
            )
        return f"compiled by Triton at the first call of each kind; {tested}"

    def kernel(
        self, op: str, dispatch_key: str, passed_over: Mapping[str, Sequence[str]], next_best: NextBest
    ) -> Callable[..., Any]:
        chosen: Callable[..., Any] | None = None

        def load_and_compute(*args: Any, **kwargs: Any) -> Any:
            nonlocal chosen
            if chosen is None:
                self.load(dispatch_key)
                chosen = getattr(self._ops, op) if self._ops is not None else next_best(self.failure)
            return chosen(*args, **kwargs)

        return load_and_compute

    def tune(self, op: str, x: Tensor, weight: Weight) -> None:
        """Choose the tile of a gptq_gemm or gptq_gemm_dx that was called before, by timing.

        `backends/triton/tune.py` says when it cannot be.
        """
        tune = importlib.import_module("exllama_ops.backends.triton.tune")
        {"gptq_gemm": tune.tune_gemm, "gptq_gemm_dx": tune.tune_gemm_dx}[op](x, weight)

    def load(self, dispatch_key: str) -> None:
        """Have the kernels, or a `failure`, whichever thread comes first."""
        with self._lock:
            if self._ops is not None or self.failure:
                return
            self.failure = _reasons_against_compiling(dispatch_key)
            if self.failure:
                return
            try:
                self._ops = importlib.import_module("exllama_ops.backends.triton.ops")
            except ImportError as error:
                self.failure = [f"Triton cannot be imported: {error}"]


def is_installed() -> bool:
    """Whether Triton can be found, which is not imported for it."""
    return importlib.util.find_spec("triton") is not None


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _reasons_against_compiling(dispatch_key: str) -> list[str]:
    """What a first call finds out, when it may touch the device."""
    if dispatch_key == "CPU":
        return []
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC") or "gcc", "gcc", "clang")):
        return ["Triton needs a C compiler, gcc or clang or what CC names, to launch its kernels"]
    if dispatch_key == "CUDA" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        if capability < _FIRST_CAPABILITY:
            return [f"Triton's kernels need compute capability 7.5; the device has {capability[0]}.{capability[1]}"]
    return []


BACKEND = TritonBackend()
