"""GPUs and drivers that a CUDA library cannot serve: the next backend does, and one warning says why."""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from exllama_ops.backends.cuda import CudaBackend, CudaBackendWarning, gpus
from exllama_ops.backends.native import NativeBackend, cache
from exllama_ops.backends.native import compile as compiling
from exllama_ops.backends.native.compile import CUDA, Compiler
from exllama_ops.ops import _library

CUDA_13 = (13, 0)
OLD_DRIVER = "the driver knows CUDA 12.4, and CUDA 13.0 compiles the kernels: install a newer driver, or"
NO_CODE = "the library has no code for compute capability 7.0: build it by an nvcc that has"


class Library:
    """A library of CUDA 13.0, as far as Python knows it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def toolkit(self) -> tuple[int, int]:
        return CUDA_13

    def batch_invariant(self) -> bool:
        return False

    def reasons_against(self, op: str) -> list[str]:
        return []

    def register(self, namespace: str, op: str) -> None:
        pytest.fail("no GPU is here")


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """That of a library for 9.0 and, by PTX, later GPUs, which a variable names."""
    csrc = cache.csrc()
    assert csrc is not None
    library = tmp_path / CUDA.library
    library.write_text("a library")
    record: dict[str, Any] = {"sha256": compiling.digest(library), "sources": compiling.source_key(CUDA, csrc)}
    record |= {"compiler": "nvcc", "seconds": 1, "flags": ["-gencode", "arch=compute_90,code=[sm_90,compute_90]"]}
    (tmp_path / compiling.RECORD).write_text(json.dumps(record))
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_LIBRARY", str(tmp_path))
    made = CudaBackend()
    monkeypatch.setattr(made, "_load_file", Library)
    monkeypatch.setattr(made, "prepare", lambda library: None)
    monkeypatch.setattr(made, "reasons_against_device", list)
    monkeypatch.setattr(gpus, "driver_version", lambda: CUDA_13)
    return made


def see(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(gpus, "capabilities", lambda: set(capabilities))


def no_next_best(reasons: Sequence[str]) -> Callable[..., Any]:
    raise AssertionError(reasons)


def test_a_library_that_serves_every_gpu_is_called_without_python(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, (9, 0), (12, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.reasons_against("gptq_gemm", "CUDA") == []
        assert isinstance(backend.kernel("gptq_gemm", "CUDA", {}, no_next_best), _library.NativeKernel)
    assert backend.is_settled()


def test_a_library_that_serves_no_gpu_is_passed_over_with_a_warning(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, (7, 0))
    with pytest.warns(CudaBackendWarning, match=NO_CODE):
        (reason,) = backend.reasons_against("gptq_gemm", "CUDA")
    assert NO_CODE in reason


def test_a_driver_of_an_older_major_version_is_passed_over_with_a_warning(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, (9, 0))
    monkeypatch.setattr(gpus, "driver_version", lambda: (12, 4))
    with pytest.warns(CudaBackendWarning, match=OLD_DRIVER):
        (reason,) = backend.reasons_against("gptq_gemm", "CUDA")
    assert OLD_DRIVER in reason


@pytest.mark.parametrize("known", [[(7, 0), (9, 0)], []], ids=["mixed", "unknown"])
def test_each_gpu_has_the_first_backend_that_serves_it(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch, known: list[tuple[int, int]]
) -> None:
    """Devices of this process stand for GPUs: the CPU for one of 9.0 and meta for one of 7.0."""
    see(monkeypatch, *known)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.type == "cpu" else (7, 0))
    assert backend.reasons_against("gptq_gemm", "CUDA") == []
    assert not backend.is_settled()
    assert callable(backend.kernel("gptq_gemm", "CUDA", {}, no_next_best))
    passed: list[Sequence[str]] = []

    def next_best(reasons: Sequence[str]) -> Callable[..., Any]:
        passed.append(reasons)
        return lambda x: "next"

    kernel = backend.for_devices(lambda x: "native", next_best)
    assert [kernel(torch.empty(1)), kernel(None)] == ["native", "native"]
    with pytest.warns(CudaBackendWarning, match=NO_CODE):
        assert kernel(torch.empty(1, device="meta")) == "next"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [kernel(torch.empty(1, device="meta")), kernel(torch.empty(1))] == ["next", "native"]
        of_another_op = backend.for_devices(lambda x: "native", next_best)
        assert of_another_op(torch.empty(1, device="meta")) == "next"
    (reason,), _ = passed
    assert NO_CODE in reason


def test_nothing_is_compiled_that_the_driver_cannot_run(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path / 'trace'}\necho 'tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("EXLLAMA_OPS_NVCC", str(nvcc))
    monkeypatch.delenv("EXLLAMA_OPS_CUDA_LIBRARY")
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "packaged", lambda recipe: None)
    monkeypatch.setattr(gpus, "driver_version", lambda: (12, 4))
    see(monkeypatch, (9, 0))
    assert backend.reasons_against("gptq_gemm", "CUDA") == []
    kernel = backend.kernel("gptq_gemm", "CUDA", {}, lambda reasons: lambda x: reasons)
    assert callable(kernel)
    with pytest.warns(CudaBackendWarning, match=OLD_DRIVER):
        (reason,) = kernel(torch.empty(1))
    assert OLD_DRIVER in reason
    assert (tmp_path / "trace").read_text() == "--version\n"


@pytest.mark.parametrize(
    ("capability", "codes", "driver", "reason"),
    [
        ((9, 0), {"sm_90"}, CUDA_13, None),
        ((8, 6), {"sm_80"}, CUDA_13, None),
        ((8, 7), {"sm_80"}, CUDA_13, "no code for compute capability 8.7: "),
        ((9, 0), {"sm_80"}, CUDA_13, "no code for compute capability 9.0: "),
        ((9, 0), {"sm_80", "compute_90"}, CUDA_13, None),
        ((13, 0), {"sm_80", "compute_90"}, None, None),
        ((13, 0), {"sm_80", "compute_90"}, (13, 2), None),
        ((13, 0), {"sm_80", "compute_90"}, (12, 9), "13.0 but PTX of CUDA 13.0, and the driver knows CUDA 12.9: "),
        ((7, 5), {"sm_80", "compute_90"}, CUDA_13, "no code for compute capability 7.5: "),
        ((5, 2), {"sm_60", "sm_80", "compute_90"}, CUDA_13, "no code for compute capability 5.2: "),
    ],
)
def test_a_gpu_needs_machine_code_or_ptx_that_its_driver_compiles(
    capability: tuple[int, int], codes: set[str], driver: tuple[int, int] | None, reason: str | None
) -> None:
    said = gpus.reason_against_gpu(capability, codes, driver, CUDA_13)
    assert said is None if reason is None else said is not None and reason in said


@pytest.mark.parametrize("driver", [None, (13, 0), (13, 1), (14, 0)])
def test_other_drivers_are_new_enough(driver: tuple[int, int] | None) -> None:
    assert gpus.reason_against_driver(driver, CUDA_13) is None


def test_the_driver_says_its_version(tmp_path: Path) -> None:
    source = tmp_path / "driver.cpp"
    source.write_text('extern "C" int cuDriverGetVersion(int* version) { *version = 12040; return FAILS; }')
    for fails, version in ((0, (12, 4)), (1, None)):
        library = tmp_path / f"driver{fails}.so"
        subprocess.run(["g++", "-shared", "-fPIC", f"-DFAILS={fails}", str(source), "-o", str(library)], check=True)
        assert gpus.driver_version(str(library)) == version
    assert gpus.driver_version(str(tmp_path / "none.so")) is None


def test_an_nvcc_that_does_not_say_its_version_has_none() -> None:
    assert gpus.toolkit_of(Compiler(("echo", "release 12.9, V12.9.86"), "echo")) == (12, 9)
    assert gpus.toolkit_of(Compiler(("true",), "true")) is None
    assert gpus.toolkit_of(Compiler(("/no/such/nvcc",), "none")) is None


def test_a_library_without_a_record_has_no_code(tmp_path: Path) -> None:
    assert cache.codes_of(tmp_path / CUDA.library) == frozenset()


def test_every_other_backend_serves_every_device() -> None:
    assert NativeBackend(compiling.CPU, lambda path: pytest.fail("nothing is loaded")).serves_every_device()
