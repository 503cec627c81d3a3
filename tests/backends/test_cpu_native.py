"""The native CPU library: what it is, how it is found, built and loaded, and what happens where it cannot be.

Building is tried in subprocesses on a copy of the package whose kernels are a stub that compiles in seconds.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import exllama_ops
from conformance.backends import CPU_ISAS
from conformance.conftest import cpu_isa
from conformance.weights import Case, build
from exllama_ops.backends import cpu
from exllama_ops.backends.cpu.library import CpuLibrary
from exllama_ops.backends.native import LoadError, cache
from exllama_ops.backends.native import compile as compiling
from exllama_ops.backends.native.compile import CPU, SCHEMA
from exllama_ops.ops import _library
from sandbox import CALL, MARK, Sandbox

needs_compiler = pytest.mark.skipif(compiling.find_compiler(CPU) is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def library() -> CpuLibrary:
    cpu.BACKEND.build()
    if cpu.BACKEND.library is None:
        pytest.skip(f"needs the native CPU library: {cpu.BACKEND.failure[0].splitlines()[0]}")
    return cpu.BACKEND.library


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sandbox, str, str]:
    """A sandbox in which an op was called once, and what that wrote."""
    sandbox = Sandbox(tmp_path_factory.mktemp("built"))
    return (sandbox, *sandbox.call())


# What the library is


def test_the_library_knows_nothing_of_python_and_only_the_c_shims_of_torch(library: CpuLibrary) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    listed = subprocess.run([nm, "-D", str(library.path)], capture_output=True, text=True, check=True).stdout
    undefined = re.findall(r"^\s+U (\S+)", listed, re.MULTILINE)
    exported = re.findall(r"^\S+ T (\S+)", listed, re.MULTILINE)
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]
    assert not [name for name in undefined if re.search(r"^_Z.*(3c10|2at|5torch)", name)]
    torch_names = {name for name in undefined if name.startswith(("aoti_", "torch_"))}
    # torch 2.10 must have them all.
    assert "torch_get_num_threads" in torch_names
    assert not torch_names & {"torch_exception_get_what", "torch_exception_get_what_without_backtrace"}
    assert {name for name in exported if not name.startswith("_")} == {
        "exllama_cpu_get_matmul_precision",
        "exllama_cpu_isa_available",
        "exllama_cpu_isa_in_use",
        "exllama_cpu_isa_name",
        "exllama_cpu_op_name",
        "exllama_cpu_register",
        "exllama_cpu_set_matmul_precision",
        "exllama_cpu_use_isa",
    }


def test_the_table_of_instruction_sets_is_best_first_and_ends_with_scalar(library: CpuLibrary) -> None:
    isas = library.isas()
    assert [isa for isa in CPU_ISAS if isa in isas] == list(isas)
    assert list(isas)[-1] == "scalar"
    assert isas["scalar"]
    assert library.isa_in_use() == os.environ.get("EXLLAMA_OPS_CPU_ISA") or next(isa for isa in isas if isas[isa])


def test_an_instruction_set_that_is_not_there_is_refused_by_every_op(
    library: CpuLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = build(Case(4, 64, 32, 16))
    rule = "EXLLAMA_OPS_CPU_ISA must name an instruction set of this CPU, one of .*scalar; got mmx$"
    monkeypatch.setattr(cpu.precision, "_libraries", [])
    monkeypatch.setenv("EXLLAMA_OPS_CPU_ISA", "mmx")
    with cpu_isa(""):
        torch.ops.exllama.gptq_gemm(torch.randn(1, 64), *weight.args)
        cpu.CpuBackend().find()  # it alone reads the variable, for the same library
        assert library.isa_in_use() is None
        with pytest.raises(ValueError, match=f"^gptq_gemm: {rule}"):
            torch.ops.exllama.gptq_gemm(torch.randn(1, 64), *weight.args)
        with pytest.raises(ValueError, match=f"^gptq_unshuffle: {rule}"):
            torch.ops.exllama.gptq_unshuffle(weight.qweight, weight.row_order, 4)
        monkeypatch.delenv("EXLLAMA_OPS_CPU_ISA")


def test_an_index_outside_its_range_names_itself(library: CpuLibrary) -> None:
    weight = build(Case(4, 64, 32, 16, "perm"))
    weight.row_order[5] = -1
    with pytest.raises(ValueError, match=r"^gptq_gemm: g_idx must have values in \[0, 64\); got -1 at index 5$"):
        torch.ops.exllama.gptq_gemm(torch.randn(1, 64), *weight.args)
    with pytest.raises(ValueError, match=r"^gptq_shuffle: q_perm must have values in \[0, 64\); got -1 at index 5$"):
        torch.ops.exllama.gptq_shuffle(weight.qweight, weight.row_order, 4)


def test_a_kernel_that_the_library_has_not_is_refused(library: CpuLibrary) -> None:
    with pytest.raises(RuntimeError, match="exllama::gptq_nothing: no CPU kernel named gptq_nothing"):
        library.register("exllama", "gptq_nothing")


def test_no_torch_tensor_is_left_behind(library: CpuLibrary) -> None:
    """A boxed kernel owns its arguments, also where it throws."""
    weight = build(Case(4, 64, 32, 16))
    x = torch.randn(2, 64)
    counts = [x._use_count(), *(tensor._use_count() for tensor in weight.args[:4])]
    for _ in range(3):
        torch.ops.exllama.gptq_gemm(x, *weight.args)
        with pytest.raises(ValueError, match="must be contiguous"):
            torch.ops.exllama.gptq_gemm(x.t(), *weight.args)
    assert counts == [x._use_count(), *(tensor._use_count() for tensor in weight.args[:4])]


def test_calls_from_many_threads_agree(library: CpuLibrary) -> None:
    weight = build(Case(4, 480, 96, 32, "perm"))
    x = torch.randn(5, 480)
    expected = torch.ops.exllama.gptq_gemm(x, *weight.args)
    wrong: list[int] = []

    def work() -> None:
        for i in range(20):
            if not torch.equal(torch.ops.exllama.gptq_gemm(x, *weight.args), expected):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Precision


def test_precision_reaches_the_library(library: CpuLibrary) -> None:
    before = exllama_ops.get_cpu_matmul_precision()
    try:
        for value, name in enumerate(("highest", "high", "medium")):
            exllama_ops.set_cpu_matmul_precision(name)
            assert exllama_ops.get_cpu_matmul_precision() == name
            assert library.precision() == value
    finally:
        exllama_ops.set_cpu_matmul_precision(before)


@pytest.mark.parametrize("wrong", ["low", "HIGH", "", None, 1])
def test_other_precisions_are_refused(wrong: object) -> None:
    before = exllama_ops.get_cpu_matmul_precision()
    message = f"set_cpu_matmul_precision: precision must be one of highest, high, medium; got {wrong!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        exllama_ops.set_cpu_matmul_precision(wrong)
    assert exllama_ops.get_cpu_matmul_precision() == before


def test_the_environment_gives_the_first_precision(sandbox: Sandbox) -> None:
    code = "import exllama_ops; print(exllama_ops.get_cpu_matmul_precision())"
    assert sandbox.call(code) == ("high\n", "")
    assert sandbox.call(code, EXLLAMA_OPS_CPU_MATMUL_PRECISION="medium") == ("medium\n", "")
    status, _, err = sandbox.run("-c", code, EXLLAMA_OPS_CPU_MATMUL_PRECISION="low")
    assert status
    assert "EXLLAMA_OPS_CPU_MATMUL_PRECISION must be one of highest, high, medium; got 'low'" in err


def test_precision_is_remembered_where_the_reference_computes(sandbox: Sandbox) -> None:
    code = "import exllama_ops as e; e.set_cpu_matmul_precision('highest'); print(e.get_cpu_matmul_precision())"
    assert sandbox.call(code, EXLLAMA_OPS_BACKEND="reference") == ("highest\n", "")


# Finding and building


@needs_compiler
def test_the_first_call_builds_with_a_message_and_progress(built: tuple[Sandbox, str, str]) -> None:
    sandbox, out, err = built
    (path,) = sandbox.libraries()
    assert out.splitlines()[0] == str(MARK)
    assert out.splitlines()[1].startswith(f"CPU gptq_dequantize: cpu (cached library {path}, scalar, high")
    first, last = err.splitlines()
    assert first.startswith("exllama_ops: building the CPU kernels (once, for some minutes) with ")
    assert str(path.parent) in first
    assert re.fullmatch(rf"{re.escape(first)} \(4 of 4\): \d+\.\d s", last)


@needs_compiler
def test_the_next_process_finds_it_and_registers_it_with_torch(built: tuple[Sandbox, str, str]) -> None:
    sandbox, out, _ = built
    before = sandbox.libraries()[0].stat()
    code = CALL + (
        "from exllama_ops.ops import _library\n"
        "assert isinstance(_library.kernel('gptq_gemm', 'CPU'), _library.NativeKernel)\n"
        "assert _library._late_library is None\n"
    )
    assert sandbox.call(code) == (out, "")
    assert sandbox.libraries()[0].stat().st_mtime_ns == before.st_mtime_ns


@needs_compiler
def test_a_build_in_the_cache_needs_no_compiler_any_more(built: tuple[Sandbox, str, str]) -> None:
    sandbox, out, _ = built
    assert sandbox.call(PATH="", CXX="") == (out, "")


@needs_compiler
def test_importing_builds_nothing(sandbox: Sandbox) -> None:
    out, err = sandbox.call("import exllama_ops; print(exllama_ops.backends.report()[0])")
    assert out.startswith("CPU gptq_dequantize: cpu (its library is built at the first call; ")
    assert (out.endswith("else reference)\n"), err) == (True, "")
    assert not sandbox.cache.exists()


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None], ids=["empty", "truncated", "missing"])
def test_a_damaged_library_is_built_anew(built: tuple[Sandbox, str, str], tmp_path: Path, damage: bytes | None) -> None:
    sandbox, out, _ = built
    damaged = tmp_path / "cache"
    shutil.copytree(sandbox.cache, damaged)
    (path,) = damaged.glob(f"native/*/{CPU.library}")
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    again, err = sandbox.call(EXLLAMA_OPS_CACHE=str(damaged))
    assert again.splitlines()[0] == out.splitlines()[0]
    assert "(4 of 4)" in err
    leftovers = [p.name for p in (damaged / "native").iterdir() if p != path.parent and p.suffix != ".lock"]
    assert leftovers == []


@needs_compiler
def test_two_processes_that_build_at_once_build_once(sandbox: Sandbox) -> None:
    processes = [sandbox.start("-c", CALL) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in processes]
    assert [out.splitlines()[0] for out, _ in results] == [str(MARK)] * 2
    assert sum(err.count("(4 of 4)") for _, err in results) == 1
    assert len(sandbox.libraries()) == 1


@needs_compiler
def test_an_edit_of_the_sources_is_another_library(built: tuple[Sandbox, str, str], tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    assert cache_key(sandbox) == cache_key(built[0])
    sandbox.stub.write_text(sandbox.stub.read_text() + "\n")
    assert cache_key(sandbox) != cache_key(built[0])
    assert cache_key(built[0], CXX=f"{sys.executable}") != cache_key(built[0])


def cache_key(sandbox: Sandbox, **changes: str) -> str:
    code = (
        "from exllama_ops.backends.native import cache, compile as c\n"
        "print(c.source_key(c.CPU, cache.csrc()), c.compiler_key(c.find_compiler(c.CPU)))"
    )
    return sandbox.call(code, **changes)[0]


@needs_compiler
def test_a_failed_build_shows_the_compilers_error_once_and_falls_back(sandbox: Sandbox) -> None:
    sandbox.stub.write_text(sandbox.stub.read_text() + "\n#error the words of the compiler\n")
    twice = CALL + "torch.ops.exllama.gptq_shuffle(torch.zeros(4, 8, dtype=torch.int32), none, 4)\n"
    out, err = sandbox.call(twice)
    assert out.splitlines()[0] == "0"
    assert err.count("#error the words of the compiler") == 1 + err.count(" | #error the words of the compiler")
    assert err.count("building the CPU kernels") == 2  # when it began, and when it stopped
    assert len(re.findall(r"^exllama_ops: building .*: stopped after \d+\.\d s$", err, re.MULTILINE)) == 1
    assert err.count("ReferenceBackendWarning: exllama_ops runs its PyTorch reference for CPU tensors") == 1
    assert "CPU gptq_dequantize: reference (not cpu: the compiler failed:" in out
    assert sandbox.libraries() == []


def test_without_a_compiler_one_warning_says_how_to_get_the_fast_path(sandbox: Sandbox) -> None:
    out, err = sandbox.call(PATH="", CXX="")
    assert out.splitlines()[0] == "0"
    assert err.count("ReferenceBackendWarning") == 1
    assert "needs a C++ compiler, and there is no g++ or clang++ in PATH, and CXX is not set" in err
    assert "apt-get install g++" in err
    out, err = sandbox.call(CXX='g++ "', EXLLAMA_OPS_CACHE="x" * 5000)  # nor is importing the package prevented
    assert "CXX='g++ \"' names no program" in err


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(sandbox: Sandbox, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    out, err = sandbox.call(EXLLAMA_OPS_CACHE=str(file))
    assert out.splitlines()[0] == "0"
    assert f"{file / 'native'}'; set EXLLAMA_OPS_CACHE to a folder that can be written" in err


def test_the_reference_can_be_forced(sandbox: Sandbox) -> None:
    out, err = sandbox.call(EXLLAMA_OPS_BACKEND="reference")
    others = "; ".join(f"not {name}: EXLLAMA_OPS_BACKEND=reference" for name in ("cpu", "triton"))
    assert out == f"0\nCPU gptq_dequantize: reference ({others})\n"
    assert "building" not in err
    assert not sandbox.cache.exists()


@needs_compiler
def test_the_command_builds_once_and_says_what_it_built(sandbox: Sandbox) -> None:
    status, out, err = sandbox.run("-m", "exllama_ops", "build", "--json")
    assert status == 0, err
    first = json.loads(out)
    assert first["origin"] == "built"
    assert [first["library"]] == [str(path) for path in sandbox.libraries()]
    assert first["isas"] == {"scalar": True}
    assert first["isa_in_use"] == "scalar"
    assert "-std=c++17" in first["flags"]
    assert not [flag for flag in first["flags"] if flag.startswith("-m")]
    assert first["compiler"]
    folder = Path(first["library"]).parent
    assert json.loads((folder / compiling.RECORD).read_text())["sources"] == folder.name.partition("-")[0]
    status, out, err = sandbox.run("-m", "exllama_ops", "build")
    assert (status, err) == (0, "")
    assert f"{first['library']} (cached)" in out
    assert "scalar (in use)" in out
    status, out, err = sandbox.run("-m", "exllama_ops", "build", "--force", "--json")
    assert json.loads(out)["origin"] == "built"


@needs_compiler
def test_the_command_names_the_libraries_that_a_wheel_brought(
    built: tuple[Sandbox, str, str], sandbox: Sandbox
) -> None:
    native = sandbox.root / "exllama_ops" / "_native"
    shutil.copytree(built[0].libraries()[0].parent, native / "cpu")
    schema = native / "schema" / SCHEMA.library
    schema.parent.mkdir()
    schema.write_bytes(b"schemas")
    record = {"sha256": compiling.digest(schema), "compiler": "g++", "flags": [], "seconds": 1}
    (schema.parent / compiling.RECORD).write_text(json.dumps(record))
    status, out, err = sandbox.run("-m", "exllama_ops", "build", "--json", PATH="", CXX="")
    assert (status, err) == (0, "")
    named = json.loads(out)
    assert (named["origin"], named["library"]) == ("packaged", str(native / "cpu" / CPU.library))
    assert named["schema_library"] == str(schema)
    assert not sandbox.cache.exists()
    schema.write_bytes(b"sch")
    status, out, err = sandbox.run("-m", "exllama_ops", "build", PATH="", CXX="")
    assert (status, out) == (2, "")
    assert f"{schema} is damaged; install the package anew" in err


def test_the_command_without_a_compiler_fails_with_the_reason(sandbox: Sandbox) -> None:
    status, out, err = sandbox.run("-m", "exllama_ops", "build", PATH="", CXX="")
    assert (status, out) == (2, "")
    assert err.startswith("exllama-ops: error: build: ")
    assert "apt-get install g++" in err


INTERRUPTED = """
import os, sys, threading, torch, exllama_ops
none, words = torch.empty(0, dtype=torch.int32), torch.zeros(4, 8, dtype=torch.int32)
try:
    torch.ops.exllama.gptq_unshuffle(words, none, 4)
