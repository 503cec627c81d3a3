"""When Triton serves, what is said when it does not, and that importing the package needs none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exllama_ops import backends
from exllama_ops.backends import reference, triton
from exllama_ops.backends.native import NativeBackend

REPORT = """
import sys
if sys.argv[1] == "hide":
    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name == "triton":
                raise ModuleNotFoundError("No module named 'triton'", name="triton")
    sys.meta_path.insert(0, Hide())
    import importlib.util
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import exllama_ops
print(*exllama_ops.backends.report(), sep="\\n")
"""


def report(argument: str = "", **environment: str) -> list[str]:
    unset = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "EXLLAMA_OPS_BACKEND")
    }
    command = [sys.executable, "-c", REPORT, argument]
    result = subprocess.run(command, env={**unset, **environment}, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def test_without_triton_the_package_imports_and_says_how_to_install_it() -> None:
    lines = report("hide")
    assert len(lines) == len(backends.report())
    for line in lines:
        if not line.startswith("CPU"):
            assert 'not triton: Triton is not installed: pip install "exllama-ops[triton]"' in line


@pytest.mark.skipif(not triton.is_installed(), reason="needs Triton")
def test_cpu_tensors_are_interpreted_only_if_both_variables_ask() -> None:
    both = report(EXLLAMA_OPS_BACKEND="triton", TRITON_INTERPRET="1")
    assert next(line for line in both if line.startswith("CPU")) == (
        "CPU gptq_dequantize: triton (interpreted; not cpu: EXLLAMA_OPS_BACKEND=triton; else reference)"
    )
    (line,) = [line for line in report(EXLLAMA_OPS_BACKEND="triton") if line.startswith("CPU gptq_gemm:")]
    assert "reference (" in line
    assert "if TRITON_INTERPRET=1 and EXLLAMA_OPS_BACKEND=triton" in line


GPUS = {
    "NVIDIA": ("13.0", None, "no NVIDIA GPU has run its kernels: they were emulated as compiled for 8.0"),
    "AMD": (None, "7.0", "no AMD GPU has run its kernels: they were only compiled, for gfx942 and gfx1100"),
}


@pytest.mark.skipif(not triton.is_installed(), reason="needs Triton")
@pytest.mark.parametrize("gpu", GPUS)
def test_a_gpu_without_nvcc_has_triton_and_no_gpu_has_run_it(
    gpu: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version, hip, untested = GPUS[gpu]
    native = backends.cuda.CudaBackend()
    monkeypatch.setattr(backends, "PRIORITY", {"CUDA": (native, triton.TritonBackend(), reference.BACKEND)})
    monkeypatch.setattr(backends, "_ONLY", None)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(tmp_path))
    monkeypatch.setenv("EXLLAMA_OPS_NVCC", "/no/nvcc")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (line,) = [str(choice) for choice in backends.report() if choice.op == "gptq_gemm"]
    assert line.startswith(f"CUDA gptq_gemm: triton (compiled by Triton at the first call of each kind; {untested}")
    reason = "torch was installed without CUDA" if hip else "its kernels are compiled on first use, which needs nvcc"
    assert f"; not cuda: {reason}" in line
    assert line.endswith("; else reference)")


@pytest.mark.skipif(not triton.is_installed(), reason="needs Triton")
def test_a_gpu_with_nvcc_has_triton_after_the_native_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native = backends.cuda.CudaBackend()
    monkeypatch.setattr(backends, "PRIORITY", {"CUDA": (native, triton.TritonBackend(), reference.BACKEND)})
    monkeypatch.setattr(backends, "_ONLY", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(tmp_path))
    monkeypatch.setenv("EXLLAMA_OPS_NVCC", sys.executable)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (choice,) = [choice for choice in backends.report() if choice.op == "gptq_gemm"]
    assert str(choice) == "CUDA gptq_gemm: cuda (its library is built at the first call; else triton, reference)"


class Serves:
    """A backend after another."""

    name = "serves"

    def reasons_against(self, op: str, dispatch_key: str) -> list[str]:
        return []

    def detail(self, dispatch_key: str) -> str:
        return ""

    def kernel(self, op: str, dispatch_key: str, passed_over: Any, next_best: Any) -> Callable[..., Any]:
        return lambda *args: (op, dict(passed_over))


def test_a_native_library_that_cannot_be_built_gives_way_to_the_next_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    native: NativeBackend[Any] = NativeBackend(backends.cpu.BACKEND.recipe, lambda path: None)
    monkeypatch.setattr(backends, "_ONLY", None)
    monkeypatch.setattr(native, "find", lambda: None)
    monkeypatch.setattr(native, "build", lambda: native.failure.append("no compiler"))
    kernel = backends._kernel("gptq_gemm", "CPU", (native, Serves(), reference.BACKEND), {})
    assert callable(kernel)
    assert kernel(1) == ("gptq_gemm", {"cpu": ("no compiler",)})


def test_a_gpu_that_triton_does_not_serve_gives_way_to_the_next_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = triton.TritonBackend()
    monkeypatch.setattr(backends, "_ONLY", None)
    monkeypatch.setattr(backend, "reasons_against", lambda op, key: backend.failure)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    monkeypatch.setattr(triton.shutil, "which", lambda name: f"/bin/{name}")
    kernel = backends._kernel("gptq_gemm", "CUDA", (backend, Serves()), {})
    assert callable(kernel)
    reason = "Triton's kernels need compute capability 7.5; the device has 6.1"
    assert kernel(1) == ("gptq_gemm", {"triton": (reason,)})
    monkeypatch.setattr(triton.shutil, "which", lambda name: None)
    assert "C compiler" in triton._reasons_against_compiling("CUDA")[0]
