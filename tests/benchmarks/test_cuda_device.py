"""A run with ``--device cuda`` where no GPU is: timing by events that record their order, limits, bounds, the files."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, session
from benchmarks.devices import cuda_bounds, cuda_limits
from benchmarks.devices.cuda import Cuda
from benchmarks.devices.events import EventTimer, TimingError
from benchmarks.peers import exllama_cuda
from benchmarks.peers.peer import Layer, Peer
from benchmarks.quiet import Load
from benchmarks.results import Measurement, Timed, by_roofline
from benchmarks.run import main
from benchmarks.timing import Runner, Sample
from conformance import weights
from cuda import bounds
from exllama_ops.backends.triton import tiles
from triton_backend import bounds as triton_bounds

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=1 << 16,
    total_memory=80 << 30,
)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.gpu.log.append("record")
        self.seconds = self.gpu.clock()

    def query(self) -> bool:
        self.gpu.log.append("query")
        return FakeGpu.was_waited_for or self.gpu.delays[-1] < self.gpu.cycles_that_the_host_takes

    def synchronize(self) -> None:
        self.gpu.log.append("synchronize")

    def elapsed_time(self, end_event: FakeEvent) -> float:
        return 1e3 * (end_event.seconds - self.seconds)


class FakeGpu:
    """The host, as if it were a GPU."""

    place = torch.device("cpu")
    properties = H100
    was_waited_for = False

    def __init__(self) -> None:
        self.log: list[str] = []
        self.delays: list[int] = []
        self.cycles_that_the_host_takes = 0
        self.clock = time.perf_counter

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def delay(self, cycles: int) -> None:
        self.log.append("delay")
        self.delays.append(cycles)
        FakeGpu.was_waited_for = False

    def flush(self) -> None:
        self.log.append("flush")


def test_a_call_is_timed_alone_after_a_flush_and_without_a_sync() -> None:
    gpu = FakeGpu()
    now = 0.0
    gpu.clock = lambda: now

    def call() -> None:
        nonlocal now
        gpu.log.append("call")
        now += 0.25

    runner = Runner("a", [call], lambda: gpu.log.append("enter"))
    assert EventTimer(gpu).time(runner, 1) == 0.25
    assert gpu.log == ["enter", "delay", "flush", "record", "call", "record", "query", "synchronize"]


def test_a_call_is_timed_again_until_the_host_is_ahead() -> None:
    gpu = FakeGpu()
    timer = EventTimer(gpu)
    timer.seconds(lambda: None)
    (first,) = gpu.delays
    gpu.cycles_that_the_host_takes = 3 * first
    timer.seconds(lambda: None)
    timer.seconds(lambda: None)
    assert gpu.delays == [first, first, 2 * first, 4 * first, 4 * first]


def test_a_call_that_waits_for_the_device_is_refused_and_the_next_one_is_timed() -> None:
    gpu = FakeGpu()
    gpu.cycles_that_the_host_takes = 1 << 60
    timer = EventTimer(gpu)
    with pytest.raises(TimingError, match="the call waits for the device"):
        timer.warm_up(Runner("a", [lambda: None]), 1)
    gpu.cycles_that_the_host_takes = 0
    timer.seconds(lambda: None)
    assert gpu.delays[-1] == gpu.delays[0]


def test_limits_are_bytes_and_operations_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_limits, "_MATMUL_SIZE", 32)
    monkeypatch.setattr(cuda_limits, "_MEMORY_BYTES", 1 << 12)

    def limits(cache_bytes: int, *seconds: float) -> dict[str, float]:
        times = iter(seconds)

        def seconds_of(call: object) -> float:
            assert callable(call)
            call()
            return next(times)

        measured = cuda_limits.CudaLimits(seconds_of, FakeGpu.place, torch.float16, 3e12, cache_bytes)
        return measured.measure()

    assert limits(1, 2.0, 8.0, 4.0) == {"dram": 4096 / 2, "matmul": 2 * 32**3 / 4, "dram_peak": 3e12}
    assert limits(1, 2.0, 2.0, 4.0)["dram"] == 2 * 4096 / 2  # a copy reads and writes
    assert limits(1 << 12, 2.0, 8.0, 4.0)["dram"] == 4 * 4096 / 2  # memory is more than caches


def test_the_dram_has_the_speed_of_its_data_sheet_else_of_its_clock() -> None:
    clock = {"memory_clock_rate": 1_000_000, "memory_bus_width": 1024}
    assert cuda_limits.dram_peak(SimpleNamespace(name=H100.name, **clock)) == 3350e9
    assert cuda_limits.dram_peak(SimpleNamespace(name="a GPU", **clock)) == 256e9
    assert cuda_limits.dram_peak(SimpleNamespace(name="a GPU")) is None


@pytest.mark.parametrize(("M", "limit", "percent"), [(1, "dram", 50.0), (3, "dram", 50.0), (8, "matmul", 80.0)])
def test_the_longer_of_reading_and_computing_is_the_limit(M: int, limit: str, percent: float) -> None:
    # Reading takes 0.5 ms, computing 0.1 ms a token.
    limits = {"dram": 1e9, "matmul": 1e10, "dram_peak": 2e9}
    kernel = Timed("k", "float", 0.0, 500_000, [Sample(1e-3, limits)])
    measurement = Measurement("gptq_gemm", 1000, 500, M, [kernel], by_roofline, Load(0.0, 0.0))
    assert measurement.limit_of(kernel) == limit
    assert measurement.percent(kernel).median == pytest.approx(percent)
    assert measurement.record()["kernels"][0]["percent_of_dram_peak"] == pytest.approx(25.0)


def test_every_algorithm_of_the_library_is_measured() -> None:
    headers = (Path(__file__).parents[2] / "csrc" / "cuda").glob("gemm_*.h")
    names = [re.findall(r'kName = "(\w+)";', header.read_text()) for header in headers]
    assert sorted(exllama_cuda.ALGORITHMS) == sorted(itertools.chain.from_iterable(names))


CONFORMANCE_CASES = [weights.Case(bits, 512, 64, size) for bits, size in ((2, 64), (3, 128), (4, 128), (8, 32))]


@pytest.mark.parametrize("case", CONFORMANCE_CASES, ids=str)
@pytest.mark.parametrize("dtype", weights.DTYPES)
def test_the_bounds_are_those_of_the_conformance_tests(case: weights.Case, dtype: torch.dtype) -> None:
    tested = weights.build(case)
    weight = cases.Weight(cases.Case(case.K, case.N, case.bits, case.group_size))
    for algorithm in exllama_cuda.ALGORITHMS if dtype != torch.float32 else ("scalar", "mma", "pipelined", "tiled"):
        expected = bounds.gemm_error(algorithm, tested, dtype)
        assert cuda_bounds.native_error(algorithm, weight, dtype) == expected
    for M in (1, 16, 100):
        x = torch.zeros(M, case.K, dtype=dtype)
        device = tiles.device_of(x.device)
        assert cuda_bounds.triton_error(weight, dtype, M, device) == triton_bounds.gemm_error(
            x, tested, truncates=False
        )
        on_gpu = tiles.Device("sm80", device.processors)
        assert cuda_bounds.triton_error(weight, dtype, M, on_gpu) < 1e-3


def test_every_form_of_a_weight_follows_it_to_a_device() -> None:
    weight = cases.Weight(cases.Case(256, 64, act_order=True))
    on_host = weight.q, weight.groups, weight.symmetric
    moved = weight.to(torch.device("meta"))
    forms = (moved.q, moved.zeros, moved.scales, moved.groups, moved.symmetric, moved.checkpoint.qweight)
    assert {form.device.type for form in (*forms, *moved.op_weight.tensors)} == {"meta"}
    assert {form.device.type for form in on_host} == {"cpu"}
    assert weight.to(torch.device("cpu")) is weight


OPTIONS = ["--device", "cuda", "--shapes", "256x128", "--M", "1", "64", "--seconds", "0", "--rounds", "1"]


class Native:
    """In place of gptq_gemm by the native library: the CPU's, which cannot do what ``mma`` names."""

    def __init__(self) -> None:
        self.named: list[str | None] = []
        self.wrong: str | None = None
        self._op = torch.ops.exllama.gptq_gemm

    def __call__(self, x: torch.Tensor, *arguments: object) -> torch.Tensor:
        algorithm = os.environ.get(exllama_cuda.VARIABLE)
        self.named.append(algorithm)
        if algorithm == "mma":
            raise ValueError("gptq_gemm: EXLLAMA_OPS_CUDA_ALGORITHM=mma cannot compute these arguments")
        out: torch.Tensor = self._op(x, *arguments)
        return out + (algorithm is not None and algorithm == self.wrong)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Native:
    """A GPU that is the host, with a native library that is the CPU's."""
    op = Native()
    monkeypatch.setattr(session, "TorchGpu", FakeGpu)
    monkeypatch.setattr(exllama_cuda, "reasons_against_native", list)
    monkeypatch.setattr(exllama_cuda, "reasons_against_triton", lambda: ["the host is no GPU"])
    monkeypatch.setattr(torch.ops.exllama, "gptq_gemm", op)
    monkeypatch.setattr(cuda_limits, "_MATMUL_SIZE", 32)
    monkeypatch.setattr(cuda_limits, "_MEMORY_BYTES", 1 << 12)
    # The plot is another test's: CI has no matplotlib.
    monkeypatch.setitem(sys.modules, "benchmarks.plot", SimpleNamespace(plot=lambda result, path: None))
    return op


