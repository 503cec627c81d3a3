"""What nvcc makes of the hot CUDA kernels: registers, shared memory, spills, and instructions a weight. Needs no GPU.

    python -m benchmarks.device_code                 # every architecture: many minutes of nvcc on one core
    python -m benchmarks.device_code --arch 80       # this one anew, beside what the file has of the others

The counts are those of `benchmarks.sass`. They cover the loop over rows of W, with its loads and the end of each group
of 128, and are divided by the weights that a lane has had. For `mma` they include what brings x, scales and zero points
into shared memory.

nvdisasm is looked for in PATH, in CUDA's folder and in the wheels of PyPI that have it (`pip install --no-deps
nvidia-cuda-nvdisasm`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.sass import Code, kernels
from exllama_ops.backends.native.compile import CUDA

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cuda-device-code"
ARCHS = (75, 80, 86, 89, 90, 100, 120)
SOURCES = ("gemm_mma", "gemm_scalar", "gemm_tiled", "dequantize", "shuffle")
GROUP = 128
# Instructions a weight on sm_80 that a 4-bit weight in groups of 128 may take, and one multiply-add at 8 tokens.
BUDGETS = {"mma": (1.8, 0.25), "scalar": (2.5, 1.3)}
# Registers of the original kernels on sm_80 at M = 1 and at M = 8: one number where they are the same.
ORIGINAL_REGISTERS = {2: "94", 3: "124", 4: "56 / 91", 8: "128"}
# Their instructions a weight were counted in their disassembly in the same way.
ORIGINAL = {2: (3.14, 7.72), 3: (2.98, 7.16), 4: (3.17, 10.41), 8: (6.37, 18.2)}


class Gpu(NamedTuple):
    """One GPU of a compute capability, by data sheets and boost clocks. csrc/cuda/cost.h has these figures.

    Attributes:
        lanes: instructions of a lane that an SM issues in a cycle.
        floats: multiply-adds or sums of float32 of an SM in a cycle.
        mma: multiply-adds of 16 bits with float32 sums of an SM in a cycle by mma.sync; GeForce cards have half the
            rate of workstation cards.
        blas: the same by the chip's own instructions, which need another layout of W on H100 and B200.
    """

    arch: int
    name: str
    sms: int
    ghz: float
    dram_gb_per_s: float
    l2_mib: int
    lanes: int
    floats: int
    mma: int
    blas: int

    @property
    def dram_bytes_per_cycle(self) -> float:
        """The share of DRAM bandwidth of one SM."""
        return self.dram_gb_per_s / (self.sms * self.ghz)


GPUS = (
    Gpu(60, "P100", 56, 1.48, 732, 4, 64, 64, 0, 64),
    Gpu(61, "P40", 30, 1.53, 346, 3, 128, 128, 0, 128),
    Gpu(70, "V100", 80, 1.53, 900, 6, 128, 64, 0, 512),
    Gpu(75, "T4", 40, 1.59, 320, 4, 128, 64, 512, 512),
    Gpu(80, "A100 80 GB", 108, 1.41, 2039, 40, 128, 64, 1024, 1024),
    Gpu(86, "RTX 3090", 82, 1.70, 936, 6, 128, 128, 256, 256),
    Gpu(89, "RTX 4090", 128, 2.52, 1008, 72, 128, 128, 256, 256),
    Gpu(90, "H100 SXM", 132, 1.83, 3350, 50, 128, 128, 1024, 2048),
    Gpu(100, "B200", 148, 1.85, 8000, 126, 128, 128, 1024, 4096),
    Gpu(120, "RTX 5090", 170, 2.41, 1792, 96, 128, 128, 256, 256),
)
ROOFLINE = ("A100 80 GB", "H100 SXM", "RTX 4090", "B200")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_code", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="only this compute capability")
    args = parser.parse_args()
    nvcc = _run("nvcc", "--version").splitlines()[-1]
    file = RESULTS.with_suffix(".json")
    measured: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if measured.get("nvcc") != nvcc:
        measured = {"command": "python -m benchmarks.device_code", "nvcc": nvcc, "kernels": []}
    for arch in args.arch or ARCHS:
        others = [kernel for kernel in measured["kernels"] if kernel["arch"] != arch]
        measured["kernels"] = sorted([*others, *_kernels_of(arch)], key=lambda kernel: int(kernel["arch"]))
        file.write_text(json.dumps(measured, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(_report(measured))


def _kernels_of(arch: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            sys.stderr.write(f"sm_{arch} {source}\n")
            cubin = Path(folder) / f"{source}.cubin"
            code = f"arch={_ptx_for(arch)},code=sm_{arch}"
            flags = (*CUDA.compile_flags, "-gencode", code, "-cubin", "-Xptxas", "-v")
            said = _run("nvcc", *flags, str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", str(cubin))
            codes = kernels(_run("nvdisasm", "-c", str(cubin)))
            for name, resources in _resources(said).items():
                kernel = {"arch": arch, **_described(name), **resources}
                yield kernel | _per_weight(kernel, codes[name])


def _ptx_for(arch: int) -> str:
    """The PTX of which the library has machine code for an architecture, or would have."""
    known = (int(ptx.removeprefix("compute_")) for ptx in CUDA.device_code)
    return f"compute_{max(ptx for ptx in known if ptx <= arch)}"


def _resources(said: str) -> dict[str, dict[str, int]]:
    """What ptxas -v says of each kernel."""
    found = {}
    for part in said.split("Compiling entry function '")[1:]:
        numbers = {
            name: int(match[1]) if (match := re.search(pattern, part)) else 0
            for name, pattern in {
                "registers": r"Used (\d+) registers",
                "shared_bytes": r"(\d+) bytes smem",
                "spill_bytes": r"(\d+) bytes spill stores",
            }.items()
        }
        found[part.split("'")[0]] = numbers
    return found


def _described(mangled: str) -> dict[str, Any]:
    """A kernel's name and template arguments."""
    match = re.search(r"(?:cuda)(\d+)", mangled)
    assert match is not None
    start = match.end()
    name = mangled[start : start + int(match[1])]
    arguments = re.findall(r"L[ib](\d+)E", mangled)
    dtype = "bfloat16" if "nv_bfloat16" in mangled else "float16"
    if name == "gemm_mma":
        bits, tiles, unit = map(int, arguments)
        return {"kernel": "mma", "bits": bits, "dtype": dtype, "tokens": 8 * tiles, "unit": unit}
    if name == "gemm_scalar":
        bits, shuffled, rows = map(int, arguments)
        return {"kernel": "scalar", "bits": bits, "shuffled": bool(shuffled), "tokens": rows}
    return {"kernel": name, "arguments": list(map(int, arguments))}


