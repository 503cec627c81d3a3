"""What nvcc makes of the CUDA kernels: registers, shared memory, spills, and instructions a weight. It needs no GPU.

    python -m benchmarks.device_code                 # every architecture: many minutes of nvcc on one core
    python -m benchmarks.device_code --arch 80       # this one anew, beside what the file has of the others
    python -m benchmarks.device_code --source gemm_mma  # these kernels anew, likewise

The instructions are counted by `benchmarks.sass` in the loop over rows of W, with its loads and the end of each group
of 128. They are divided by the weights that a lane has had. For `mma` they are counted once more with what brings x,
scales and zero points into shared memory. `pipelined` has these copies in its loop.

nvdisasm is looked for in PATH, in CUDA's folder, and in the wheels of PyPI that have it (`pip install --no-deps
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
from typing import Any

from benchmarks.device_code_report import GROUP, report
from benchmarks.sass import Code, kernels
from exllama_ops.backends.native.compile import CUDA

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cuda-device-code"
ARCHS = (75, 80, 86, 89, 90, 100, 120)
SOURCES = ("gemm_mma", "gemm_pipelined", "gemm_scalar", "gemm_tiled", "dequantize", "shuffle", "gather", "add_limbs")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_code", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="only this compute capability")
    parser.add_argument("--source", action="append", choices=SOURCES, help="only the kernels of this file")
    args = parser.parse_args()
    sources = tuple(args.source or SOURCES)
    nvcc = run_tool("nvcc", "--version").splitlines()[-1]
    file = RESULTS.with_suffix(".json")
    measured: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if measured.get("nvcc") != nvcc:
        measured = {"command": "python -m benchmarks.device_code", "nvcc": nvcc, "kernels": []}
    for arch in args.arch or ARCHS:
        anew = {source.removeprefix("gemm_") for source in sources}
        others = [kernel for kernel in measured["kernels"] if kernel["arch"] != arch or _source(kernel) not in anew]
        measured["kernels"] = sorted([*others, *_kernels_of(arch, sources)], key=lambda kernel: int(kernel["arch"]))
        file.write_text(json.dumps(measured, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(report(measured))


def _source(kernel: dict[str, Any]) -> str:
    """The file of a kernel, without what all of them begin with."""
    names = {"dequantize_columns": "dequantize", "gemm_tiled": "tiled"}
    name: str = kernel["kernel"]
    return names.get(name, name if name in ("mma", "pipelined", "scalar") else "shuffle")


def _kernels_of(arch: int, sources: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            if source == "gemm_pipelined" and arch < 80:  # which has no kernel, but a trap
                continue
            sys.stderr.write(f"sm_{arch} {source}\n")
            cubin = Path(folder) / f"{source}.cubin"
            code = f"arch={_ptx_for(arch)},code=sm_{arch}"
            flags = (*CUDA.compile_flags, "-gencode", code, "-cubin", "-Xptxas", "-v")
            said = run_tool("nvcc", *flags, str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", str(cubin))
            codes = kernels(run_tool("nvdisasm", "-c", str(cubin)))
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
    if name in ("gemm_mma", "gemm_pipelined"):
        bits, octets, unit = map(int, arguments)
        return {"kernel": name.removeprefix("gemm_"), "bits": bits, "dtype": dtype, "tokens": 8 * octets, "unit": unit}
    if name == "gemm_scalar":
        bits, shuffled, rows = map(int, arguments)
        return {"kernel": "scalar", "bits": bits, "shuffled": bool(shuffled), "tokens": rows}
    return {"kernel": name, "arguments": list(map(int, arguments))}


def _per_weight(kernel: dict[str, Any], text: str) -> dict[str, Any]:
    """Instructions of a lane for each weight that it has, in groups of 128, and with the staging for so many tokens."""
    if kernel["kernel"] == "mma" and (kernel["dtype"], kernel["arch"]) != ("bfloat16", 75):  # which has no such mma
        # 256 rows of 32 columns, which the lanes of a warp share; every unit ends with eight FFMA for eight tokens.
        rows, tokens, bits = 256, kernel["tokens"], kernel["bits"]
        needs = {"macs": rows * 32 * tokens, "LDG.E.128": rows * bits // 128, "FFMA": rows // kernel["unit"] * tokens}
        code = Code(text)
        counts: dict[str, Any] = {"per_weight": round(code.cheapest_cycle(needs) / rows, 2)}
        if (kernel["unit"], tokens) == (GROUP, 8):
            counts["staged"] = {str(M): round(_staged(code, bits, M), 3) for M in (1, 8)}
        return counts
    if kernel["kernel"] == "pipelined":
        return {"per_weight": round(_pipelined(Code(text), kernel["bits"], kernel["tokens"], kernel["unit"]), 2)}
    if kernel["kernel"] == "scalar" and kernel["shuffled"]:
        # A trip has the rows of W that a warp takes in a stage. The last trip of a group ends it, and begins the next
        # one with four scales.
        rows = 64
        tokens, weights, trips = kernel["tokens"], 4 * rows, GROUP // rows
        words = {"LDG.E.128": rows * kernel["bits"] // 32}
        code = Code(text)
        inside = code.cheapest_cycle({"FFMA": weights * tokens, **words})
        at_the_end = code.cheapest_cycle({"FFMA": weights * tokens + 4 * tokens, **words, "LDG.E.64": 1})
        return {"per_weight": round(((trips - 1) * inside + at_the_end) / (trips * weights), 2)}
    return {}


def _staged(code: Code, bits: int, M: int) -> float:
    """Instructions a weight in a whole stage of 2048 rows, of which each of the four warps along K has 512.

    A stage has two barriers. Beside the words a lane loads 16 bytes of x for each token, and the scales of two bytes
    and the zero points of four columns. It stores these as two times 16 bytes.
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


def _pipelined(code: Code, bits: int, tokens: int, unit: int) -> float:
    """Instructions a weight in 128 rows, with a thread's copies of as many: words, x, and a part of each group."""
    stage = {3: 128, 8: 32}.get(bits, 64)
    stages, units = GROUP // stage, GROUP // unit
    words, x = (stage * bits // 32 + 3) // 4, tokens * stage // (8 * 128)
    needs = {
        "macs": GROUP * 32 * tokens,
        "FFMA": units * tokens,
        "BAR.SYNC": stages,
        "LDGSTS": stages * (words + x) + min(stages, units),
    }
    return code.cheapest_cycle(needs) / GROUP


# --- programs


def run_tool(program: str, *arguments: str) -> str:
    """What a program of CUDA's toolkit prints.

    Raises:
        FileNotFoundError: there is no such program.
        RuntimeError: it failed.
    """
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