except KeyboardInterrupt:
    native = sys.argv[1]
    print([name for name in os.listdir(native) if not name.endswith(".lock")])
os.environ["CXX"] = ""

def call():
    marks.append(int(torch.ops.exllama.gptq_unshuffle(words, none, 4)[0, 0]))

marks = []
threads = [threading.Thread(target=call) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(marks)

from exllama_ops.ops import _library
assert not isinstance(_library.kernel("gptq_unshuffle", "CPU"), _library.NativeKernel)
assert _library.LATE_NAMESPACE == "exllama_late"
x = torch.empty(3, 64, requires_grad=True)
weight = [torch.zeros(8, 32).int(), torch.zeros(4, 4).int(), torch.ones(4, 32), none, True, 4]
assert torch.ops.exllama.gptq_gemm(x, *weight).requires_grad
torch.ops.exllama.gptq_gemm(x, *weight, True, 16).sum().backward()
assert x.grad.shape == x.shape
"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """What a process wrote whose first call was interrupted, and which went on with a compiler that works."""
    sandbox = Sandbox(tmp_path_factory.mktemp("interrupted"))
    started, hangs = sandbox.root / "started", sandbox.root / "hangs"
    hangs.write_text(f"#!/bin/sh\ntouch {shlex.quote(str(started))}\nexec sleep 1000\n")
    hangs.chmod(0o755)
    process = sandbox.start("-c", INTERRUPTED, str(sandbox.cache / "native"), CXX=str(hangs))
    while not started.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.splitlines(), err


@needs_compiler
def test_an_interrupted_build_leaves_nothing_and_the_next_call_builds_once(interrupted: tuple[list[str], str]) -> None:
    out, err = interrupted
    assert out == ["[]", str([MARK] * 4)]
    assert err.count("building the CPU kernels") == 4  # each of two when it began, and when it ended
    assert err.count("stopped after") == err.count("(4 of 4)") == 1


@needs_compiler
def test_a_late_library_serves_without_a_second_kernel(interrupted: tuple[list[str], str]) -> None:
    _, err = interrupted
    assert "verrid" not in err  # torch's word for a kernel that took another's place


def test_the_environment_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(tmp_path))
    assert cache.root() == tmp_path / "native"
    monkeypatch.delenv("EXLLAMA_OPS_CACHE")
    assert cache.root() == Path.home() / ".cache" / "exllama_ops" / "native"


def test_a_file_that_is_no_library_of_ours_is_a_load_error(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"no library")
    with pytest.raises(LoadError, match=r"x\.so"):
        CpuLibrary(tmp_path / "x.so")
    with pytest.raises(LoadError, match="exllama_cpu_register"):
        CpuLibrary(Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so")


def test_every_op_has_one_kernel_on_the_cpu(library: CpuLibrary) -> None:
    for name in _library.schemas():
        dump = torch._C._dispatch_dump(f"exllama::{name}")
        assert len(re.findall(r"^CPU(?:\[alias\])?:", dump, re.MULTILINE)) == 1
