"""The first hour on a GPU, without one: all of it walked, its loop with parts that fail, and what it reads of tools."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import device_code, sass
from benchmarks.peers import exllama_cuda
from cuda import emulated
from exllama_ops.backends.cuda import BACKEND
from exllama_ops.backends.native.compile import CUDA, find_compiler
from ptx_emulator.emulator import reasons_against
from tools.gpu_hour import hour, plan, process
from tools.gpu_hour.clocks import HostClock, copies
from tools.gpu_hour.hour import Hour
from tools.gpu_hour.part import Options
from tools.gpu_hour.part import run as run_part
from tools.gpu_hour.plan import PARTS
from tools.gpu_hour.records import Folder, Record, Result, Table
from tools.gpu_hour.report import write_report
from tools.gpu_hour.steps import build, constants, peers, profile, sanitize, smoke, tests, timing

ROOT = Path(__file__).parents[2]


def test_every_part_can_be_walked_without_a_device() -> None:
    command = [sys.executable, "-m", "tools.gpu_hour", "--dry-run"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = re.findall(r"^\| ([\w.]+) \| (\S+) \|", ended.stdout, re.MULTILINE)
    assert rows == [("part", "status"), *((part.name, "passed") for part in PARTS)]
    assert ended.stdout.count("not in a dry run: ") == len(PARTS)
    assert "75 right, 0 wrong" in ended.stdout


def test_every_part_ends_within_the_ten_minutes_of_a_command() -> None:
    for part in PARTS:
        assert part.minutes < part.limit_minutes < 10, part.name
        assert (ROOT / "tools" / "gpu_hour" / "steps" / f"{part.step}.py").is_file()
    assert sorted(plan.ALGORITHMS) == sorted(exllama_cuda.ALGORITHMS)


def test_the_page_has_the_steps_in_order_with_their_minutes() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    told = re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.MULTILINE)
    minutes = {step: sum(part.minutes for part in PARTS if part.step == step) for step in plan.STEPS}
    assert told == [(step, str(math.ceil(total))) for step, total in minutes.items()]


def test_a_process_ends_with_its_children_after_its_time(tmp_path: Path) -> None:
    child = "import os, time; open('child', 'w').write(str(os.getpid())); time.sleep(60)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    status = process.run([sys.executable, "-c", program], tmp_path / "log", 3.0, os.environ, tmp_path)
    assert status is None
    assert time.monotonic() - start < 30
    assert ended(int((tmp_path / "child").read_text()))


def ended(pid: int) -> bool:
    """Whether a process is no more, or a dead one that nobody has waited for."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z"):
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


class Machine:
    """In place of processes: parts with a result of their own, or an end without one."""

    def __init__(self, folder: Folder, **ends: Result | int | None) -> None:
        self.folder, self.ends = folder, {name.replace("__", "."): end for name, end in ends.items()}
        self.ran: list[str] = []
        self.limits: list[float] = []
        self.environments: list[Mapping[str, str]] = []
        self.now = 0.0

    def run(
        self, command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str], folder: Path
    ) -> int | None:
        name = command[3]
        self.ran.append(name)
        self.limits.append(seconds)
        self.environments.append(environment)
        log.write_text("first\nlast words\n")
        good = Result("passed", "well", data={"gpus": ["a GPU"]} if name == "environment" else {})
        end = self.ends.get(name, good)
        self.now += seconds if end is None else 30.0
        if isinstance(end, Result):
            end.write(self.folder.result(name))
            return 0
        return end


def hour_of(folder: Folder, machine: Machine, monkeypatch: pytest.MonkeyPatch, minutes: float | None = None) -> Hour:
    monkeypatch.setattr(hour.process, "run", machine.run)
    seconds = None if minutes is None else 60 * minutes
    return Hour(folder, seconds=seconds, clock=lambda: machine.now, sources="now")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    opened = Folder(tmp_path)
    opened.open(resume=False)
    return opened


