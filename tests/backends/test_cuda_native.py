"""The native CUDA library: what nvcc is asked for, and that nobody hears of it where there is no CUDA."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from exllama_ops import backends
from exllama_ops.backends.cuda import CudaBackend, gpus
from exllama_ops.backends.cuda.library import CudaLibrary
from exllama_ops.backends.native import cache
from exllama_ops.backends.native import compile as compiling
from exllama_ops.backends.native.compile import CUDA, CompileError, Compiler
from exllama_ops.cli import build as build_command
from ptx_emulator.toolchain import cuda_include

needs_nvcc = pytest.mark.skipif(compiling.find_compiler(CUDA) is None, reason="needs nvcc")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA; this one has it")

ROOT = Path(__file__).parents[2]

REPORT = """
import exllama_ops
print(*[choice for choice in exllama_ops.backends.report() if choice.dispatch_key == "CUDA"], sep="\\n")
"""


def fake_nvcc(folder: Path, *codes: str) -> Path:
    """A program that knows these GPUs, and leaves a trace when it runs."""
    program = folder / "nvcc"
    lines = "\n".join(codes)
    program.write_text(f"#!/bin/sh\necho \"$@\" >> {folder / 'trace'}\necho '{lines}'\n")
    program.chmod(0o755)
    return program


@without_cuda
def test_without_cuda_nvcc_never_runs_and_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_NVCC", str(fake_nvcc(tmp_path, "sm_80")))
    result = subprocess.run([sys.executable, "-c", REPORT], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == len(backends.report()) // len(backends.PRIORITY)
    for line in result.stdout.splitlines():
        assert "reference (not cuda: " in line
        assert "torch was installed without CUDA" in line or "there is no CUDA device" in line
    assert not (tmp_path / "trace").exists()


def test_the_command_without_nvcc_fails_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_NVCC", str(tmp_path / "nvcc"))
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(tmp_path))
    command = [sys.executable, "-m", "exllama_ops", "build", "--cuda", "--force"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"needs nvcc, and EXLLAMA_OPS_NVCC='{tmp_path / 'nvcc'}' names no program" in result.stderr
    assert "NVIDIA's CUDA toolkit" in result.stderr


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        (
            ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "sm_121"),  # nvcc 13
            [
                "arch=compute_75,code=[sm_75]",
                "arch=compute_80,code=[sm_80]",
                "arch=compute_90,code=[sm_90,sm_100,sm_120,compute_90]",
            ],
        ),
        (
            ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"),  # nvcc 12.0
            [
                "arch=compute_60,code=[sm_60,sm_70]",
                "arch=compute_75,code=[sm_75]",
                "arch=compute_80,code=[sm_80]",
                "arch=compute_90,code=[sm_90,compute_90]",
            ],
        ),
    ],
)
def test_device_code_is_for_the_gpus_that_nvcc_knows(tmp_path: Path, known: list[str], wanted: list[str]) -> None:
    flags = compiling.device_flags(CUDA, Compiler((str(fake_nvcc(tmp_path, *known)),), "nvcc"), tmp_path)
    assert flags == [word for code in wanted for word in ("-gencode", code)]
    assert compiling.device_flags(compiling.CPU, Compiler(("false",), "none"), tmp_path) == []


@pytest.mark.parametrize(
    ("capabilities", "codes"),
    [
        ([(9, 0)], ("sm_90",)),
        ([(8, 6), (8, 9), (8, 0)], ("sm_80",)),
        ([(12, 1), (10, 3), (7, 5), (7, 0), (6, 1)], ("sm_60", "sm_70", "sm_75", "sm_100", "sm_120")),
        ([(8, 7)], ("sm_87",)),
        ([(11, 0)], ("sm_110",)),
        ([(13, 0)], ("compute_90",)),
        ([(5, 2)], ("sm_52",)),
        ([], ()),
    ],
)
def test_a_gpu_needs_the_code_of_its_family(capabilities: list[tuple[int, int]], codes: tuple[str, ...]) -> None:
    assert compiling.codes_for(CUDA, capabilities) == codes


NVCC_13 = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_90", "sm_100", "sm_110", "sm_120")


@pytest.mark.parametrize(
    ("known", "codes", "wanted"),
    [
        (NVCC_13, ("sm_90",), ["arch=compute_90,code=[sm_90]"]),
        (NVCC_13, ("sm_75", "sm_80"), ["arch=compute_75,code=[sm_75]", "arch=compute_80,code=[sm_80]"]),
        (NVCC_13, ("sm_70", "sm_90"), ["arch=compute_90,code=[sm_90]"]),  # which the one for sm_70 is left out of
        (NVCC_13, ("sm_110",), ["arch=compute_90,code=[sm_110]"]),
        (NVCC_13, ("compute_90",), ["arch=compute_90,code=[compute_90]"]),
        (("sm_80", "sm_90"), ("sm_120",), ["arch=compute_90,code=[compute_90]"]),
    ],
)
def test_a_build_for_gpus_has_their_code_alone(
    tmp_path: Path, known: tuple[str, ...], codes: tuple[str, ...], wanted: list[str]
) -> None:
    nvcc = Compiler((str(fake_nvcc(tmp_path, *known)),), "nvcc")
    flags = compiling.device_flags(CUDA, nvcc, tmp_path, codes)
    assert flags == [word for code in wanted for word in ("-gencode", code)]


def test_an_nvcc_without_code_for_the_gpu_is_refused(tmp_path: Path) -> None:
    nvcc = Compiler((str(fake_nvcc(tmp_path, *NVCC_13)),), "nvcc")
    message = (
        f"{nvcc} compiles for {', '.join(NVCC_13)}, and the kernels are needed for sm_70: take a CUDA toolkit that has "
        "it, by CUDA_HOME or EXLLAMA_OPS_NVCC"
    )
    with pytest.raises(CompileError, match=f"^{re.escape(message)}$"):
        compiling.device_flags(CUDA, nvcc, tmp_path, ("sm_70",))


@pytest.mark.parametrize(("machine", "has_tegra"), [("x86_64", False), ("aarch64", True)])
def test_all_code_has_that_of_tegra_on_arm_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, has_tegra: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    flags = compiling.device_flags(CUDA, Compiler((str(fake_nvcc(tmp_path, *NVCC_13)),), "nvcc"), tmp_path)
    tegra = ",sm_87" if has_tegra else ""
    thor = "sm_110," if has_tegra else ""
    assert flags[-3] == f"arch=compute_80,code=[sm_80{tegra}]"
    assert flags[-1] == f"arch=compute_90,code=[sm_90,sm_100,{thor}sm_120,compute_90]"


def test_nvcc_is_looked_for_in_the_documented_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = ("EXLLAMA_OPS_NVCC", "CUDA_HOME", "CUDA_PATH", "PATH")
    for name in named:
        folder = tmp_path / name / ("bin" if name.startswith("CUDA") else "")
        folder.mkdir(parents=True)
        program = fake_nvcc(folder)
        monkeypatch.setenv(name, str(program if name == "EXLLAMA_OPS_NVCC" else tmp_path / name))
    for name in named:
        compiler = compiling.find_compiler(CUDA)
        assert compiler is not None
        assert Path(compiler.command[0]).relative_to(tmp_path).parts[0] == name
        if name == "CUDA_HOME":  # a folder of a toolkit without a compiler is passed over
            (tmp_path / name / "bin" / "nvcc").unlink()
        else:
            monkeypatch.setenv(name, "")


# Two GPUs, one that the user may not see, and one that has no capability.
NVML = """
extern "C" {
int nvmlInit_v2() { return BEGIN; }
int nvmlShutdown() { return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 4; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** handle) {
  *handle = reinterpret_cast<void*>(static_cast<unsigned long>(index));
  return index == 1 ? 4 : 0;
}
int nvmlDeviceGetCudaComputeCapability(void* handle, int* major, int* minor) {
  const auto index = reinterpret_cast<unsigned long>(handle);
  *major = index == 0 ? 8 : 12, *minor = index == 0 ? 9 : 0;
  return index == 2 ? 3 : 0;
}
}
"""


@pytest.mark.parametrize(("begin", "found"), [(0, [(8, 9), (12, 0)]), (9, [])])
def test_the_gpus_are_found_by_nvml(tmp_path: Path, begin: int, found: list[tuple[int, int]]) -> None:
    source, library = tmp_path / "nvml.cpp", tmp_path / "nvml.so"
    source.write_text(NVML)
    subprocess.run(["g++", "-shared", "-fPIC", f"-DBEGIN={begin}", str(source), "-o", str(library)], check=True)
    assert list(gpus._by_nvml(str(library))) == found
    assert list(gpus._by_nvml(str(tmp_path / "none.so"))) == []


def test_the_library_of_these_gpus_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CudaBackend()
    monkeypatch.setattr(gpus, "capabilities", lambda: {(8, 9), (9, 0)})
    assert backend.codes() == ("sm_80", "sm_90")
    monkeypatch.setattr(gpus, "capabilities", set)
    assert backend.codes() == compiling.ALL


def test_the_command_takes_capabilities() -> None:
    assert build_command._codes("8.6,9.0") == ("sm_80", "sm_90")
    assert build_command._codes("all") == compiling.ALL
    for text in ("9", "sm_90", "8.0,", "8.0.1"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must be all, or compute capabilities as 8\.0,9\.0; got"):
            build_command._codes(text)


@needs_nvcc
def test_a_driver_older_than_the_toolkit_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    library = tmp_path / "old_driver.so"
    options = ["-std=c++17", "-shared", "-fPIC", "-I", str(ROOT / "csrc"), "-isystem", str(cuda_include())]
    sources = ["-x", "c++", str(ROOT / "csrc" / "cuda" / "device.cu"), str(Path(__file__).parent / "old_driver.cpp")]
    subprocess.run(["g++", *options, *sources, "-o", str(library)], check=True)
    call = ctypes.CDLL(str(library)).first_call
    call.restype = ctypes.c_char_p
    message = call().decode()
    assert message.startswith("exllama_ops: the CUDA driver is older than CUDA 1")
    assert "install a newer driver" in message
    assert "EXLLAMA_OPS_NVCC" in message


def test_a_torch_without_the_current_stream_is_refused_by_name(tmp_path: Path) -> None:
    program = tmp_path / "no_stream"
    include = ["-I", str(ROOT / "csrc"), "-isystem", str(Path(torch.__file__).parent / "include")]
    source = Path(__file__).parent / "no_stream.cpp"
    flags = [flag for flag in CUDA.compile_flags if flag.startswith(("-std", "-D"))]
    subprocess.run(["g++", *flags, *include, str(source), "-o", str(program)], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert "need aoti_torch_get_current_cuda_stream of torch, which this torch does not have" in said
    assert "install a torch that was built for CUDA" in said


def build_backend() -> ModuleType:
    specification = importlib.util.spec_from_file_location("build", ROOT / "_build_backend" / "exllama_build.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("torch_has_cuda", [False, True])
def test_a_wheel_carries_the_cuda_library_beside_the_others_if_nvcc_and_a_torch_with_cuda_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_has_cuda: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    torch_directory, scratch = tmp_path / "torch", tmp_path / "scratch"
    for folder in (torch_directory / "include" / "torch" / "csrc" / "stable", torch_directory / "lib", scratch):
        folder.mkdir(parents=True)
    (torch_directory / "include" / "torch" / "csrc" / "stable" / "library.h").touch()
    if torch_has_cuda:
        (torch_directory / "lib" / "libtorch_cuda.so").touch()
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\necho sm_80\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("EXLLAMA_OPS_NVCC", str(compiler))
    backend = build_backend()
    monkeypatch.setattr(backend, "_torch_directories", lambda: iter([torch_directory]))
    made = backend._compile(scratch)
    expected = {"cpu/libexllama_cpu.so", "cpu/build.json", "schema/libexllama_schema.so", "schema/build.json"}
    assert set(made) == expected | ({"cuda/libexllama_cuda.so", "cuda/build.json"} if torch_has_cuda else set())
    assert all(path.is_file() for path in made.values())
    said = capsys.readouterr().err
    assert ("native CUDA library: the wheel is built without it: the torch in" in said) is not torch_has_cuda


@pytest.mark.slow
@needs_nvcc
def test_the_library_builds_and_loads_beside_any_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, csrc = compiling.find_compiler(CUDA), cache.csrc()
    assert compiler is not None
    assert csrc is not None
    compiling.compile_library(CUDA, csrc, Path(torch.__file__).parent, compiler, tmp_path, print)
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_LIBRARY", str(tmp_path))
    assert cache.given(CUDA) == tmp_path / CUDA.library
    library = CudaLibrary(tmp_path / CUDA.library)
    assert not library.batch_invariant()
    library.set_batch_invariant(True)
    assert library.batch_invariant()
    with pytest.raises(RuntimeError, match="exllama::gptq_sing"):
        library.register("exllama", "gptq_sing")
