"""Integer and bit instructions against Python's integers."""

from __future__ import annotations

import pytest

from ptx_emulator.tests.snippets import MASK, Snippet, draw, run

INTERESTING = [0, 1, 2, 3, 7, 8, 15, 16, 24, 31, 32, 33, 63, 64, 65, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF]
INTERESTING += [0x00FFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1, 0x0123456789ABCDEF]
OPERANDS = draw(INTERESTING, 64, 256)


def signed(value: int, bits: int) -> int:
    value &= MASK[bits]
    return value - (1 << bits) if value >> (bits - 1) else value


def u(bits, function):
    """The function of unsigned operands of `bits` bits."""
    return lambda a, b, c: function(a & MASK[bits], b & MASK[bits], c & MASK[bits])


def s(bits, function):
    return lambda a, b, c: function(signed(a, bits), signed(b, bits), signed(c, bits))


def clamp(value: int, bits: int) -> int:
    return min(max(value, -(1 << (bits - 1))), (1 << (bits - 1)) - 1)


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def lop3(table: int):
    def function(a, b, c):
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))

    return u(32, function)


def permute(a: int, b: int, selectors: list[int]) -> int:
    pool = [(b << 32 | a) >> 8 * i & 0xFF for i in range(8)]
    return sum(
        (pool[s & 7] if not s & 8 else (0xFF if pool[s & 7] & 0x80 else 0)) << 8 * i for i, s in enumerate(selectors)
    )


def field(value: int, position: int, length: int, bits: int, is_signed: bool) -> int:
    """bfe by its definition in PTX ISA: bit by bit, the sign above."""
    position, length = position & 0xFF, length & 0xFF
    top = min(position + length - 1, bits - 1)
    sign = value >> top & 1 if is_signed and length else 0
    return sum((value >> (position + i) & 1 if i < length and position + i < bits else sign) << i for i in range(bits))


def inserted(a: int, b: int, position: int, length: int, bits: int) -> int:
    for i in range(length & 0xFF):
        if (position & 0xFF) + i < bits:
            b = b & ~(1 << (position & 0xFF) + i) | (a >> i & 1) << (position & 0xFF) + i
    return b


def highest(value: int) -> int:
    """The place of the highest bit that differs from the sign, or -1."""
    return (~value if value < 0 else value).bit_length() - 1


