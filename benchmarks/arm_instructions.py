"""How many instructions the inner loops take on Arm and with AVX2, counted in their machine code. It needs no Arm.

    python -m benchmarks.arm_instructions

It compiles csrc/cpu with g++ for this x86-64 machine and with aarch64-linux-gnu-g++, with the flags of the library, and
writes benchmarks/results/arm-instructions.md. A loop is the innermost one of a function with the most products.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from exllama_ops.backends.native.compile import CPU

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "arm-instructions.md"
# Multiply-adds of one instruction.
ARM_PRODUCTS = {"smlal": 4, "smlal2": 4, "sdot": 16, "udot": 16, "smmla": 32, "fmla": 4}
PRODUCTS = ARM_PRODUCTS | {"vpmaddwd": 16, "vpdpwssd": 16, "vpdpbusd": 32, "vfmadd231ps": 8}


class Loop(NamedTuple):
    """A row of the table: `function` is found in the mangled names of csrc/cpu/isa/`source`.cpp."""

    numbers: str
    isa: str
    source: str
    function: str
    bytes_of_x: int = 1  # products of bytes that make one multiply-add


LOOPS = (
    Loop("high, panels", "avx2", "avx2/kernels", r"Int16ProductILb0E.*ELi6ELi2E"),
    Loop("high, panels", "avx2_vnni", "avx2/kernels", r"Int16ProductILb1E.*ELi6ELi2E"),
    Loop("high, panels", "neon", "neon/kernels", r"Int16Product.*ELi5ELi2E"),
    Loop("high, panels", "neon_dotprod", "neon/dotprod", r"DotTile3addILb1ELi4E", 2),
    Loop("high, panels", "neon_i8mm", "neon/i8mm", r"MatrixTile3addILb1ELi4E", 2),
    Loop("medium, panels", "avx2_vnni", "avx2/kernels", r"11Int8Product.*ELi6ELi2E"),
    Loop("medium, panels", "neon_dotprod", "neon/dotprod", r"DotTile3addILb0ELi8E"),
    Loop("medium, panels", "neon_i8mm", "neon/i8mm", r"MatrixTile3addILb0ELi8E"),
    Loop("highest, panels", "avx2", "avx2/kernels", r"FloatProduct.*ELi6ELi2E"),
    Loop("highest, panels", "neon", "neon/dotprod", r"FloatProduct.*ELi5ELi4E"),
    Loop("high, 4 bits, M = 1", "neon_dotprod", "neon/dotprod_gemv", r"add_spanILi4ELb1ELi1ELi4E", 2),
    Loop("high, 4 bits, M = 4", "neon_dotprod", "neon/dotprod_gemv", r"add_spanILi4ELb1ELi4ELi2E", 2),
    Loop("medium, 4 bits, M = 1", "neon_dotprod", "neon/dotprod_gemv", r"add_spanILi4ELb0ELi1ELi4E"),
)


def main() -> None:
    rows = ["| numbers | ISA | instructions | products | other | multiply-adds | for 100 multiply-adds |"]
    rows.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    compilers = set()
    with tempfile.TemporaryDirectory() as folder:
        for loop in LOOPS:
            prefix = "aarch64-linux-gnu-" if loop.isa.startswith("neon") else ""
            code = _machine_code(prefix, loop.source, Path(folder))
            compilers.add(_run(f"{prefix}g++", "--version").splitlines()[0])
            names = [name for name in code if re.search(loop.function, name)]
            if len(names) != 1:
                raise SystemExit(f"{loop.source}: {len(names)} functions are like {loop.function}")
            found = inner_loop(code[names[0]])
            products = [PRODUCTS[name] for name in found if name in PRODUCTS]
            multiply_adds = sum(products) // loop.bytes_of_x
            share = f"{100 * len(found) / multiply_adds:.1f}"
            counts = [len(found), len(products), len(found) - len(products), multiply_adds, share]
            rows.append("| " + " | ".join([loop.numbers, loop.isa, *map(str, counts)]) + " |")
    RESULTS.write_text(
        "# Instructions of the inner loops, Arm beside AVX2\n\n"
        f"By `python -m benchmarks.arm_instructions`, with {' and '.join(sorted(compilers))}.\n"
        "Nothing here ran on an Arm.\n\n"
        "A multiply-add is one number of x times one weight. Registers of AVX2 have 256 bits, and those of NEON 128.\n"
        "Rows with an M also read the words and unpack them.\n\n" + "\n".join(rows) + "\n"
    )


def _machine_code(prefix: str, source: str, folder: Path) -> dict[str, list[tuple[int, str, str]]]:
    """The address, name and operands of each instruction, by function."""
    compiled = folder / f"{source.replace('/', '-')}.o"
    if not compiled.exists():
        flags = [*CPU.compile_flags, f"-I{ROOT / 'csrc'}"]
        file = ROOT / "csrc" / "cpu" / "isa" / f"{source}.cpp"
        _run(f"{prefix}g++", *flags, "-c", str(file), "-o", str(compiled))
    functions: dict[str, list[tuple[int, str, str]]] = {}
    for line in _run(f"{prefix}objdump", "-d", "--no-show-raw-insn", str(compiled)).splitlines():
        if named := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            functions[named[1]] = []
        elif instruction := re.match(r"\s+([0-9a-f]+):\s+(?:\{vex\} )?(\S+)\s*(.*)$", line):
            functions[next(reversed(functions))].append((int(instruction[1], 16), instruction[2], instruction[3]))
    return functions


def inner_loop(code: list[tuple[int, str, str]]) -> list[str]:
    """The names of the instructions of the innermost loop with the most products."""
    addresses = {address for address, _, _ in code}
    loops = []
    for address, name, operands in code:
        target = re.search(r"([0-9a-f]+) <", operands)
        first = int(target[1], 16) if target and name.startswith(("j", "b", "cb", "tb")) else address + 1
        if first <= address and first in addresses:
            loops.append((first, address))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[name for address, name, _ in code if first <= address <= last] for first, last in inner]
    return max(bodies, key=lambda body: sum(name in PRODUCTS for name in body))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
