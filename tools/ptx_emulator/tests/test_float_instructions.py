"""Floating-point instructions against exact rational arithmetic rounded once (exact.py), bit for bit but for NaNs."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction

import pytest

from ptx_emulator.tests import exact
from ptx_emulator.tests.exact import BF16, F16, F32, F64, Format
from ptx_emulator.tests.snippets import MASK, Snippet, draw, run

# Zeros, subnormals, the smallest and largest normals, halves and ties, infinities, NaN, integers' limits.
F32_VALUES = [
    0.0,
    1.0,
    1.5,
    2.0,
    0.5,
    3.0,
    2.5,
    -0.75,
    65504.0,
    65520.0,
    6e-8,
    1e-7,
    2.0**31,
    2.0**32,
    1e10,
    3.4028235e38,
]
INTERESTING_F32 = [struct.unpack("<I", struct.pack("<f", s * v))[0] for v in F32_VALUES for s in (1, -1)]
INTERESTING_F32 += [
    1,
    0x80000001,
    0x007FFFFF,
    0x00800000,
    0x7F800000,
    0xFF800000,
    0x7FC00000,
    0x3F800001,
    0x33000001,
    0x4F000000,
]
INTERESTING_F16 = [
    0,
    0x8000,
    1,
    0x8001,
    0x03FF,
    0x0400,
    0x3C00,
    0x3C01,
    0xBC00,
    0x7BFF,
    0xFBFF,
    0x7C00,
    0xFC00,
    0x7E00,
    0x3800,
]
INTERESTING_BF16 = [
    0,
    0x8000,
    1,
    0x8001,
    0x007F,
    0x0080,
    0x3F80,
    0x3F81,
    0xBF80,
    0x7F7F,
    0xFF7F,
    0x7F80,
    0xFF80,
    0x7FC0,
    0x3F00,
    0x4B80,
]
COUNT = 256


def pairs(interesting: list[int]) -> list[tuple[int, int, int]]:
    """Operands that hold two 16-bit values, in registers of 32 bits."""
    lows, highs = draw(interesting, 16, COUNT, 1), draw(interesting, 16, COUNT, 2)
    return [
        tuple(high << 16 | low for high, low in zip(*triples, strict=True)) for triples in zip(highs, lows, strict=True)
    ]


def near(triples: list[tuple[int, int, int]], width: int) -> list[tuple[int, int, int]]:
    """The same, with every third c close to -a * b or -a: cancellation, where a double rounding would show."""
    close = []
    for index, (a, b, c) in enumerate(triples):
        format = {32: F32, 64: F64}[width]
        if index % 3 == 0 and format.is_finite(a) and format.is_finite(b):
            product = exact.mul(format, a, b)
            c = exact.negative(format, product) + (index % 5 - 2) & MASK[width]
        close.append((a, b, c))
    return close


def specials(format: Format) -> list[tuple[int, int, int]]:
    """Every pair of both zeros, both infinities, NaN, one and a subnormal: a random draw has few of them."""
    values = [0, format.infinity, format.infinity | 1 << format.fraction_bits - 1, format.round(Fraction(1)), 1]
    values += [exact.negative(format, 0), exact.negative(format, format.infinity)]
    return [(a, b, values[(index + other) % 7]) for index, a in enumerate(values) for other, b in enumerate(values)]


# The product is a tie of bfloat16 and c, far below it, decides: what is rounded twice goes wrong.
TIES = [(0x3FC0, b, c) for b in (0x3F81, 0x3F83) for c in (0x2B80, 0xAB80, 0x0D80, 0x8D80)]
WIDE = [bits << 32 for bits in INTERESTING_F32] + [0x7FF0000000000000, 0x3FF0000000000000, 0x41E0000000000000]
OPERANDS = {
    "f32": near(draw(INTERESTING_F32, 32, COUNT), 32) + specials(F32),
    "f64": near(draw(WIDE, 64, COUNT), 64) + specials(F64),
    "f16": pairs(INTERESTING_F16) + specials(F16),
    "bf16": pairs(INTERESTING_BF16) + specials(BF16) + TIES,
}
FORMATS = {"f32": F32, "f64": F64, "f16": F16, "bf16": BF16}


def each_half(format: Format, function: Callable[..., int]) -> Callable[..., int]:
    def both(a, b, c):
        low = function(a & 0xFFFF, b & 0xFFFF, c & 0xFFFF)
        return function(a >> 16, b >> 16, c >> 16) << 16 | low

    return both


def flushed(function: Callable[..., int]) -> Callable[..., int]:
    """.ftz of f32: on the operands and on the result."""
    return lambda a, b, c: F32.flush(function(*(F32.flush(x & MASK[32]) for x in (a, b, c))))


def saturated(format: Format, bits: int) -> int:
    one = format.round(Fraction(1))
    value = format.as_float(bits)
    return bits if 0 < value < 1 else one if value >= 1 else 0


def rectified(format: Format, bits: int) -> int:
    return format.nan if format.is_nan(bits) else bits if format.as_float(bits) > 0 else 0


def compared(name: str, format: Format) -> Callable[..., bool]:
    """A comparison of setp: false for NaN, or true if its name ends in u."""

    def function(a, b, c):
        x, y = format.as_float(a), format.as_float(b)
        if math.isnan(x) or math.isnan(y):
            return name.endswith("u") or name == "nan"
        return {
            "eq": x == y,
            "ne": x != y,
            "lt": x < y,
            "le": x <= y,
            "gt": x > y,
            "ge": x >= y,
            "num": True,
            "nan": False,
        }[name if name in ("num", "nan") else name[:2]]

    return function


def real(function: Callable[[float], float]) -> Callable[..., int]:
    """A function of f32 that the emulator rounds correctly where the device approximates."""

    def of_bits(a, b, c):
        x = F32.as_float(a)
        try:
            y = function(x)
        except (ValueError, ZeroDivisionError, OverflowError):
            return -1  # not compared: a pole or a domain error, tested apart
        return F32.of_float(y) if y == 0 or not math.isfinite(y) else F32.round(Fraction(y))

    return of_bits


def arithmetic(kind: str) -> list[tuple[str, Callable[..., int]]]:
    """The instructions that all formats have: (text with the type in braces, expected)."""
    f = FORMATS[kind]
    return [
        (f"add.{kind} $d, $a, $b;", lambda a, b, c: exact.add(f, a, b)),
        (f"sub.{kind} $d, $a, $b;", lambda a, b, c: exact.add(f, a, exact.negative(f, b))),
        (f"mul.{kind} $d, $a, $b;", lambda a, b, c: exact.mul(f, a, b)),
        (f"fma.rn.{kind} $d, $a, $b, $c;", lambda a, b, c: exact.fma(f, a, b, c)),
        (f"min.{kind} $d, $a, $b;", lambda a, b, c: exact.extremum(f, a, b, largest=False)),
        (f"max.{kind} $d, $a, $b;", lambda a, b, c: exact.extremum(f, a, b, largest=True)),
        (f"neg.{kind} $d, $a;", lambda a, b, c: exact.negative(f, a)),
        (f"abs.{kind} $d, $a;", lambda a, b, c: a & f.nan),
    ]


def halves(kind: str) -> list[Snippet]:
    f = FORMATS[kind]
    both = [
        *arithmetic(kind),
        *(
            (t.replace(kind, f"relu.{kind}"), lambda a, b, c, e=e: rectified(f, e(a, b, c)))
            for t, e in arithmetic(kind)[3:4]
        ),
    ]
    both += [(f"max.NaN.{kind} $d, $a, $b;", lambda a, b, c: exact.extremum(f, a, b, largest=True, propagates=True))]
    snippets = [
        Snippet(text, lambda a, b, c, e=e: e(a & 0xFFFF, b & 0xFFFF, c & 0xFFFF), (16, 16, 16, 16)) for text, e in both
    ]
    snippets += [Snippet(text.replace(kind, f"{kind}x2"), each_half(f, e)) for text, e in both]
    low = lambda a: a & 0xFFFF  # noqa: E731
    snippets += [
        Snippet(
            f"setp.{name}.{kind} $d, $a, $b;",
            lambda a, b, c, n=name: compared(n, f)(low(a), low(b), 0),
            (1, 16, 16, 16),
        )
        for name in ("eq", "neu", "lt", "geu")
    ]
    snippets += [
        Snippet(f"{{.reg .pred p, q; setp.gt.{kind}x2 p|q, $a, $b; selp.b32 $d, 1, 0, p; @q add.s32 $d, $d, 2;}}",
                lambda a, b, c: compared("gt", f)(low(a), low(b), 0) + 2 * compared("gt", f)(a >> 16, b >> 16, 0)),
        Snippet(f"cvt.f32.{kind} $d, $a;", lambda a, b, c: exact.convert(f, F32, low(a)), (32, 16, 16, 16)),
        Snippet(f"cvt.rzi.s32.{kind} $d, $a;",
                lambda a, b, c: exact.to_integer(f, low(a), "rzi", 32, True), (32, 16, 16, 16)),
        Snippet(f"cvt.rn.{kind}.s32 $d, $a;", lambda a, b, c: f.round(Fraction(a - (a >> 31 << 32))), (16, 32, 32, 32)),
        Snippet(f"cvt.rn.{kind}.u16 $d, $a;", lambda a, b, c: f.round(Fraction(low(a))), (16, 16, 32, 32)),
    ]  # fmt: skip
    if kind == "f16":
        snippets += [
            Snippet(
                "fma.rn.sat.f16x2 $d, $a, $b, $c;", each_half(f, lambda a, b, c: saturated(f, exact.fma(f, a, b, c)))
            ),
            Snippet(
                "set.ge.f16x2.f16x2 $d, $a, $b;", each_half(f, lambda a, b, c: 0x3C00 * compared("ge", f)(a, b, 0))
            ),
            Snippet(
                "set.ltu.u32.f16x2 $d, $a, $b;", each_half(f, lambda a, b, c: 0xFFFF * compared("ltu", f)(a, b, 0))
            ),
        ]
    return snippets


def two(format: Format, after: Callable[[Format, int], int] = lambda format, bits: bits) -> Callable[..., int]:
    """Two f32 to a pair of halves, the first one above."""
    return lambda a, b, c: (
        after(format, exact.convert(F32, format, a)) << 16 | after(format, exact.convert(F32, format, b))
    )


def singles() -> list[Snippet]:
    f = F32
    basic = arithmetic("f32")
    snippets = [Snippet(text, expected) for text, expected in basic]
    snippets += [Snippet(text.replace("f32", "ftz.f32"), flushed(expected)) for text, expected in basic]
    for mode in ("rz", "rm", "rp"):
        snippets += [
            Snippet(f"fma.{mode}.f32 $d, $a, $b, $c;", lambda a, b, c, m=mode: exact.fma(f, a, b, c, m)),
            Snippet(f"mul.{mode}.f32 $d, $a, $b;", lambda a, b, c, m=mode: exact.mul(f, a, b, m)),
            Snippet(f"add.{mode}.f32 $d, $a, $b;", lambda a, b, c, m=mode: exact.add(f, a, b, m)),
            Snippet(
                f"cvt.{mode}.f16.f32 $d, $a;", lambda a, b, c, m=mode: exact.convert(f, F16, a, m), (16, 32, 32, 32)
            ),
            Snippet(f"cvt.{mode}.f32.s32 $d, $a;", lambda a, b, c, m=mode: f.round(Fraction(a - (a >> 31 << 32)), m)),
        ]
    for mode in ("rni", "rzi", "rmi", "rpi"):
        snippets += [
            Snippet(f"cvt.{mode}.s32.f32 $d, $a;", lambda a, b, c, m=mode: exact.to_integer(f, a, m, 32, True)),
            Snippet(
                f"cvt.{mode}.u64.f32 $d, $a;",
                lambda a, b, c, m=mode: exact.to_integer(f, a, m, 64, False),
                (64, 32, 32, 32),
            ),
            Snippet(f"cvt.{mode}.f32.f32 $d, $a;", lambda a, b, c, m=mode: integral(a, m)),
        ]
    names = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
    snippets += [Snippet(f"setp.{name}.f32 $d, $a, $b;", compared(name, f), (1, 32, 32, 32)) for name in names]
    snippets += [
        Snippet("setp.lt.ftz.f32 $d, $a, $b;",
                lambda a, b, c: compared("lt", f)(f.flush(a), f.flush(b), 0), (1, 32, 32, 32)),
        Snippet("div.rn.f32 $d, $a, $b;", lambda a, b, c: exact.div(f, a, b)),
        Snippet("div.full.f32 $d, $a, $b;", lambda a, b, c: exact.div(f, a, b)),
        Snippet("rcp.approx.f32 $d, $a;", lambda a, b, c: exact.div(f, 0x3F800000, a)),
        Snippet("fma.rn.sat.f32 $d, $a, $b, $c;", lambda a, b, c: saturated(f, exact.fma(f, a, b, c))),
        Snippet("cvt.rn.f16.f32 $d, $a;", lambda a, b, c: exact.convert(f, F16, a), (16, 32, 32, 32)),
        Snippet("cvt.rn.bf16.f32 $d, $a;", lambda a, b, c: exact.convert(f, BF16, a), (16, 32, 32, 32)),
        Snippet("cvt.rn.f16x2.f32 $d, $a, $b;", two(F16)),
        Snippet("cvt.rn.bf16x2.f32 $d, $a, $b;", two(BF16)),
        Snippet("cvt.rn.relu.f16x2.f32 $d, $a, $b;", two(F16, rectified)),
        Snippet("cvt.rn.f32.u32 $d, $a;", lambda a, b, c: f.round(Fraction(a))),
        Snippet("cvt.sat.f32.f32 $d, $a;", lambda a, b, c: saturated(f, a)),
        Snippet("cvt.rna.tf32.f32 $d, $a;", lambda a, b, c: tf32(a)),
        Snippet("cvt.f64.f32 $d, $a;", lambda a, b, c: exact.convert(f, F64, a), (64, 32, 32, 32)),
        Snippet("copysign.f32 $d, $a, $b;", lambda a, b, c: b & f.nan | a & 0x80000000),
        Snippet("testp.subnormal.f32 $d, $a;", lambda a, b, c: 0 < a & f.nan < 0x00800000, (1, 32, 32, 32)),
        Snippet("selp.f32 $d, $a, 0f3F800000, $c;", lambda a, b, c: a if c & 1 else 0x3F800000, (32, 32, 32, 1)),
        Snippet("slct.f32.f32 $d, $a, $b, $c;", lambda a, b, c: a if f.as_float(c) >= 0 else b),
        Snippet("set.gt.f32.f32 $d, $a, $b;", lambda a, b, c: 0x3F800000 * compared("gt", f)(a, b, c)),
        Snippet("sqrt.rn.f32 $d, $a;", real(math.sqrt)),
        Snippet("ex2.approx.f32 $d, $a;", real(lambda x: 2.0**x)),
        Snippet("lg2.approx.f32 $d, $a;", real(math.log2)),
        Snippet("rsqrt.approx.f32 $d, $a;", real(lambda x: 1 / math.sqrt(x))),
    ]  # fmt: skip
    return snippets


def integral(a: int, mode: str) -> int:
    if not F32.is_finite(a):
        return a
    whole = exact.to_integral(F32.value(a), mode)
    return F32.round(Fraction(whole)) if whole else a & 0x80000000


def tf32(a: int) -> int:
    """Rounds to 10 bits of fraction, ties away from zero."""
    if not F32.is_finite(a):
        return a & 0xFFFFE000
    return a & 0x80000000 | ((a & F32.nan) + 0x1000 & 0xFFFFE000)


def doubles() -> list[Snippet]:
    wide = (64, 64, 64, 64)
    snippets = [Snippet(text, expected, wide) for text, expected in arithmetic("f64")]
    return [
        *snippets,
        Snippet("div.rn.f64 $d, $a, $b;", lambda a, b, c: exact.div(F64, a, b), wide),
        Snippet("cvt.rn.f32.f64 $d, $a;", lambda a, b, c: exact.convert(F64, F32, a), (32, 64, 64, 64)),
        Snippet("cvt.rz.f32.f64 $d, $a;", lambda a, b, c: exact.convert(F64, F32, a, "rz"), (32, 64, 64, 64)),
        Snippet("cvt.rzi.s64.f64 $d, $a;", lambda a, b, c: exact.to_integer(F64, a, "rzi", 64, True), wide),
        Snippet(
            "cvt.rzi.u32.f64 $d, $a;", lambda a, b, c: exact.to_integer(F64, a, "rzi", 32, False), (32, 64, 64, 64)
        ),
        Snippet("cvt.rn.f64.u64 $d, $a;", lambda a, b, c: F64.round(Fraction(a)), wide),
        Snippet("cvt.rn.f32.s64 $d, $a;", lambda a, b, c: F32.round(Fraction(a - (a >> 63 << 64))), (32, 64, 64, 64)),
        Snippet("setp.ltu.f64 $d, $a, $b;", compared("ltu", F64), (1, 64, 64, 64)),
    ]


SNIPPETS = {"f32": singles(), "f64": doubles(), "f16": halves("f16"), "bf16": halves("bf16")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Snippet, list[int]]:
    found = {}
    for kind, snippets in SNIPPETS.items():
        found.update(zip(snippets, run(snippets, OPERANDS[kind], tmp_path_factory.mktemp(kind)), strict=True))
    return found


def result_format(snippet: Snippet) -> Format | None:
    """The format in which the snippet's result may be a NaN; None if it is an integer or a truth."""
    opcode, *modifiers = snippet.text.split()[0].split(".")
    if snippet.widths[0] == 1 or opcode.startswith("{"):
        return None
    kind = modifiers[-2] if opcode in ("cvt", "set", "slct") else modifiers[-1]
    return FORMATS.get(kind.removesuffix("x2"))


def same(got: int, expected: int, format: Format | None, width: int) -> bool:
    if format is None or format.bits == width:
        return got == expected or (format is not None and format.is_nan(got) and format.is_nan(expected))
    mask = MASK[format.bits]
    parts = range(0, width, format.bits)
    return all(same(got >> p & mask, expected >> p & mask, format, format.bits) for p in parts)


@pytest.mark.parametrize(("kind", "snippet"), [(k, s) for k, all in SNIPPETS.items() for s in all], ids=str)
def test_float_instruction(kind: str, snippet: Snippet, results: dict[Snippet, list[int]]) -> None:
    compared_count = 0
    for operands, got in zip(OPERANDS[kind], results[snippet], strict=True):
        expected = int(snippet.expected(*operands))
        if expected == -1:
            continue
        compared_count += 1
        assert same(got, expected & MASK[snippet.widths[0]], result_format(snippet), snippet.widths[0]), (
            f"{snippet} of {[hex(o) for o in operands]}: 0x{got:x}, expected 0x{expected:x}"
        )
    assert compared_count > COUNT // 4
