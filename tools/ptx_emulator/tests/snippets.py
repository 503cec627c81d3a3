"""One PTX kernel of many snippets: each thread runs them all on its own operands and writes every result."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptx_emulator.emulator import Emulator, build

MASK = {1: 1, 8: 0xFF, 16: 0xFFFF, 32: 0xFFFFFFFF, 64: 0xFFFFFFFFFFFFFFFF}


@dataclass(frozen=True)
class Snippet:
    """PTX that sets $d from $a, $b and $c, registers of `widths` bits (1 is a predicate), and what $d then is."""

    text: str
    expected: Callable[[int, int, int], int]
    widths: tuple[int, int, int, int] = (32, 32, 32, 32)

    def __str__(self) -> str:
        return self.text


def _declare(width: int, name: str) -> str:
    return f".reg .{'pred' if width == 1 else f'b{width}'} {name};"


def _kernel(snippets: Sequence[Snippet], threads: int) -> str:
    lines = [
        ".version 8.0", ".target sm_80", ".address_size 64",
        ".visible .entry snippets(.param .u64 operands, .param .u64 results)", "{",
        ".reg .b64 %rd<10>; .reg .b32 %r<4>;",
        "ld.param.u64 %rd1, [operands]; ld.param.u64 %rd2, [results];",
        "mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, 24; add.s64 %rd1, %rd1, %rd3;",
        "mul.wide.u32 %rd3, %r1, 8; add.s64 %rd2, %rd2, %rd3;",
        "ld.global.u64 %rd4, [%rd1]; ld.global.u64 %rd5, [%rd1+8]; ld.global.u64 %rd6, [%rd1+16];",
    ]  # fmt: skip
    for index, snippet in enumerate(snippets):
        names = ("$d", "$a", "$b", "$c")
        text = snippet.text
        for name in names:
            text = text.replace(name, f"%{name[1]}x")
        lines += ["{", " ".join(_declare(w, f"%{n[1]}x") for w, n in zip(snippet.widths, names, strict=True))]
        for width, name, source in zip(snippet.widths[1:], names[1:], ("%rd4", "%rd5", "%rd6"), strict=True):
            register = f"%{name[1]}x"
            if width == 1:
                lines.append(f"{{ .reg .b64 %one; and.b64 %one, {source}, 1; setp.ne.u64 {register}, %one, 0; }}")
            else:
                lines.append(f"cvt.u{width}.u64 {register}, {source};")
        lines.append(text)
        width = snippet.widths[0]
        lines.append("selp.u64 %rd7, 1, 0, %dx;" if width == 1 else f"cvt.u64.u{width} %rd7, %dx;")
        lines += [f"st.global.u64 [%rd2+{8 * threads * index}], %rd7;", "}"]
    return "\n".join([*lines, "ret;", "}"])


def run(snippets: Sequence[Snippet], operands: Sequence[tuple[int, int, int]], folder: Path) -> list[list[int]]:
    """The results of each snippet for each triple of operands."""
    path = folder / "snippets.ptx"
    path.write_text(_kernel(snippets, len(operands)))
    given = (ctypes.c_uint64 * (3 * len(operands)))(*(value for triple in operands for value in triple))
    results = (ctypes.c_uint64 * (len(snippets) * len(operands)))()
    emulator = Emulator(build(ptx_files=[path]))
    emulator.launch("snippets", [1], [len(operands)], [ctypes.addressof(given), ctypes.addressof(results)])
    count = len(operands)
    return [list(results[index * count : (index + 1) * count]) for index in range(len(snippets))]


def draw(interesting: Sequence[int], bits: int, count: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """Triples of interesting and of random patterns."""
    source = random.Random(seed)

    def one() -> int:
        return source.choice(interesting) if source.random() < 0.5 else source.getrandbits(bits)

    return [(one(), one(), one()) for _ in range(count)]
