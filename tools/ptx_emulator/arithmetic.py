"""How arithmetic, comparison and conversion instructions are spelled in C++ (runtime/integer.h, runtime/floating.h)."""

from __future__ import annotations

from ptx_emulator.ptx import BYTES, Immediate, Instruction, Operand, Pair, PtxError, Register, Vector
from ptx_emulator.translate import Emitter, Modifiers, handles, value_type

FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")
COMPARISONS = (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "lo",
    "ls",
    "hi",
    "hs",
    "equ",
    "neu",
    "ltu",
    "leu",
    "gtu",
    "geu",
    "num",
    "nan",
)
ROUNDINGS = {"rn": "nearest", "rz": "zero", "rm": "down", "rp": "up"}
INTEGRAL_ROUNDINGS = {f"{name}i": mode for name, mode in ROUNDINGS.items()}


def _float_call(e: Emitter, i: Instruction, m: Modifiers, function: str, kind: str) -> str:
    """`function` of the sources, with .ftz on sources and result and .sat or .relu on the result."""
    ftz, sat, relu = m.take("ftz"), m.take("sat"), m.take("relu")
    sources = [e.read(operand, kind) for operand in i.operands[1:]]
    if ftz:
        sources = [f"ftz({source})" for source in sources]
    value = f"{function}({', '.join(sources)})"
    for wanted, modifier in ((ftz, "ftz"), (sat, "sat"), (relu, "relu")):
        if wanted:
            value = f"{modifier}({value})"
    return e.write(i.operands[0], value)


def _rounded(m: Modifiers, function: str, kind: str) -> str:
    """The function that rounds as the instruction says; without a word it is to nearest."""
    rounding = m.one_of(*ROUNDINGS)
    if rounding in (None, "rn"):
        return function
    if kind != "f32":
        raise PtxError(f".{rounding} is supported for f32 only")
    return f"{function}_rounded<Round::{ROUNDINGS[rounding]}>"


def _call(e: Emitter, i: Instruction, function: str, *kinds: str) -> str:
    sources = [e.read(operand, kind) for operand, kind in zip(i.operands[1:], kinds, strict=True)]
    return e.write(i.operands[0], f"{function}({', '.join(sources)})")


