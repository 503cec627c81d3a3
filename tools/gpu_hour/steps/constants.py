"""What the cost model of select_gemm takes a GPU to be, measured, as JSON and as lines of its header."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from exllama_ops.backends.native.compile import CUDA, find_compiler
from tools.gpu_hour.clocks import GraphClock
from tools.gpu_hour.part import Options
from tools.gpu_hour.records import Result, Table

ROOT = Path(__file__).resolve().parents[3]
_SOURCE = Path(__file__).resolve().parents[1] / "rates.cu"
_BLAS_SIZE = 8192
_ROW = re.compile(r"^ *\{(\d+), ([^}]*)\},.*$", re.MULTILINE)
_CONSTANT = re.compile(r"^inline constexpr double (k\w+) = ([\d.]+);$", re.MULTILINE)
# What stands in the place of a device in a dry run: numbers that no GPU has.
_STAND_IN = {"arch": 90, "dram_bytes": 1.0, "floats": 2.0, "mma": 3.0, "blas": 4.0}


def run(what: str, options: Options) -> Result:
    """Measure, and write what csrc/cuda would have to say."""
    header = header_of_rates(ROOT / "csrc" / "cuda")
    if options.dry:
        lines = list(lines_of(header.read_text(), _STAND_IN))
        return Result("passed", f"lines of {header.name}", lines, not_walked=["every number: they stand for none"])
    compiler = find_compiler(CUDA)
    if compiler is None:
        return Result("skipped", "there is no nvcc to compile the kernels that measure")
    measured = _measure(compiler.command)
    measured["blas"] = _blas_rate(measured)
    lines = list(lines_of(header.read_text(), measured))
    rows = [[name, f"{value:g}"] for name, value in measured.items()]
    summary = "; ".join(f"{name} {measured[name]:.4g}" for name in ("dram_gb_per_s", "ghz", "mma", "blas", "kLaunchUs"))
    table = Table(f"Measured; the lines for {header.name} are above", ("name", "value"), rows)
    return Result("passed", summary, lines, [table], dict(measured))


def _measure(nvcc: tuple[str, ...]) -> dict[str, float]:
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    with TemporaryDirectory() as scratch:
        program = str(Path(scratch) / "rates")
        subprocess.run([*nvcc, "-O3", "-std=c++17", f"-arch=sm_{arch}", str(_SOURCE), "-o", program], check=True)
        printed = subprocess.run([program], check=True, stdout=subprocess.PIPE, text=True).stdout
    return {name: float(value) for name, value in (line.split() for line in printed.splitlines())}


def _blas_rate(measured: Mapping[str, float]) -> float:
    """Multiply-adds of an SM in a cycle in a large product of float16."""
    clock = GraphClock()
    a, b = (torch.randn(_BLAS_SIZE, _BLAS_SIZE, device=clock.place, dtype=torch.float16) for _ in range(2))
    cycles = clock.seconds([lambda: a @ b] * 4) * measured["ghz"] * 1e9
    return float(_BLAS_SIZE**3 / cycles / measured["sm_count"])


def header_of_rates(folder: Path) -> Path:
    """The header that has the table of rates."""
    (header,) = (path for path in sorted(folder.glob("*.h")) if "Rates kRates[]" in path.read_text())
    return header


def lines_of(header: str, measured: Mapping[str, float]) -> Iterator[str]:
    """The lines of a header with what was measured in the place of what it says; what was not stays.

    Args:
        header: has ``struct Rates``, its table and constants.
        measured: by the names of the header; ``arch`` names the row.
    """
    (struct,) = re.findall(r"struct Rates \{(.*?)\};", header, re.DOTALL)
    names = re.findall(r"^ *double (\w+);", struct, re.MULTILINE)
    rows = {int(arch): values.split(", ") for arch, values in _ROW.findall(header)}
    arch = max((row for row in rows if row <= measured["arch"]), default=min(rows))
    values = [
        _number(measured[name]) if measured.get(name) else old for name, old in zip(names, rows[arch], strict=True)
    ]
    yield f"{{{measured['arch']:.0f}, {', '.join(values)}}},  // was {{{arch}, {', '.join(rows[arch])}}}"
    for name, old in _CONSTANT.findall(header):
        if measured.get(name):
            yield f"inline constexpr double {name} = {_number(measured[name])};  // was {old}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
