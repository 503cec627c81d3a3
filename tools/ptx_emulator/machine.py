"""How memory, barrier, warp-wide and control instructions are spelled in C++ (runtime/memory.h, runtime/warp.h)."""

from __future__ import annotations

from ptx_emulator.ptx import BYTES, Address, Immediate, Instruction, Operand, Pair, PtxError, Register, Symbol, Vector
from ptx_emulator.translate import Emitter, Modifiers, handles, identifier, value_type

SPACES = {
    "global": "global", "shared": "shared", "shared::cta": "shared", "local": "local", "const": "const",
    "param": "param", "param::entry": "param", "param::func": "param",
}  # fmt: skip
SCOPES = ("cta", "gpu", "sys", "cluster")
ORDERED = ("volatile", "relaxed", "acquire", "release", "mmio")
CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak")


def _take_hints(m: Modifiers) -> bool:
    """Takes what only concerns caches; whether the instruction has a cache policy as its last operand."""
    policy = m.take("L2::cache_hint")
    m.take(*CACHE)
    m.left = [name for name in m.left if not name.startswith(("L1::", "L2::"))]
    return policy


def _at(e: Emitter, address: Operand, space: str | None, width: int) -> str:
    if not isinstance(address, Address):
        raise PtxError("needs an address")
    named = e.space_of(address)
    space = space or (named if named in ("shared", "param") else None)
    if space == "param":
        return f"reinterpret_cast<unsigned char*>({e.address(address)})"
    if space is None and named is not None:
        space = named
    return f"{space or 'generic'}_at<{width}>({e.address(address)})"


def _vector(m: Modifiers) -> int:
    return int((m.one_of("v2", "v4", "v8") or "v1")[1:])


def _elements(operand: Operand, count: int) -> tuple[Operand, ...]:
    elements = operand.elements if isinstance(operand, Vector) else (operand,)
    if len(elements) != count:
        raise PtxError(f"needs {count} registers")
    return elements


@handles("ld", "ldu")
def _ld(e: Emitter, i: Instruction, m: Modifiers) -> str:
    policy = _take_hints(m)
    kind, count = m.type(), _vector(m)
    space = m.one_of(*SPACES)
    ordered = m.take(*ORDERED)
    m.take(*SCOPES)
    if len(i.operands) != 2 + policy:
        raise PtxError("needs a destination and an address")
    width = BYTES[kind]
    at = _at(e, i.operands[1], SPACES[space] if space else None, width * count)
    load = "load_ordered" if ordered and count == 1 else "load"
    destinations = _elements(i.operands[0], count)
    if count == 1:
        return e.write(destinations[0], f"{load}<{value_type(kind)}>({at})")
    loads = " ".join(f"const auto part{n} = {load}<{value_type(kind)}>(from + {n * width});" for n in range(count))
    writes = " ".join(e.write(d, f"part{n}") for n, d in enumerate(destinations))
    return f"{{ const unsigned char* from = {at}; {loads} {writes} }}"


@handles("st")
def _st(e: Emitter, i: Instruction, m: Modifiers) -> str:
    policy = _take_hints(m)
    kind, count = m.type(), _vector(m)
    space = m.one_of(*SPACES)
    ordered = m.take(*ORDERED)
    m.take(*SCOPES)
    if len(i.operands) != 2 + policy:
        raise PtxError("needs an address and a source")
    width = BYTES[kind]
    at = _at(e, i.operands[0], SPACES[space] if space else None, width * count)
    store = "store_ordered" if ordered and count == 1 else "store"
    sources = _elements(i.operands[1], count)
    stores = " ".join(
        f"{store}<{value_type(kind)}>(to + {n * width}, {e.read(s, kind)});" for n, s in enumerate(sources)
    )
    return f"{{ unsigned char* to = {at}; {stores} }}"