W16, W64 = (16, 16, 16, 16), (64, 64, 64, 64)
PREDICATE = (1, 32, 32, 32)
SNIPPETS = [
    Snippet("add.s32 $d, $a, $b;", u(32, lambda a, b, c: a + b)),
    Snippet("add.u16 $d, $a, $b;", u(16, lambda a, b, c: a + b), W16),
    Snippet("add.s64 $d, $a, -7;", u(64, lambda a, b, c: a - 7), W64),
    Snippet("add.sat.s32 $d, $a, $b;", s(32, lambda a, b, c: clamp(a + b, 32))),
    Snippet("sub.sat.s32 $d, $a, $b;", s(32, lambda a, b, c: clamp(a - b, 32))),
    Snippet("sub.s32 $d, $a, $b;", u(32, lambda a, b, c: a - b)),
    Snippet("{.reg .b32 l; add.cc.u32 l, $a, $b; addc.u32 $d, $c, 5;}", u(32, lambda a, b, c: c + 5 + (a + b >> 32))),
    Snippet("{.reg .b32 l; sub.cc.u32 l, $a, $b; subc.u32 $d, $c, 5;}", u(32, lambda a, b, c: c - 5 - (a < b))),
    Snippet("mul.lo.s32 $d, $a, $b;", u(32, lambda a, b, c: a * b)),
    Snippet("mul.lo.s16 $d, $a, $b;", u(16, lambda a, b, c: a * b), W16),
    Snippet("mul.lo.s64 $d, $a, $b;", u(64, lambda a, b, c: a * b), W64),
    Snippet("mul.hi.u32 $d, $a, $b;", u(32, lambda a, b, c: a * b >> 32)),
    Snippet("mul.hi.s32 $d, $a, $b;", s(32, lambda a, b, c: a * b >> 32)),
    Snippet("mul.hi.u64 $d, $a, $b;", u(64, lambda a, b, c: a * b >> 64), W64),
    Snippet("mul.hi.s64 $d, $a, $b;", s(64, lambda a, b, c: a * b >> 64), W64),
    Snippet("mul.wide.s32 $d, $a, $b;", s(32, lambda a, b, c: a * b), (64, 32, 32, 32)),
    Snippet("mul.wide.u16 $d, $a, $b;", u(16, lambda a, b, c: a * b), (32, 16, 16, 16)),
    Snippet("mul24.lo.s32 $d, $a, $b;", s(32, lambda a, b, c: s24(a) * s24(b))),
    Snippet("mad24.lo.u32 $d, $a, $b, $c;", u(32, lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c)),
    Snippet("mad.lo.s32 $d, $a, $b, $c;", u(32, lambda a, b, c: a * b + c)),
    Snippet("mad.hi.s32 $d, $a, $b, $c;", s(32, lambda a, b, c: (a * b >> 32) + c)),
    Snippet("mad.wide.s32 $d, $a, $b, $c;", lambda a, b, c: signed(a, 32) * signed(b, 32) + c, (64, 32, 32, 64)),
    Snippet("mad.wide.u32 $d, $a, 12, $c;", lambda a, b, c: (a & MASK[32]) * 12 + c, (64, 32, 32, 64)),
    Snippet("{or.b32 $b, $b, 2; div.s32 $d, $a, $b;}", s(32, lambda a, b, c: quotient(a, b | 2))),
    Snippet("{or.b32 $b, $b, 2; rem.s32 $d, $a, $b;}", s(32, lambda a, b, c: a - quotient(a, b | 2) * (b | 2))),
    Snippet("{or.b32 $b, $b, 1; div.u32 $d, $a, $b;}", u(32, lambda a, b, c: a // (b | 1))),
    Snippet("{or.b64 $b, $b, 1; rem.u64 $d, $a, $b;}", u(64, lambda a, b, c: a % (b | 1)), W64),
    Snippet("div.s32 $d, $a, -1;", s(32, lambda a, b, c: -a)),
    Snippet("min.s32 $d, $a, $b;", s(32, lambda a, b, c: min(a, b))),
    Snippet("min.u16 $d, $a, $b;", u(16, lambda a, b, c: min(a, b)), W16),
    Snippet("max.u32 $d, $a, $b;", u(32, lambda a, b, c: max(a, b))),
    Snippet("max.s64 $d, $a, $b;", s(64, lambda a, b, c: max(a, b)), W64),
    Snippet("abs.s32 $d, $a;", s(32, lambda a, b, c: abs(a))),
    Snippet("neg.s32 $d, $a;", s(32, lambda a, b, c: -a)),
    Snippet("sad.s32 $d, $a, $b, $c;", s(32, lambda a, b, c: c + abs(a - b))),
    Snippet("sad.u32 $d, $a, $b, $c;", u(32, lambda a, b, c: c + abs(a - b))),
    Snippet("and.b32 $d, $a, $b;", u(32, lambda a, b, c: a & b)),
    Snippet("or.b16 $d, $a, $b;", u(16, lambda a, b, c: a | b), W16),
    Snippet("xor.b64 $d, $a, $b;", u(64, lambda a, b, c: a ^ b), W64),
    Snippet("not.b32 $d, $a;", u(32, lambda a, b, c: ~a)),
    Snippet("not.pred $d, $a;", lambda a, b, c: ~a & 1, (1, 1, 32, 32)),
    Snippet("xor.pred $d, $a, $b;", lambda a, b, c: (a ^ b) & 1, (1, 1, 1, 32)),
    Snippet("shl.b32 $d, $a, $b;", u(32, lambda a, b, c: a << b if b < 32 else 0)),
    Snippet("shl.b64 $d, $a, $b;", lambda a, b, c: a << b if (b := b & MASK[32]) < 64 else 0, (64, 64, 32, 32)),
    Snippet("shr.u32 $d, $a, $b;", u(32, lambda a, b, c: a >> min(b, 32))),
    Snippet("shr.s32 $d, $a, $b;", lambda a, b, c: signed(a, 32) >> min(b & MASK[32], 32)),
    Snippet("shr.s16 $d, $a, $b;", lambda a, b, c: signed(a, 16) >> min(b & MASK[32], 16), (16, 16, 32, 32)),
    Snippet("shf.l.wrap.b32 $d, $a, $b, $c;", u(32, lambda a, b, c: (b << 32 | a) << c % 32 >> 32)),
    Snippet("shf.r.wrap.b32 $d, $a, $b, $c;", u(32, lambda a, b, c: (b << 32 | a) >> c % 32)),
    Snippet("shf.l.clamp.b32 $d, $a, $b, $c;", u(32, lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32)),
    Snippet("shf.r.clamp.b32 $d, $a, $b, $c;", u(32, lambda a, b, c: (b << 32 | a) >> min(c, 32))),
    *(Snippet(f"lop3.b32 $d, $a, $b, $c, {t};", lop3(t)) for t in (0, 1, 0x96, 0xE8, 0xEA, 0xCA, 0xFF, 0x6A, 0xF8)),
    Snippet("prmt.b32 $d, $a, $b, $c;", u(32, lambda a, b, c: permute(a, b, [c >> 4 * i & 15 for i in range(4)]))),
    Snippet("prmt.b32.f4e $d, $a, $b, $c;", u(32, lambda a, b, c: permute(a, b, [c % 4 + i for i in range(4)]))),
    Snippet("prmt.b32.b4e $d, $a, $b, $c;", u(32, lambda a, b, c: permute(a, b, [(c % 4 - i) % 8 for i in range(4)]))),
    Snippet("prmt.b32.rc8 $d, $a, $b, $c;", u(32, lambda a, b, c: permute(a, b, [c % 4] * 4))),
    Snippet("prmt.b32.ecl $d, $a, $b, $c;", u(32, lambda a, b, c: permute(a, b, [max(c % 4, i) for i in range(4)]))),
    Snippet("prmt.b32.ecr $d, $a, $b, $c;", u(32, lambda a, b, c: permute(a, b, [min(c % 4, i) for i in range(4)]))),
    Snippet("prmt.b32.rc16 $d, $a, $b, $c;", u(32, lambda a, b, c: permute(a, b, [c % 2 * 2, c % 2 * 2 + 1] * 2))),
    Snippet("bfe.u32 $d, $a, $b, $c;", u(32, lambda a, b, c: field(a, b, c, 32, False))),
    Snippet("bfe.s32 $d, $a, $b, $c;", u(32, lambda a, b, c: field(a, b, c, 32, True))),
    Snippet("bfe.s64 $d, $a, $b, $c;", lambda a, b, c: field(a, b, c, 64, True), (64, 64, 32, 32)),
    Snippet("bfi.b32 $d, $a, $b, $c, 5;", u(32, lambda a, b, c: inserted(a, b, c, 5, 32))),
    Snippet("bfi.b32 $d, $a, $b, 8, $c;", u(32, lambda a, b, c: inserted(a, b, 8, c, 32))),
    Snippet("bfi.b64 $d, $a, $b, 40, $c;", lambda a, b, c: inserted(a, b, 40, c, 64), (64, 64, 64, 32)),
    Snippet("clz.b32 $d, $a;", u(32, lambda a, b, c: 32 - a.bit_length())),
    Snippet("clz.b64 $d, $a;", lambda a, b, c: 64 - a.bit_length(), (32, 64, 32, 32)),
    Snippet("popc.b32 $d, $a;", u(32, lambda a, b, c: a.bit_count())),
    Snippet("popc.b64 $d, $a;", lambda a, b, c: a.bit_count(), (32, 64, 32, 32)),
    Snippet("bfind.u32 $d, $a;", u(32, lambda a, b, c: highest(a))),
    Snippet("bfind.s32 $d, $a;", s(32, lambda a, b, c: highest(a))),
    Snippet("bfind.shiftamt.u32 $d, $a;", u(32, lambda a, b, c: 31 - highest(a) if a else -1)),
    Snippet("brev.b32 $d, $a;", u(32, lambda a, b, c: int(f"{a:032b}"[::-1], 2))),
    Snippet("brev.b64 $d, $a;", lambda a, b, c: int(f"{a:064b}"[::-1], 2), W64),
    Snippet("dp4a.s32.u32 $d, $a, $b, $c;",
            u(32, lambda a, b, c: c + sum(signed(a >> i, 8) * (b >> i & 255) for i in (0, 8, 16, 24)))),
    Snippet("selp.b32 $d, $a, $b, $c;", lambda a, b, c: a if c & 1 else b, (32, 32, 32, 1)),
    Snippet("slct.u32.s32 $d, $a, $b, $c;", lambda a, b, c: a if signed(c, 32) >= 0 else b),
    Snippet("setp.lt.s32 $d, $a, $b;", s(32, lambda a, b, c: a < b), PREDICATE),
    Snippet("setp.lt.u32 $d, $a, $b;", u(32, lambda a, b, c: a < b), PREDICATE),
    Snippet("setp.hs.u32 $d, $a, $b;", u(32, lambda a, b, c: a >= b), PREDICATE),
    Snippet("setp.ne.s16 $d, $a, $b;", u(16, lambda a, b, c: a != b), (1, 16, 16, 16)),
    Snippet("setp.eq.and.b32 $d, $a, 0, $c;", lambda a, b, c: a & MASK[32] == 0 and c & 1, (1, 32, 32, 1)),
    Snippet("setp.gt.or.s64 $d, $a, $b, !$c;",
            lambda a, b, c: signed(a, 64) > signed(b, 64) or not c & 1, (1, 64, 64, 1)),
    Snippet("{.reg .pred p; setp.le.xor.s32 p|$d, $a, $b, $c;}",
            lambda a, b, c: (signed(a, 32) > signed(b, 32)) ^ (c & 1), (1, 32, 32, 1)),
    Snippet("set.ge.u32.s32 $d, $a, $b;", s(32, lambda a, b, c: -(a >= b))),
    Snippet("cvt.u32.u16 $d, $a;", u(16, lambda a, b, c: a), (32, 16, 32, 32)),
    Snippet("cvt.s32.s8 $d, $a;", lambda a, b, c: signed(a, 8)),
    Snippet("cvt.s64.s32 $d, $a;", s(32, lambda a, b, c: a), (64, 32, 32, 32)),
    Snippet("cvt.u16.u32 $d, $a;", u(16, lambda a, b, c: a), (16, 32, 32, 32)),
    Snippet("cvt.sat.u8.s32 $d, $a;", s(32, lambda a, b, c: min(max(a, 0), 255))),
    Snippet("cvt.sat.s32.s64 $d, $a;", s(64, lambda a, b, c: clamp(a, 32)), (32, 64, 32, 32)),
    Snippet("mov.b64 $d, {$a, $b};", u(32, lambda a, b, c: b << 32 | a), (64, 32, 32, 32)),
    Snippet("mov.b32 $d, {$a, $b};", u(16, lambda a, b, c: b << 16 | a), (32, 16, 16, 32)),
    Snippet("{.reg .b32 h; mov.b64 {$d, h}, $a; xor.b32 $d, $d, h;}", lambda a, b, c: a ^ a >> 32, (32, 64, 32, 32)),
    Snippet("{.reg .b16 h; mov.b32 {_, $d}, $a;}", u(32, lambda a, b, c: a >> 16), (16, 32, 32, 32)),
    Snippet("@$c add.s32 $a, $a, 1; mov.u32 $d, $a;", lambda a, b, c: a + (c & 1), (32, 32, 32, 1)),
    Snippet("@!$c bra done; add.s32 $a, $a, 1; done: mov.u32 $d, $a;", lambda a, b, c: a + (c & 1), (32, 32, 32, 1)),
    Snippet("mov.u32 $d, 0; rem.u32 $b, $b, 50; "
            "loop: add.s32 $d, $d, $a; sub.s32 $b, $b, 1; setp.ge.s32 $c, $b, 0; @$c bra loop;",
            lambda a, b, c: a * ((b & MASK[32]) % 50 + 1), (32, 32, 32, 1)),
    Snippet("and.b32 $b, $b, 3; table: .branchtargets zero, one, two, two; brx.idx $b, table; "
            "zero: mov.u32 $d, 10; bra.uni end; one: mov.u32 $d, 11; bra.uni end; two: mov.u32 $d, 12; end:",
            lambda a, b, c: 10 + min(b & 3, 2)),
]  # fmt: skip


def s24(value: int) -> int:
    return (value & 0xFFFFFF) - (1 << 24 if value & 0x800000 else 0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Snippet, list[int]]:
    return dict(zip(SNIPPETS, run(SNIPPETS, OPERANDS, tmp_path_factory.mktemp("integer")), strict=True))


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_integer_instruction(snippet: Snippet, results: dict[Snippet, list[int]]) -> None:
    for operands, got in zip(OPERANDS, results[snippet], strict=True):
        expected = int(snippet.expected(*operands)) & MASK[snippet.widths[0]]
        assert got == expected, f"{snippet} of {[hex(o) for o in operands]}: 0x{got:x}, expected 0x{expected:x}"