def _per_weight(kernel: dict[str, Any], text: str) -> dict[str, Any]:
    """Instructions of a lane for each weight that it has, in groups of 128; staged: by tokens, with the staging."""
    if kernel["kernel"] == "mma" and (kernel["dtype"], kernel["arch"]) != ("bfloat16", 75):  # which has no such mma
        # 256 rows of 32 columns, which the lanes of a warp share; every unit ends with eight FFMA for eight tokens.
        rows, tokens, bits = 256, kernel["tokens"], kernel["bits"]
        needs = {"macs": rows * 32 * tokens, "LDG.E.128": rows * bits // 128, "FFMA": rows // kernel["unit"] * tokens}
        code = Code(text)
        counts: dict[str, Any] = {"per_weight": round(code.cheapest_cycle(needs) / rows, 2)}
        if (kernel["unit"], tokens) == (GROUP, 8):
            counts["staged"] = {str(M): round(_staged(code, bits, M), 3) for M in (1, 8)}
        return counts
    if kernel["kernel"] == "scalar" and kernel["shuffled"]:
        # A trip has the rows of W that a warp has of a stage; the last one of a group ends it, and begins the next with
        # four scales.
        rows = 64
        tokens, weights, trips = kernel["tokens"], 4 * rows, GROUP // rows
        words = {"LDG.E.128": rows * kernel["bits"] // 32}
        code = Code(text)
        inside = code.cheapest_cycle({"FFMA": weights * tokens, **words})
        at_the_end = code.cheapest_cycle({"FFMA": weights * tokens + 4 * tokens, **words, "LDG.E.64": 1})
        return {"per_weight": round(((trips - 1) * inside + at_the_end) / (trips * weights), 2)}
    return {}


def _staged(code: Code, bits: int, M: int) -> float:
    """Instructions a weight that stage data: each stage has 2048 rows, 512 for each of four warps, and two barriers.

    Beside the words a lane loads 16 bytes of x for each token, and the scales (two bytes each) and the zero points of
    four columns; it stores these as two times 16 bytes.
    """
    rows = 512
    needs = {
        "macs": rows * 32 * 8,
        "FFMA": rows // GROUP * 8,
        "BAR.SYNC": 2,
        "LDG.E.64": 1,
        "LDG.E.128": rows * bits // 128 + M,
        "STS.128": M + 2,
    }
    return code.cheapest_cycle(needs) / rows


# --- the report


def _report(measured: dict[str, Any]) -> str:
    all_kernels = measured["kernels"]
    archs = sorted({kernel["arch"] for kernel in all_kernels})
    spilled = [kernel for kernel in all_kernels if kernel["spill_bytes"]]
    lines = [
        "# The machine code of the CUDA kernels",
        "",
        f"By `python -m benchmarks.device_code`, with {measured['nvcc']}. Nothing here ran on a GPU.",
        "",
        f"{len(all_kernels)} kernels for {', '.join(f'sm_{arch}' for arch in archs)}; "
        f"{len(spilled) or 'none'} with spilled registers. From the PTX of the library, which has for sm_86 and sm_89",
        "the machine code of sm_80.",
        "",
        "## Instructions a weight",
        "",
        "Of a lane, in groups of 128, with loads and the end of the group; and without what brings x, scales and zero",
        "points into shared memory once for a thread block, but in the rows that name it: of stages of 2048 rows, x in",
        "order and scales of 16 bits. A loop for 8 tokens takes the same for fewer of them.",
        "",
    ]
    rows = [
        ("mma float16, 1 to 8 tokens", {"kernel": "mma", "dtype": "float16", "tokens": 8, "unit": GROUP}),
        ("mma bfloat16, 1 to 8 tokens", {"kernel": "mma", "dtype": "bfloat16", "tokens": 8, "unit": GROUP}),
        ("mma float16, 9 to 16", {"kernel": "mma", "dtype": "float16", "tokens": 16, "unit": GROUP}),
        ("mma float16, 17 to 32", {"kernel": "mma", "dtype": "float16", "tokens": 32, "unit": GROUP}),
        ("mma float16, 1 to 8, groups of 32", {"kernel": "mma", "dtype": "float16", "tokens": 8, "unit": 32}),
        ("scalar, 1 token", {"kernel": "scalar", "tokens": 1}),
        ("scalar, 2", {"kernel": "scalar", "tokens": 2}),
        ("scalar, 3 to 4", {"kernel": "scalar", "tokens": 4}),
        ("scalar, 5 to 8", {"kernel": "scalar", "tokens": 8}),
    ]
    for bits in (2, 3, 4, 8):
        head = ["", *(f"sm_{arch}" for arch in archs), "a MAC at 8 tokens, sm_80"]
        body = []
        for label, wanted in rows:
            values = [_value(all_kernels, {**wanted, "bits": bits, "arch": arch}) for arch in archs]
            at_80 = _value(all_kernels, {**wanted, "bits": bits, "arch": 80})
            per_mac = f"{at_80 / 8:.2f}" if at_80 and wanted["tokens"] == 8 else ""
            body.append([label, *(f"{value:.2f}" if value else "" for value in values), per_mac])
            if label.startswith("mma") and wanted["tokens"] == 8 and wanted["unit"] == GROUP:
                for M in (1, 8):
                    staged = [_staged_value(all_kernels, {**wanted, "bits": bits, "arch": arch}, M) for arch in archs]
                    at_80 = _staged_value(all_kernels, {**wanted, "bits": bits, "arch": 80}, M)
                    per_mac = f"{at_80 / 8:.2f}" if at_80 and M == 8 else ""
                    label_of_M = f"{label.split(',')[0]} with staging, M = {M}"
                    body.append([label_of_M, *(f"{value:.2f}" if value else "" for value in staged), per_mac])
        one, eight = ORIGINAL[bits]
        body.append(["the original, 1 token, float16", *(f"{one}" if a == 80 else "" for a in archs), ""])
        body.append(["the original, 8", *(f"{eight}" if a == 80 else "" for a in archs), f"{eight / 8:.2f}"])
        lines += [f"{bits} bits:", "", *_table(head, body), ""]
    lines += _budget_lines(all_kernels) + _roofline_lines(all_kernels) + _resource_lines(all_kernels, archs)
    return "\n".join(lines) + "\n"


def _value(all_kernels: list[dict[str, Any]], wanted: dict[str, Any], key: str = "per_weight") -> float | None:
    for kernel in all_kernels:
        if key in kernel and all(kernel.get(name) == value for name, value in wanted.items()):
            return float(kernel[key])
    return None


def _staged_value(all_kernels: list[dict[str, Any]], wanted: dict[str, Any], M: int) -> float | None:
    for kernel in all_kernels:
        if "staged" in kernel and all(kernel.get(name) == value for name, value in wanted.items()):
            return float(kernel["staged"][str(M)])
    return None


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def _budget_lines(all_kernels: list[dict[str, Any]]) -> list[str]:
    """The budgets for 4 bits, moved to other widths by `derived_budgets`, beside what was counted."""
    lines = ["## Budgets", "", *BUDGET_TEXT.strip().splitlines(), ""]
    body = []
    for bits in (2, 3, 4, 8):
        wanted = {"bits": bits, "arch": 80}
        mma = _value(all_kernels, {**wanted, "kernel": "mma", "dtype": "float16", "tokens": 8, "unit": GROUP})
        one = _value(all_kernels, {**wanted, "kernel": "scalar", "tokens": 1})
        eight = _value(all_kernels, {**wanted, "kernel": "scalar", "tokens": 8})
        if mma is None or one is None or eight is None:
            continue
        limits = derived_budgets(bits)
        values = (mma, mma / 8, one, eight / 8)
        cells = [f"{value:.2f} of {limit:.2f}" for value, limit in zip(values, limits, strict=True)]
        cells[2] += f", least {least_of_scalar(bits, 1):.2f}"
        cells[3] += f", least {least_of_scalar(bits, 8) / 8:.2f}"
        body.append([f"{bits}", *cells])
    head = ["bits", "mma, a weight", "a MAC at M = 8", "scalar, a weight at M = 1", "a MAC at M = 8"]
    return [*lines, *_table(head, body), ""]


BUDGET_TEXT = """
For 4 bits, on sm_80: mma 1.8 a weight and 0.25 a MAC at 8 tokens, scalar 2.5 at one token and 1.3 a MAC.
For other widths the same budget is moved by what the width changes and nothing else:

- mma: two weights share a register, so a pair costs one LOP3 and one HFMA2 (1.0 a weight), and its share of a shift
  that brings fields under the mantissa (one for 2 places of 4 bits, for 4 of 2, for 3 of 3): 4 bits 0.125 a weight, 2
  bits 0.06, 3 bits 0.1 and 0.15 for the pair in the third bits of three words; 8 bits take PRMT for LOP3 and no shift.
  HMMA take 0.125, loads of words bits / 128. The rest of 1.8, 0.5, is addresses, loads of x and ends of groups, which
  no width changes.
- scalar: 2.5 and 1.3 for every width. With q - z exact, so that an outlier of x costs nothing where
  q = z, a weight takes at least a LOP3 that leaves its field in place and puts an exponent around it, an FADD of its
  zero point, and an FFMA a row; its share of a shift for the upper half of a word (4 bits 0.125, 2 bits 0.06, 3 bits
  0.22 and 0.06 LOP3 for the values in three words; PRMT for 8 bits needs none), of loads of words, bits / 128, and of x
  for four columns, 1 / 16 a row: "least" below. The FADD can only be spared by fields as subnormal floats, with z
  times the sum of x taken off at the group's end: 2.3 at M = 1, where outliers cost, and where an infinite x makes
  inf - inf = NaN of a product that is inf. Eight columns a lane would share
  loads of x (1.30 a MAC for 1.33), with 64 more sums in registers and half the warps. Up to sm_80 neither would be
  faster: an SM adds and multiplies in 64 lanes, so that FADD and FFMA take longer than all takes to issue.
"""


def derived_budgets(bits: int) -> tuple[float, float, float, float]:
    """Instructions a weight and a MAC: mma, and scalar at one token and at eight."""
    shift = {2: 0.06, 3: 0.25, 4: 0.125, 8: 0.0}[bits]
    mma = BUDGETS["mma"][0] + shift - 0.125 + (bits - 4) / 128
    return mma, BUDGETS["mma"][1] + (mma - BUDGETS["mma"][0]) / 8, *BUDGETS["scalar"]


def least_of_scalar(bits: int, tokens: int) -> float:
    """Instructions a weight that any gemm_scalar with exact q - z takes, without ends of groups and the loop."""
    shift = {2: 0.06, 3: 0.28, 4: 0.125, 8: 0.0}[bits]
    return 2 + tokens + shift + bits / 128 + tokens / 16


def _roofline_lines(all_kernels: list[dict[str, Any]]) -> list[str]:
    lines = ["## Roofline", "", *ROOFLINE_TEXT.strip().splitlines(), ""]
    head = ["GPU", "DRAM, bytes an SM and cycle", *(f"{bits} bits" for bits in (2, 3, 4, 8))]
    body = []
    for gpu in GPUS:
        if gpu.name in ROOFLINE:
            bounds = (_bound(all_kernels, bits, gpu) for bits in (2, 3, 4, 8))
            body.append([gpu.name, f"{gpu.dram_bytes_per_cycle:.1f}", *bounds])
    return [*lines, *_table(head, body), ""]


ROOFLINE_TEXT = """
Cycles of an SM for 1000 weights of float16 mma in groups of 128, by DRAM (bits / 8 and the group's scale and zero
point), by issue (128 lanes a cycle) and by the tensor cores (multiply-adds a cycle of mma.sync with float32 sums), for
1, 16 and 32 tokens; the slowest in bold. A pass serves up to 32 tokens; more tokens take several passes, of which the
later ones find W in L2 if it fits there.
"""


def _bound(all_kernels: list[dict[str, Any]], bits: int, gpu: Gpu) -> str:
    dram = 1000 * (bits / 8 + (2 + bits / 8) / GROUP) / gpu.dram_bytes_per_cycle
    cells = []
    for tokens, tile in ((1, 8), (16, 16), (32, 32)):
        wanted = {"kernel": "mma", "dtype": "float16", "tokens": tile, "unit": GROUP, "bits": bits, "arch": 80}
        per_weight = _value(all_kernels, wanted)
        if per_weight is None:
            return ""
        times = {"DRAM": dram, "issue": 1000 * per_weight / gpu.lanes, "tensor": 1000 * tile / gpu.mma}
        slowest = max(times, key=lambda name: times[name])
        numbers = " / ".join(f"**{t:.0f}**" if name == slowest else f"{t:.0f}" for name, t in times.items())
        cells.append(f"{tokens}: {numbers} {slowest}")
    return "<br>".join(cells)


def _resource_lines(all_kernels: list[dict[str, Any]], archs: list[int]) -> list[str]:
    lines = ["## Registers", "", "And bytes of shared memory; of unshuffled words and of float16 where dtypes differ "
             "little.", ""]  # fmt: skip
    body = []
    labels: dict[str, dict[str, Any]] = {}
    for kernel in all_kernels:
        fields = {
            k: v
            for k, v in kernel.items()
            if k not in ("arch", "registers", "shared_bytes", "spill_bytes", "per_weight", "staged")
        }
        labels.setdefault(" ".join(_words(fields)), fields)
    for label, fields in sorted(labels.items()):
        cells = []
        for arch in archs:
            registers = _value(all_kernels, {**fields, "arch": arch}, "registers")
            cells.append("" if registers is None else f"{registers:.0f}")
        shared = _value(all_kernels, {**fields, "arch": archs[-1]}, "shared_bytes") or 0  # sm_75 has no bfloat16 mma
        # The original has kernels for one to eight tokens of float16.
        same = fields["kernel"] == "mma" and (fields["dtype"], fields["tokens"], fields["unit"]) == (
            "float16",
            8,
            GROUP,
        )
        original = ORIGINAL_REGISTERS[fields["bits"]] if same else ""
        body.append([label, *cells, original, f"{shared:.0f}"])
    head = ["kernel", *(f"sm_{a}" for a in archs), "the original, sm_80, M = 1 / 8", "shared bytes"]
    return [*lines, *_table(head, body)]


def _words(fields: dict[str, Any]) -> Iterator[str]:
    yield fields["kernel"]
    for name, value in fields.items():
        if name == "arguments":
            yield ", ".join(map(str, value))
        elif name == "shuffled":
            yield "shuffled" if value else "unshuffled"
        elif name != "kernel":
            yield f"{value}" if name == "dtype" else f"{value} {name}"


# --- programs


def _run(program: str, *arguments: str) -> str:
    result = subprocess.run([_program(program), *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{program} {' '.join(arguments)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def _program(name: str) -> str:
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvidia = importlib.util.find_spec("nvidia")
    for root in (nvidia.submodule_search_locations or ()) if nvidia else ():
        folders += map(str, Path(root).glob("*/bin"))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise FileNotFoundError(f"there is no {name}")
    return found


if __name__ == "__main__":
    main()