def test_a_run_measures_every_algorithm_and_says_what_is_missing(
    native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(exllama_cuda.VARIABLE, "tiled")
    assert main([*OPTIONS, "--out", str(tmp_path)]) == 0
    assert set(native.named) == {None, *exllama_cuda.ALGORITHMS}
    assert os.environ[exllama_cuda.VARIABLE] == "tiled"
    stem = "4bit-g128-nvidia-h100-80gb-hbm3"
    result = json.loads((tmp_path / f"{stem}.json").read_text())
    assert result["command"].startswith("python -m benchmarks.run --device cuda --shapes 256x128")
    assert result["machine"]["compute_capability"] == "9.0"
    assert [(m["op"], m["M"]) for m in result["measurements"]] == [
        ("gptq_gemm", 1), ("gptq_gemm", 64), ("gptq_gemm_dx", 64),
    ]  # fmt: skip
    gemm, _, dx = ({kernel["name"]: kernel for kernel in m["kernels"]} for m in result["measurements"])
    ours = {f"exllama_ops {name}" for name in ("auto", "scalar", "pipelined", "tiled", "dense")}
    assert set(gemm) == {*ours, "torch dense fp32", "torch dense bf16", "torch dense fp16"}
    assert set(dx) == {"exllama_ops dx"}
    assert all(kernel["relative_error"] < 1e-3 for name, kernel in gemm.items() if name in ours)
    missing = {(kernel["name"], kernel["M"]): kernel["error"] for kernel in result["missing"]}
    assert missing["exllama_ops mma", 1].endswith("EXLLAMA_OPS_CUDA_ALGORITHM=mma cannot compute these arguments")
    assert missing["exllama_ops triton", None] == "Unsupported: the Triton kernels do not run: the host is no GPU"
    assert {"torch tinygemm bf16", "vLLM Marlin fp16", "gemlite fp16"} <= {name for name, _ in missing}
    table = (tmp_path / f"{stem}.md").read_text()
    assert table.startswith(capsys.readouterr().out)
    for part in ("NVIDIA H100 80GB HBM3, compute capability 9.0", "*limit: DRAM nominally, GB/s*", "3.35e+03"):
        assert part in table
    assert "auto than the best float peer" in table


def test_a_peer_that_waits_for_the_device_is_missing_and_the_run_goes_on(
    native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waiting(weight: cases.Weight, threads: int) -> Layer:
        def wait(x: torch.Tensor) -> torch.Tensor:
            FakeGpu.was_waited_for = True
            return x @ weight.dense

        return Layer(take=torch.Tensor.float, run=wait, give=lambda out: out, nbytes=1)

    monkeypatch.setattr(Cuda, "peers", [Peer("waiting", waiting)])
    assert main([*OPTIONS, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    errors = {kernel["name"]: kernel["error"] for kernel in json.loads(file.read_text())["missing"]}
    assert errors["waiting"].startswith("TimingError: the call waits for the device")


def test_a_run_on_a_gpu_is_drawn(native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the extra bench draws the plot")
    monkeypatch.delitem(sys.modules, "benchmarks.plot")
    assert main([*OPTIONS, "--peers", "fp16", "--out", str(tmp_path)]) == 0
    (drawing,) = tmp_path.glob("*.svg")
    for text in ("NVIDIA H100 80GB HBM3", "dense product", "exllama_ops dense", "DRAM limit"):
        assert f"{text} -->" in drawing.read_text()


def test_without_matplotlib_the_result_is_written_and_not_drawn(
    native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*OPTIONS, "--peers", "--out", str(tmp_path)]) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}
    assert "no plot is drawn: import of matplotlib halted" in capsys.readouterr().err


def test_a_wrong_result_of_an_algorithm_ends_the_run(
    native: Native, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native.wrong = "scalar"
    assert main([*OPTIONS, "--out", str(tmp_path)]) == 1
    assert "error: gptq_gemm, scalar: 128 of 128 elements lie beyond the bound" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_library_that_does_not_serve_is_no_kernel() -> None:
    if torch.cuda.is_available():
        pytest.skip("its library serves here")
    weight = cases.Weight(cases.Case(256, 64))
    for prepare in (exllama_cuda.gemm_dx, exllama_cuda.triton_gemm, exllama_cuda.triton_gemm_dx):
        with pytest.raises(exllama_cuda.Unsupported, match=r"kernels do not run: \S"):
            prepare(weight, torch.float16)
    with pytest.raises(exllama_cuda.Unsupported, match=r"the native CUDA kernels do not run: \S"):
        exllama_cuda.gemm(weight, "mma", torch.float16)


@pytest.mark.parametrize(("option", "value"), [("threads", "1"), ("isa", "avx2")])
def test_an_option_of_the_cpu_is_refused_by_name(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cuda", f"--{option}", value])
    assert f"--{option} is of the CPU; --device cuda has none" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*OPTIONS, "--out", str(tmp_path)]) == 1
    assert "error: --device cuda: torch sees no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_gpu_without_any_of_our_kernels_is_refused(
    native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exllama_cuda, "reasons_against_native", lambda: ["no nvcc"])
    monkeypatch.setattr(exllama_cuda, "reasons_against_triton", lambda: ["no gcc"])
    assert main([*OPTIONS, "--out", str(tmp_path)]) == 1
    assert "error: no kernel of ours runs here: native: no nvcc; Triton: no gcc" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_gpu_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.plot", SimpleNamespace(plot=lambda result, path: None))
    shape = ["--shapes", "512x256", "--M", "1", "64", "--seconds", "0.1"]
    assert main(["--device", "cuda", *shape, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    for measurement in json.loads(file.read_text())["measurements"]:
        kernels = {kernel["name"]: kernel for kernel in measurement["kernels"]}
        ours = ("auto", "scalar", "triton") if measurement["op"] == "gptq_gemm" else ("dx", "triton dx")
        assert {f"exllama_ops {name}" for name in ours} <= kernels.keys()
        assert all(kernel["ms"]["median"] > 0 for kernel in kernels.values())
        assert measurement["limits_per_s"]["dram"]["median"] > 1e10