@handles("prefetch", "prefetchu")
def _prefetch(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.take("global", "local", "L1", "L2", "L2::evict_last", "L2::evict_normal")
    return ";"


@handles("atom", "red")
def _atom(e: Emitter, i: Instruction, m: Modifiers) -> str:
    _take_hints(m)
    kind = m.type()
    order = m.one_of("relaxed", "acquire", "release", "acq_rel")
    m.take(*SCOPES)
    noftz = m.take("noftz")
    space = m.one_of("global", "shared", "shared::cta")
    operation = m.one_of("add", "min", "max", "and", "or", "xor", "exch", "inc", "dec", "cas")
    if operation is None:
        raise PtxError("this operation is not supported")
    destination, (address, *sources) = (None, i.operands) if i.opcode == "red" else (i.operands[0], i.operands[1:])
    at = _at(e, address, SPACES[space] if space else None, BYTES[kind])
    values = ", ".join(e.read(s, kind) for s in sources)
    if kind == "f32" and operation == "add" and not noftz and SPACES.get(space or "") != "shared":
        operation = "add_ftz"
    call = f"atom_{operation}<{value_type(kind)}>({at}, {values})"
    before = "fence(); " if order in ("release", "acq_rel") else ""
    after = " fence();" if order in ("acquire", "acq_rel") else ""
    return before + (f"(void){call};" if destination is None else e.write(destination, call)) + after


@handles("membar", "fence")
def _fence(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.take("gl", "cta", "sys", "gpu", "acq_rel", "sc")
    return "fence();"


# --- barriers
@handles("bar", "barrier")
def _bar(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.take("cta")
    if m.take("warp"):
        if not m.take("sync"):
            raise PtxError("only bar.warp.sync is supported")
        return f"warp_barrier(thread, {e.read(i.operands[0], 'u32')}, {i.line});"
    aligned = "true" if m.take("aligned") or i.opcode == "bar" else "false"
    if m.take("arrive"):
        identity, threads = (e.read(operand, "u32") for operand in i.operands)
        return f"barrier_arrive(thread, {identity}, {threads}, {i.line});"
    if m.take("sync"):
        identity, *rest = (e.read(operand, "u32") for operand in i.operands)
        threads = rest[0] if rest else "0"
        return f"barrier(thread, {identity}, {threads}, {aligned}, Reduce::none, false, {i.line});"
    if not m.take("red"):
        raise PtxError("this barrier is not supported")
    kind = m.type()
    operation = m.one_of("popc", "and", "or")
    destination, *values, predicate = i.operands
    threads = e.read(values[1], "u32") if len(values) == 2 else "0"
    reduce = f"Reduce::{operation}" + ("" if operation == "popc" else "_")
    which, vote = e.read(values[0], "u32"), e.read(predicate, "pred")
    call = f"barrier(thread, {which}, {threads}, {aligned}, {reduce}, {vote}, {i.line})"
    return e.write(destination, call if kind != "pred" else f"{call} != 0")


# --- the warp
def _two(e: Emitter, destination: Operand, struct: str, call: str) -> str:
    """`d|p` of a call that returns a Shuffled."""
    if isinstance(destination, Pair):
        first, second = e.write(destination.first, "both.value"), e.write(destination.second, "both.in_range")
        return f"{{ const Shuffled both = {call}; {first} {second} }}"
    return e.write(destination, f"{call}.{struct}")


@handles("shfl")
def _shfl(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.type()
    if not m.take("sync"):
        raise PtxError("only shfl.sync is supported")
    mode = m.one_of("up", "down", "bfly", "idx")
    sources = ", ".join(e.read(operand, "u32") for operand in i.operands[1:])
    return _two(e, i.operands[0], "value", f"shfl(thread, combine_shfl_{mode}, {sources}, {i.line})")


@handles("vote")
def _vote(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.type()
    if not m.take("sync"):
        raise PtxError("only vote.sync is supported")
    mode = m.one_of("ballot", "any", "all", "uni")
    function = "ballot" if mode == "ballot" else f"vote_{mode}"
    destination, predicate, mask = i.operands
    return e.write(destination, f"{function}(thread, {e.read(predicate, 'pred')}, {e.read(mask, 'u32')}, {i.line})")


@handles("match")
def _match(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    mode = m.one_of("any", "all")
    if not m.take("sync"):
        raise PtxError("only match.sync is supported")
    destination, value, mask = i.operands
    call = f"match(thread, combine_match_{mode}, {e.read(value, kind)}, {e.read(mask, 'u32')}, {i.line})"
    return _two(e, destination, "value", call)


@handles("redux")
def _redux(e: Emitter, i: Instruction, m: Modifiers) -> str:
    kind = m.type()
    if not m.take("sync"):
        raise PtxError("only redux.sync is supported")
    operation = m.one_of("add", "min", "max", "and", "or", "xor")
    if operation in ("min", "max"):
        operation = f"{operation}_{kind}"
    destination, value, mask = i.operands
    return e.write(
        destination,
        f"redux(thread, combine_redux_{operation}, {e.read(value, 'u32')}, {e.read(mask, 'u32')}, {i.line})",
    )


@handles("activemask")
def _activemask(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.type()
    return e.write(i.operands[0], "active_mask(thread)")


@handles("ldmatrix")
def _ldmatrix(e: Emitter, i: Instruction, m: Modifiers) -> str:
    if m.type() != "b16" or not m.take("m8n8"):
        raise PtxError("only m8n8 of b16 is supported")
    m.take("sync", "aligned", "shared", "shared::cta")
    count = int((m.one_of("x1", "x2", "x4") or "x1")[1:])
    transposed = "true" if m.take("trans") else "false"
    destinations = _elements(i.operands[0], count)
    address = i.operands[1]
    if not isinstance(address, Address):
        raise PtxError("needs an address")
    writes = " ".join(e.write(d, f"got.out[{n}]") for n, d in enumerate(destinations))
    return (
        f"{{ const Exchange got = ldmatrix<{count}, {transposed}>(thread, {e.address(address)}, {i.line}); {writes} }}"
    )


MMA: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {
    ("f32", "f16", "f16", "f32"): ("f16", (8, 16)),
    ("f32", "bf16", "bf16", "f32"): ("bf16", (8, 16)),
    ("f32", "tf32", "tf32", "f32"): ("tf32", (4, 8)),
    ("s32", "s8", "s8", "s32"): ("s8", (16, 32)),
    ("s32", "u8", "u8", "s32"): ("u8", (16, 32)),
}


@handles("mma")
def _mma(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.take("sync", "aligned")
    shape = m.one_of(*(f"m16n8k{k}" for k in (4, 8, 16, 32)))
    if shape is None or not m.take("row") or not m.take("col"):
        raise PtxError("only m16n8k{4,8,16,32}.row.col is supported")
    saturates = "true" if m.take("satfinite") else "false"
    types, m.left = tuple(m.left), []
    element, depths = MMA.get(types, ("", ()))
    k = int(shape.removeprefix("m16n8k"))
    if k not in depths or (saturates == "true" and types[0] != "s32"):
        raise PtxError(f"the types {types} with k = {k} are not supported")
    width = {"f16": 2, "bf16": 2, "tf32": 4}.get(element, 1)
    words = k * width // 8  # of A in each lane: 16 * k elements in 32 lanes
    d, a, b, c = (_elements(o, n) for o, n in zip(i.operands, (4, words, words // 2, 4), strict=True))
    arrays = " ".join(
        f"const u32 {name}[] = {{{', '.join(e.read(operand, 'u32') for operand in operands)}}};"
        for name, operands in (("a", a), ("b", b), ("c", c))
    )
    writes = " ".join(e.write(operand, f"got.out[{n}]") for n, operand in enumerate(d))
    return f"{{ {arrays} const Exchange got = mma<{element}, {k}>(thread, a, b, c, {saturates}, {i.line}); {writes} }}"


# --- cp.async
@handles("cp")
def _cp(e: Emitter, i: Instruction, m: Modifiers) -> str:
    if not m.take("async"):
        raise PtxError("only cp.async is supported")
    if m.take("commit_group"):
        return "async_commit(thread);"
    if m.take("wait_all"):
        return "async_commit(thread); async_wait(thread, 0);"
    if m.take("wait_group"):
        return f"async_wait(thread, {e.read(i.operands[0], 'u32')});"
    policy = _take_hints(m)
    if not m.take("shared", "shared::cta") or not m.take("global"):
        raise PtxError("only cp.async from global to shared memory is supported")
    operands = i.operands[: len(i.operands) - policy]
    to, source, size = operands[:3]
    if not isinstance(size, Immediate) or size.value not in (4, 8, 16):
        raise PtxError("copies 4, 8 or 16 bytes")
    if not isinstance(to, Address) or not isinstance(source, Address):
        raise PtxError("needs two addresses")
    present = f"{size.value}u"
    if len(operands) == 4:
        is_predicate = isinstance(operands[3], Register) and e.function.registers.get(operands[3].name) == "pred"
        present = f"{e.read(operands[3], 'pred')} ? 0u : {present}" if is_predicate else e.read(operands[3], "u32")
    return f"cp_async<{size.value}>(thread, {e.address(to)}, {e.address(source)}, {present});"


# --- control
@handles("bra")
def _bra(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.take("uni")
    (target,) = i.operands
    if not isinstance(target, Symbol):
        raise PtxError("needs a label")
    return e.goto(target.name)


@handles("brx")
def _brx(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.take("idx", "uni")
    index, table = i.operands
    if not isinstance(table, Symbol) or table.name not in e.tables:
        raise PtxError("needs a table of labels")
    cases = " ".join(f"case {n}: {e.goto(label)}" for n, label in enumerate(e.tables[table.name]))
    return f'switch ({e.read(index, "u32")}) {{ {cases} default: fault("brx.idx out of its table"); }}'


@handles("ret", "exit")
def _ret(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.take("uni")
    if i.opcode == "exit" and not e.function.is_entry:
        raise PtxError("is not supported in a function")
    return "return;"


@handles("trap", "brkpt")
def _trap(e: Emitter, i: Instruction, m: Modifiers) -> str:
    return f'fault("{i.opcode} at line {i.line} of the PTX");'


@handles("griddepcontrol")
def _griddepcontrol(e: Emitter, i: Instruction, m: Modifiers) -> str:
    if m.one_of("wait", "launch_dependents") == "wait":
        return "wait_for_grids_before(thread);"
    return f"let_next_grid_begin(thread, {i.line});"


@handles("nanosleep", "pragma")
def _nothing(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.take("u32")
    return ";"


@handles("call")
def _call(e: Emitter, i: Instruction, m: Modifiers) -> str:
    m.take("uni")
    lists = [operand for operand in i.operands if isinstance(operand, Vector)]
    callee = next((operand for operand in i.operands if isinstance(operand, Symbol)), None)
    names = [e.place(o.name).address for each in lists for o in each.elements if isinstance(o, Symbol)]
    if callee is None or len(names) != sum(len(each.elements) for each in lists):
        raise PtxError("only direct calls with .param arguments are supported")
    pointers = [f"reinterpret_cast<unsigned char*>({name})" for name in names]
    if callee.name == "__assertfail":
        return f'fault("assertion failed: %s", reinterpret_cast<const char*>(load<u64>({pointers[0]})));'
    if callee.name not in e.functions:
        raise PtxError(f"the function {callee.name!r} has no body here")
    return f"{identifier(callee.name)}({', '.join(['thread', *pointers])});"
