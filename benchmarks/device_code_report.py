"""The report of `benchmarks.device_code`: tables of what was counted, beside budgets, a roofline and the original."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpus import GPUS, Gpu

# Rows of a group in the kernels that are compared.
GROUP = 128
# Instructions on sm_80 that a 4-bit weight in groups of 128 may take, and that a multiply-add at 8 tokens may take.
BUDGETS = {"mma": (1.8, 0.25), "scalar": (2.5, 1.3)}
# Registers of the original kernels on sm_80 at M = 1 and at M = 8: one number where they are the same.
ORIGINAL_REGISTERS = {2: "94", 3: "124", 4: "56 / 91", 8: "128"}
# The instructions a weight of the same kernels, counted in their disassembly in the same way.
ORIGINAL = {2: (3.14, 7.72), 3: (2.98, 7.16), 4: (3.17, 10.41), 8: (6.37, 18.2)}
ROOFLINE = ("A100 80 GB", "H100 SXM", "RTX 4090", "B200")


def report(measured: dict[str, Any]) -> str:
    """The text of the report, as Markdown."""
    all_kernels = measured["kernels"]
    archs = sorted({kernel["arch"] for kernel in all_kernels})
    spilled = [kernel for kernel in all_kernels if kernel["spill_bytes"]]
    lines = [
        "# The machine code of the CUDA kernels",
        "",
        f"By `python -m benchmarks.device_code`, with {measured['nvcc']}. Nothing here ran on a GPU.",
        "",
        f"{len(all_kernels)} kernels for {', '.join(f'sm_{arch}' for arch in archs)}; "
        f"{len(spilled) or 'none'} with spilled registers. They are made from the PTX of the library, which has for",
        "sm_86 and sm_89 the machine code of sm_80.",
        "",
        "## Instructions a weight",
        "",
        "These are the instructions of a lane, in groups of 128, with loads and the end of the group. Rows with",
        "staging count also what brings x, scales and zero points into shared memory once for a thread block, in",
        "stages of 2048 rows, with x in order and scales of 16 bits. A loop for 8 tokens takes the same for fewer.",
        "The loops of pipelined bring all of this into shared memory themselves.",
        "",
    ]
    rows = [
        ("mma float16, 1 to 8 tokens", {"kernel": "mma", "dtype": "float16", "tokens": 8, "unit": GROUP}),
        ("mma bfloat16, 1 to 8 tokens", {"kernel": "mma", "dtype": "bfloat16", "tokens": 8, "unit": GROUP}),
        ("mma float16, 9 to 16", {"kernel": "mma", "dtype": "float16", "tokens": 16, "unit": GROUP}),
        ("mma float16, 17 to 32", {"kernel": "mma", "dtype": "float16", "tokens": 32, "unit": GROUP}),
        ("pipelined float16, 17 to 32", {"kernel": "pipelined", "dtype": "float16", "tokens": 32, "unit": GROUP}),
        ("pipelined float16, 33 and more", {"kernel": "pipelined", "dtype": "float16", "tokens": 64, "unit": GROUP}),
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
For other widths the same budget is moved by what the width changes, and by nothing else.

**mma.** Two weights share a register, so a pair costs one LOP3 and one HFMA2, which is 1.0 a weight. It also costs its
share of a shift that brings fields under the mantissa. That is 0.125 a weight for 4 bits, where one shift serves 2
places, 0.06 for 2 bits (4 places) and 0.1 for 3 bits (3 places). 3 bits take 0.15 more for the pair in the third bits
of three words. 8 bits take PRMT for LOP3 and no shift. HMMA take 0.125, and loads of words bits / 128. The rest of 1.8
is 0.5 for addresses, loads of x and ends of groups, which no width changes.

**scalar.** The budget is 2.5 and 1.3 for every width. q - z is exact, so an outlier of x costs nothing where q = z.
A weight therefore takes at least a LOP3, an FADD of its zero point, and an FFMA a row. The LOP3 leaves the field in
place and puts an exponent around it. "Least" below adds these shares:

- a shift for the upper half of a word: 0.125 for 4 bits, 0.06 for 2 bits, 0.22 for 3 bits, none for the PRMT of 8 bits;
- 0.06 LOP3 for the values of 3 bits in three words;
- loads of words, bits / 128, and of x for four columns, 1 / 16 a row.

The FADD could be spared only by fields as subnormal floats, with z times the sum of x taken off at the group's end.
That takes 2.3 at M = 1. Outliers would cost, and an infinite x would make inf - inf = NaN of a product that is inf.
Eight columns a lane would share loads of x, for 1.30 a MAC instead of 1.33, with 64 more sums in registers and half the
warps. Up to sm_80 neither would be faster: an SM adds and multiplies in 64 lanes, so that FADD and FFMA take longer
than all instructions take to issue.
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
The cells are cycles of an SM for 1000 weights of float16 mma in groups of 128, for 1, 16 and 32 tokens, with the
slowest in bold. DRAM brings bits / 8 a weight and the group's scale and zero point. The SM issues 128 lanes a cycle.
The tensor cores do multiply-adds of mma.sync with float32 sums. A pass serves up to 32 tokens. More tokens take several
passes, of which the later ones find W in L2 if it fits there.
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
    lines = ["## Registers", "", "The last column has the bytes of shared memory.", ""]
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