def statuses(folder: Folder) -> dict[str, str]:
    records = (folder.record(part.name) for part in PARTS)
    return {record.part: record.result.status for record in records if record is not None}


def test_a_part_that_fails_stops_no_other(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(folder, build=Result("failed", "no"), smoke__mma=-11, smoke__tiled=None, profile=1)
    assert hour_of(folder, machine, monkeypatch).run(PARTS, resume=False) == []
    assert machine.ran == [part.name for part in PARTS]
    found = statuses(folder)
    assert (found.pop("build"), found.pop("smoke.mma"), found.pop("smoke.tiled")) == ("failed", "failed", "timeout")
    assert (found.pop("profile"), set(found.values())) == ("failed", {"passed"})
    crashed, cut = folder.record("smoke.mma"), folder.record("smoke.tiled")
    assert crashed is not None
    assert cut is not None
    assert (crashed.result.summary, crashed.result.lines) == ("its process ended by signal 11", ["first", "last words"])
    assert (cut.result.summary, cut.gpu, cut.seconds) == ("ended after 180 s", "a GPU", 180.0)


def test_a_call_ends_in_time_and_the_next_one_goes_on(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(folder)
    names = [part.name for part in PARTS]
    machine.ends[names[3]] = None
    left = hour_of(folder, machine, monkeypatch, minutes=3).run(PARTS, resume=False)
    assert machine.ran == names[:4]
    assert machine.limits[-1] == 180 - 90 - 5
    assert left == names[3:]
    assert list(statuses(folder)) == names[:3]
    machine.ends = {}
    hour_of(folder, machine, monkeypatch).run(PARTS, resume=True)
    assert machine.ran[4:] == ["environment", *left]


def test_what_has_all_of_a_call_is_not_begun_for_ever(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(folder, build=None)
    hour_of(folder, machine, monkeypatch, minutes=2).run(PARTS, resume=False)
    assert statuses(folder) == {"environment": "passed", "build": "timeout"}


def test_without_a_gpu_only_what_needs_none_is_run(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(folder, environment=Result("passed", "no GPU", data={"gpus": []}))
    left = hour_of(folder, machine, monkeypatch).run(PARTS, resume=False)
    assert machine.ran == ["environment", "build"]
    assert machine.limits == [120, 5400]
    assert statuses(folder) == {"environment": "passed", "build": "passed"}
    assert left == [part.name for part in PARTS[2:]]


def test_parts_use_the_library_that_is_carried(folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(folder)
    (part,) = (part for part in PARTS if part.name == "smoke.mma")
    hour_of(folder, machine, monkeypatch).run([part], resume=False)
    assert hour.LIBRARY_VARIABLE not in machine.environments[-1]
    folder.library.mkdir()
    hour_of(folder, machine, monkeypatch).run([part], resume=False)
    assert machine.environments[-1][hour.LIBRARY_VARIABLE] == str(folder.library.resolve())
    other = hour_of(folder, machine, monkeypatch)
    other.library = tmp_path
    other.run([part], resume=False)
    assert machine.environments[-1][hour.LIBRARY_VARIABLE] == str(tmp_path.resolve())


def test_the_report_says_what_failed_and_what_ran_on_other_sources(tmp_path: Path) -> None:
    table = Table("Times", ("M", "us"), [["1", "2.5"]])
    records = [
        Record("build", Result("passed", "built"), 61.0, "a GPU", "old"),
        Record("timing.in_order", Result("failed", "a | b", ["a line"], [table]), 59.0, "a GPU", "new"),
    ]
    text = write_report(tmp_path, records, ["profile"], "new")
    assert "GPU: a GPU. Sources: new. Parts: 1 passed, 1 failed; 2.0 minutes." in text
    assert "| build | passed | 61 | built (of other sources, old) |" in text
    assert "| timing.in_order | **failed** | 59 | a \\| b |" in text
    assert "Not run yet: profile." in text
    assert "- a line\n\nTimes\n\n| M | us |\n| --- | --- |\n| 1 | 2.5 |" in text
    assert (tmp_path / "report.md").read_text() == text


def test_a_library_that_an_earlier_call_left_is_built_anew_if_it_will_not_do(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = tmp_path / "cache" / "libexllama_cuda.so"
    made.parent.mkdir()
    made.write_bytes(b"code")
    (folder.library / "old").mkdir(parents=True)
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_LIBRARY", str(folder.library.resolve()))
    refused = 'echo "of other sources" >&2; exit 2'
    printed = f'{{"library": "{made}", "origin": "built", "seconds": 12.0}}'
    script = f"if [ -n \"$EXLLAMA_OPS_CUDA_LIBRARY\" ]; then {refused}; fi; echo '{printed}'"
    monkeypatch.setattr(build, "_COMMAND", ("sh", "-c", script))
    result = build.run("", Options(folder))
    assert (result.status, result.summary) == ("passed", f"built: {made}, 0.0 MiB, 12 s of compiling")
    assert [path.name for path in folder.library.iterdir()] == ["libexllama_cuda.so"]
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_LIBRARY", str(tmp_path / "named"))
    assert build.run("", Options(folder)).status == "failed"


class Ops:
    """The reference, with a fault."""

    def __init__(self, fault: str) -> None:
        self.fault, self.calls = fault, 0

    def gptq_gemm(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        return self._call("gptq_gemm", x, *args)

    def gptq_moe_gemm(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        return self._call("gptq_moe_gemm", x, *args)

    def _call(self, op: str, x: torch.Tensor, *args: Any) -> torch.Tensor:
        from exllama_ops import reference

        self.calls += 1
        if self.fault == "refuses":
            raise ValueError(f"{op}: EXLLAMA_OPS_CUDA_ALGORITHM=tiled cannot compute these arguments on this GPU")
        out: torch.Tensor = getattr(reference, op)(x, *args)
        if self.fault == "wrong":
            out[0, 3] = 2 * out.abs().max() + 1
        if self.fault == "other bits" and self.calls % 2 == 0:
            out[0, 3] = (
                torch.nextafter(out[0, 3].float(), torch.tensor(torch.inf)).to(out.dtype)
                if x.dtype == torch.float32
                else out[0, 3]
            )
        return out


# By experts row 0 is one of none.
@pytest.mark.parametrize(("fault", "counts"), [("", (60, 0, 0)), ("wrong", (30, 30, 0)), ("refuses", (0, 0, 30))])
def test_the_smoke_test_finds_a_wrong_element(fault: str, counts: tuple[int, int, int]) -> None:
    tally = smoke.check(Ops(fault), torch.device("cpu"), "tiled", (4,), (1,))
    assert (tally.right, len(tally.wrong), tally.refused) == counts
    assert smoke.result_of(tally).status == ("passed" if not fault else "failed")


def test_a_part_fails_where_another_backend_computes(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: object) -> None:
        BACKEND.say(["the driver is too old"])

    monkeypatch.setattr(timing, "run", warn)
    with warnings.catch_warnings():
        result = run_part("timing.in_order", Options(folder))
    assert result.status == "failed"
    assert "CudaBackendWarning: exllama_ops: the native CUDA kernels do not serve every GPU" in result.summary


def test_the_smoke_test_finds_other_bits_of_a_second_call() -> None:
    tally = smoke.check(Ops("other bits"), torch.device("cpu"), "tiled", (4,), (1,))
    assert [text.partition(": ")[2] for text in tally.wrong] == ["a second call has other bits"] * 5


@pytest.mark.slow
@pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")
@pytest.mark.parametrize("algorithm", plan.ALGORITHMS)
def test_the_smoke_test_passes_on_an_emulated_device(algorithm: str) -> None:
    tally = smoke.check(emulated.ops(80), torch.device("cpu"), algorithm, (4,), (1, 7))
    assert smoke.result_of(tally).status == "passed", tally.wrong
    assert tally.right >= 12


@pytest.mark.slow
@pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")
def test_the_smoke_test_of_the_other_ops_passes_on_an_emulated_device() -> None:
    tally = smoke.check_others(emulated.ops(80), torch.device("cpu"), (4,))
    assert smoke.result_of(tally).status == "passed", tally.wrong


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_the_kernels_that_measure_are_compiled_whole(arch: str, tmp_path: Path) -> None:
    """No loop that is timed has lost its work: four steps are unrolled in each."""
    if find_compiler(CUDA) is None:
        pytest.skip("needs nvcc")
    cubin = tmp_path / "rates.cubin"
    source = ROOT / "tools" / "gpu_hour" / "rates.cu"
    device_code.run_tool("nvcc", "-O3", "-std=c++17", f"-arch={arch}", "-cubin", str(source), "-o", str(cubin))
    try:
        codes = sass.kernels(device_code.run_tool("nvdisasm", "-c", str(cubin)))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    expected = {"Floats": ("FFMA", 32), "Mixed": ("LOP3", 16), "Mma": ("HMMA", 32), "4read": ("LDG", 8)}
    for kernel, (instruction, least) in expected.items():
        (code,) = (code for name, code in codes.items() if kernel in name and "one_at" not in name)
        assert len(re.findall(rf"\b{instruction}\b", code)) >= least, kernel


JUNIT = """<testsuites><testsuite>
<testcase classname="gpu.test_cuda" name="test_a"/>
<testcase classname="gpu.test_cuda" name="test_b"><failure message="assert 1 == 2
 where">...</failure></testcase>
<testcase classname="gpu.test_devices" name="test_c"><skipped message="needs two CUDA devices"/></testcase>
<testcase classname="gpu.test_devices" name="test_d"><skipped message="needs two CUDA devices"/></testcase>
</testsuite></testsuites>"""


def test_the_results_of_pytest_are_counted_and_skips_are_named() -> None:
    result = tests.result_of(JUNIT, 1)
    assert (result.status, result.summary) == ("failed", "1 failure, 1 passed, 2 skipped")
    assert result.lines == ["gpu.test_cuda.test_b: assert 1 == 2 where", "skipped 2: needs two CUDA devices"]
    only_skipped = re.sub(r"<testcase[^>]*(/>|test_b.*?</testcase>)\n", "", JUNIT, flags=re.DOTALL)
    assert tests.result_of(only_skipped, 0).status == "failed"


def test_every_file_with_a_test_for_a_gpu_is_run() -> None:
    files = tests.marked_files()
    assert {"tests/gpu/test_cuda.py", "tests/ops/test_errors.py"} <= set(files)
    assert not [name for name in files if name.startswith("tests/conformance")]


def test_what_a_sanitizer_finds_is_told() -> None:
    clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitize.result_of(clean, 0) == Result("passed", "0 errors")
    race = "========= Error: Race reported\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    found = sanitize.result_of(race, 86)
    assert (found.status, found.lines[0]) == ("failed", "Error: Race reported")
    assert found.summary == "1 hazard displayed (1 error, 0 warnings) (exit status 86)"
    assert sanitize.result_of("it was killed", -9).summary == "it has written no summary (exit status -9)"
    assert sanitize.result_of("no summary", 0).status == "failed"


NCU = """==PROF== Connected
"ID","Kernel Name","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"
"0","void gemm_mma<4>(Weight)","(64, 1, 1)","GPU Speed Of Light Throughput","Duration","us","12.5"
"0","void gemm_mma<4>(Weight)","(64, 1, 1)","Occupancy","Achieved Occupancy","%","24.1"
"1","dequantize(Weight)","(9, 1, 1)","GPU Speed Of Light Throughput","Duration","us","3.5"
==PROF== Disconnected
"""


def test_the_figures_of_the_profiler_are_a_row_for_each_launch() -> None:
    result = profile.result_of(NCU)
    (table,) = result.tables
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [(row["kernel"], row["Duration"], row["Achieved Occupancy"]) for row in rows] == [
        ("void gemm_mma<4>", "12.5 us", "24.1 %"),
        ("dequantize", "3.5 us", ""),
    ]
    assert profile.result_of("==ERROR== Failed to find metric").status == "failed"


def test_measured_constants_take_the_places_of_those_of_the_cost_model() -> None:
    header = constants.header_of_rates(ROOT / "csrc" / "cuda").read_text()
    measured = {"arch": 90.0, "mma": 640.04, "blas": 1500.0, "kLaunchUs": 1.234, "kLaunchCycles": 2222.2}
    row, *others = constants.lines_of(header, measured)
    new, old = (values.split(", ") for values in re.findall(r"\{([^{}]*)\}", row))
    assert [(a, b) for a, b in zip(new, old, strict=True) if a != b] == [("640", "1024"), ("1500", "2048")]
    assert others
    for line in others:
        name = line.split()[3]
        assert line.startswith(f"inline constexpr double {name} = ")
        assert f"double {name} = {line.rpartition(' ')[2]};" in header


@pytest.mark.parametrize(("arch", "row"), [(103.0, "{103, "), (89.0, "{89, "), (50.0, "{50, ")])
def test_a_gpu_has_the_row_of_the_capability_below(arch: float, row: str) -> None:
    header = constants.header_of_rates(ROOT / "csrc" / "cuda").read_text()
    line = next(iter(constants.lines_of(header, {"arch": arch})))
    assert line.startswith(row)
    assert f"// was {{{ {103.0: 100, 89.0: 89, 50.0: 60}[arch] }, " in line


def test_every_constant_of_the_cost_model_that_a_gpu_can_tell_is_measured() -> None:
    printed = set(re.findall(r"(?:^|\\n|\")(\w+) %", (ROOT / "tools" / "gpu_hour" / "rates.cu").read_text()))
    header = constants.header_of_rates(ROOT / "csrc" / "cuda").read_text()
    (struct,) = re.findall(r"struct Rates \{(.*?)\};", header, re.DOTALL)
    assert set(re.findall(r"double (\w+);", struct)) <= printed | {"blas"}
    fitted = {"kNotOverlapped"}
    assert set(re.findall(r"^inline constexpr double (k\w+) =", header, re.MULTILINE)) - fitted <= printed


def test_the_table_of_times_names_the_algorithm_that_the_choice_missed() -> None:
    times = {1: {"cuBLAS": 2e-6, "auto": 1e-6, "mma": 1e-6}, 64: {"cuBLAS": 4e-6, "auto": 3e-6, "dense": 2e-6}}
    table = timing.table_of(timing._DRY_CASE, times)
    assert table.columns == ["M", "cuBLAS", "auto", "mma", "dense", "auto / cuBLAS"]
    assert table.rows == [["1", "2.0", "1.0", "1.0", "", "0.50"], ["64", "4.0", "3.0", "", "2.0", "0.75"]]
    assert timing.slow_choices(times) == ["M=64: dense is faster than the choice, 1.50 times"]


def test_copies_of_a_weight_are_more_than_the_caches_hold() -> None:
    clock = HostClock()
    clock.cache_bytes = 50 << 20
    assert [copies(clock, nbytes) for nbytes in (1, 10 << 20, 1 << 30)] == [64, 15, 2]


def test_the_benchmarks_are_a_table_of_medians() -> None:
    kernels = [{"name": "exllama_ops auto", "ms": {"median": 0.0125}}]
    measured = {
        "measurements": [{"op": "gptq_gemm", "M": 1, "kernels": kernels}, {"op": "gptq_gemm", "M": 16, "kernels": []}],
        "missing": [{"name": "gemlite fp16", "error": "ModuleNotFoundError: No module named 'gemlite'"}],
    }
    result = peers.result_of(measured)
    assert result.tables[0].rows == [["exllama_ops auto", "12.5", ""]]
    assert result.lines == ["gemlite fp16 is missing: ModuleNotFoundError: No module named 'gemlite'"]