@handles("add", "sub", "addc", "subc")
def _add(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    if kind in FLOATS:
        return _float_call(e, i, m, _rounded(m, i.opcode, kind), kind)
    carry_out, carry_in = m.take("cc"), i.opcode.endswith("c")
    if carry_out or carry_in:
        sign = "+" if i.opcode.startswith("add") else "-"
        wide = f"wider<u{8 * BYTES[kind]}>"
        a, b = (e.read(operand, f"u{8 * BYTES[kind]}") for operand in i.operands[1:])
        text = f"const auto sum = {wide}({a}) {sign} {b}" + (f" {sign} carry" if carry_in else "") + "; "
        if carry_out:
            text += f"carry = (sum >> {8 * BYTES[kind]}) & 1; "
        return f"{{ {text}{e.write(i.operands[0], f'static_cast<u{8 * BYTES[kind]}>(sum)')} }}"
    return _call(e, i, i.opcode + ("_sat" if m.take("sat") else ""), kind, kind)


@handles("mul")
def _mul(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    if kind in FLOATS:
        return _float_call(e, i, m, _rounded(m, "mul", kind), kind)
    part = m.one_of("lo", "hi", "wide")
    return _call(e, i, f"mul_{part}", kind, kind)


@handles("mul24", "mad24")
def _mul24(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    if not m.take("lo"):
        raise PtxError("only .lo is supported")
    product = f"mul24_lo({e.read(i.operands[1], kind)}, {e.read(i.operands[2], kind)})"
    if i.opcode == "mad24":
        product = f"add({product}, {e.read(i.operands[3], kind)})"
    return e.write(i.operands[0], product)


@handles("mad", "fma")
def _mad(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    if kind in FLOATS:
        return _float_call(e, i, m, _rounded(m, "fma", kind), kind)
    part = m.one_of("lo", "hi", "wide")
    if part is None:
        raise PtxError("needs .lo, .hi or .wide")
    wide = f"{kind[0]}{16 * BYTES[kind]}" if part == "wide" else kind
    a, b, c = (e.read(operand, each) for operand, each in zip(i.operands[1:], (kind, kind, wide), strict=True))
    return e.write(i.operands[0], f"add<{value_type(wide)}>(mul_{part}({a}, {b}), {c})")


@handles("min", "max")
def _extremum(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    function = i.opcode + ("_NaN" if m.take("NaN") else "")
    if len(i.operands) != 3:
        raise PtxError("needs two sources")
    return _float_call(e, i, m, function, kind) if kind in FLOATS else _call(e, i, function, kind, kind)


@handles("abs", "neg")
def _sign(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    return _float_call(e, i, m, i.opcode, kind) if kind in FLOATS else _call(e, i, i.opcode, kind)


@handles("div", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _function(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    if kind not in FLOATS:
        return _call(e, i, i.opcode, kind, kind)
    if not m.take("approx", "full", "rn"):
        raise PtxError("needs .approx, .full or .rn")
    return _float_call(e, i, m, i.opcode, kind)


@handles("rem", "sad")
def _integer(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    return _call(e, i, i.opcode, *([kind] * (len(i.operands) - 1)))


@handles("and", "or", "xor", "not")
def _logic(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    return _call(e, i, f"{i.opcode}_", *([kind] * (len(i.operands) - 1)))


@handles("shl", "shr")
def _shift(e: Emitter, i: Instruction, m: Modifiers) -> str:
    return _call(e, i, i.opcode, m.type(), "u32")


@handles("shf")
def _funnel(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.type()
    return _call(e, i, f"shf_{m.one_of('l', 'r')}_{m.one_of('clamp', 'wrap')}", "u32", "u32", "u32")


@handles("lop3")
def _lop3(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.type()
    destination, a, b, c, table = i.operands
    if not isinstance(table, Immediate):
        raise PtxError("the table must be an immediate")
    sources = ", ".join(e.read(operand, "u32") for operand in (a, b, c))
    return e.write(destination, f"lop3<{table.value & 0xFF}>({sources})")


@handles("prmt")
def _prmt(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.take("b32")  # the mode follows the type
    mode = m.one_of("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    return _call(e, i, "prmt" + (f"_{mode}" if mode else ""), "u32", "u32", "u32")


@handles("bfe", "bfi")
def _bit_field(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    values = 1 if i.opcode == "bfe" else 2
    return _call(e, i, i.opcode, *([kind] * values), "u32", "u32")


@handles("clz", "popc", "brev", "bfind")
def _bits(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    return _call(e, i, i.opcode + ("_shiftamt" if m.take("shiftamt") else ""), kind)


@handles("dp4a")
def _dp4a(e: Emitter, i: Instruction, m: Modifiers) -> str:
    b, a = m.type(), m.type()
    return _call(e, i, f"dp4a<{a[0]}8, {b[0]}8>", "u32", "u32", "u32")


@handles("copysign")
def _copysign(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    return _call(e, i, "copysign", kind, kind)


@handles("selp")
def _selp(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    destination, a, b, predicate = i.operands
    return e.write(destination, f"{e.read(predicate, 'pred')} ? {e.read(a, kind)} : {e.read(b, kind)}")


@handles("slct")
def _slct(e: Emitter, i: Instruction, m: Modifiers) -> str:
    condition, kind = m.type(), m.type()
    destination, a, b, c = i.operands
    test = e.read(c, condition)
    if m.take("ftz"):
        test = f"ftz({test})"
    return e.write(destination, f"{test} >= 0 ? {e.read(a, kind)} : {e.read(b, kind)}")


def _combined(e: Emitter, comparison: str, combine: str | None, sources: list[Operand]) -> str:
    return comparison if combine is None else f"{combine}_({comparison}, {e.read(sources[2], 'pred')})"


@handles("setp")
def _setp(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    compare, combine, ftz = m.one_of(*COMPARISONS), m.one_of("and", "or", "xor"), m.take("ftz")
    destination, *sources = i.operands
    if compare is None or len(sources) != (2 if combine is None else 3):
        raise PtxError("needs a comparison and its operands")
    a, b = (f"ftz({e.read(s, kind)})" if ftz else e.read(s, kind) for s in sources[:2])
    if kind in ("f16x2", "bf16x2"):
        first, second = (f"{compare}({half}(a), {half}(b))" for half in ("low", "high"))
    else:
        first, second = f"{compare}(a, b)", f"!{compare}(a, b)"
    text = f"{{ const auto a = {a}; const auto b = {b}; const bool first = {_combined(e, first, combine, sources)}; "
    if isinstance(destination, Pair):
        text += f"const bool second = {_combined(e, second, combine, sources)}; "
        return f"{text}{e.write(destination.first, 'first')} {e.write(destination.second, 'second')} }}"
    return f"{text}{e.write(destination, 'first')} }}"


@handles("set")
def _set(e: Emitter, i: Instruction, m: Modifiers) -> str:
    source, result = m.type(), m.type()
    compare, combine, ftz = m.one_of(*COMPARISONS), m.one_of("and", "or", "xor"), m.take("ftz")
    destination, *sources = i.operands
    a, b = (f"ftz({e.read(s, source)})" if ftz else e.read(s, source) for s in sources[:2])
    if source not in ("f16x2", "bf16x2"):
        value = f"truth<{value_type(result)}>({_combined(e, f'{compare}(a, b)', combine, sources)})"
    else:
        half = source[:-2] if result == source else "u16"
        first, second = (
            f"truth<{half}>({_combined(e, f'{compare}({part}(a), {part}(b))', combine, sources)})"
            for part in ("low", "high")
        )
        value = f"u32(bit_cast<u16>({first})) | u32(bit_cast<u16>({second})) << 16"
    return f"{{ const auto a = {a}; const auto b = {b}; {e.write(destination, value)} }}"


@handles("testp")
def _testp(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    test = m.one_of("finite", "infinite", "notanumber", "number", "subnormal", "normal")
    return _call(e, i, f"{test}", kind)


@handles("mov")
def _mov(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    destination, source = i.operands
    whole = f"u{8 * BYTES[kind]}" if kind != "b128" else "b128"
    if isinstance(destination, Vector):
        parts = destination.elements
    elif isinstance(source, Vector):
        parts = source.elements
    else:
        return e.write(destination, e.read(source, kind))
    width = 8 * BYTES[kind] // len(parts)
    if isinstance(destination, Vector):
        writes = [e.write(p, f"static_cast<u{width}>(whole >> {n * width})") for n, p in enumerate(parts)]
        return f"{{ const {whole} whole = {e.read(source, whole)}; {' '.join(writes)} }}"
    packed = " | ".join(
        f"static_cast<{whole}>({e.read(part, f'u{width}')}) << {n * width}" for n, part in enumerate(parts)
    )
    return e.write(destination, f"static_cast<{whole}>({packed})")


@handles("cvt")
def _cvt(e: Emitter, i: Instruction, m: Modifiers) -> str:
    if m.take("tf32"):
        if not m.take("rna") or m.type() != "f32":
            raise PtxError("only cvt.rna.tf32.f32 is supported")
        return _call(e, i, "cvt_rna_tf32", "f32")
    source, result = m.type(), m.type()
    rounding = m.one_of(*ROUNDINGS, *INTEGRAL_ROUNDINGS)
    sat, ftz, relu = m.take("sat"), m.take("ftz"), m.take("relu")
    if result in ("f16x2", "bf16x2"):
        high, low = (
            _converted(
                f"ftz({e.read(o, source)})" if ftz else e.read(o, source), source, result[:-2], rounding, False, relu
            )
            for o in i.operands[1:]
        )
        return e.write(i.operands[0], f"pair<{result}>({low}, {high})")
    if len(i.operands) != 2:
        raise PtxError("needs one source")
    value = e.read(i.operands[1], source)
    if ftz and source == "f32":
        value = f"ftz({value})"
    value = _converted(value, source, result, rounding, sat, relu)
    if ftz and result == "f32":
        value = f"ftz({value})"
    return e.write(i.operands[0], value)


def _converted(value: str, source: str, result: str, rounding: str | None, sat: bool, relu: bool) -> str:
    to = value_type(result)
    if source not in FLOATS and result not in FLOATS:
        return f"{'saturate_cast' if sat else 'static_cast'}<{to}>({value})"
    if rounding in INTEGRAL_ROUNDINGS:
        rounded = f"to_integral<Round::{INTEGRAL_ROUNDINGS[rounding]}>(to_double({value}))"
        text = f"narrow<{to}>({rounded})" if result in FLOATS else f"to_integer<{to}>({rounded})"
        sat = sat and result in FLOATS
    elif result not in FLOATS:
        raise PtxError("a float becomes an integer with .rni, .rzi, .rmi or .rpi only")
    elif source in FLOATS:
        text = f"round_to<Round::{ROUNDINGS[rounding or 'rn']}, {to}>(to_double({value}))"
    elif BYTES[source] < 8:
        text = f"round_to<Round::{ROUNDINGS[rounding or 'rn']}, {to}>(static_cast<double>({value}))"
    elif rounding == "rn" and result in ("f32", "f64"):
        text = f"static_cast<{to}>({value})"
    else:
        raise PtxError("this conversion of a 64-bit integer is not supported")
    if sat:
        text = f"sat({text})"
    return f"relu({text})" if relu else text


@handles("isspacep")
def _isspacep(e: Emitter, i: Instruction, m: Modifiers) -> str:
    space = m.one_of("shared", "shared::cta", "global", "local")
    address = e.read(i.operands[1], "u64")
    tests = {"shared": f"in_shared({address})", "local": f"in_local({address}, 1)"}
    tests["shared::cta"] = tests["shared"]
    tests["global"] = f"!in_shared({address}) && !in_local({address}, 1)"
    return e.write(i.operands[0], tests[space or ""])


@handles("cvta")
def _cvta(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    to = m.take("to")
    space = m.one_of("global", "shared", "shared::cta", "local", "const", "param")
    value = e.read(i.operands[1], kind)
    if space in ("shared", "shared::cta"):
        value = f"{'generic_to_shared' if to else 'shared_to_generic'}({value})"
    return e.write(i.operands[0], value)


@handles("createpolicy")
def _createpolicy(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.type()
    m.take("fractional", "L2::evict_first", "L2::evict_last", "L2::evict_normal", "L2::evict_unchanged")
    destination = i.operands[0]
    assert isinstance(destination, Register)
    return e.write(destination, "u64(0)")
