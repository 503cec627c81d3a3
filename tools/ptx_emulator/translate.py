"""PTX -> C++: one translation unit per .entry, and one for a module's variables, for g++ and the headers in runtime/.

A PTX register becomes a local variable, a PTX instruction one C++ statement, a label a label. What an instruction does
stands in runtime/*.h, how it is spelled in arithmetic.py and machine.py. What has no spelling is refused with its line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ptx_emulator.ptx import (
    BYTES,
    Address,
    Function,
    Immediate,
    Instruction,
    Label,
    Module,
    Not,
    Operand,
    PtxError,
    Register,
    Symbol,
    Variable,
)

SPECIAL = {
    f"%{name}.{axis}": f"{owner}.{name}[{index}]"
    for name, owner in (("tid", "thread"), ("ntid", "running"), ("ctaid", "running"), ("nctaid", "running"))
    for index, axis in enumerate("xyz")
} | {
    "%laneid": "thread.lane",
    "%warpid": "thread.warp",
    "%lanemask_eq": "(1u << thread.lane)",
    "%lanemask_lt": "((1u << thread.lane) - 1)",
    "%lanemask_le": "((2u << thread.lane) - 1)",
    "%lanemask_gt": "~((2u << thread.lane) - 1)",
    "%lanemask_ge": "~((1u << thread.lane) - 1)",
}


class Modifiers:
    """The modifiers of one instruction; what the handler has not taken at the end is refused."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.left = list(names)

    def take(self, *names: str) -> bool:
        """Takes all of `names` that are there; whether there was any."""
        found = [name for name in self.left if name in names]
        self.left = [name for name in self.left if name not in names]
        return bool(found)

    def one_of(self, *names: str) -> str | None:
        """Takes the first of the modifiers that is in `names`."""
        for name in self.left:
            if name in names:
                self.left.remove(name)
                return name
        return None

    def type(self) -> str:
        """The last modifier, which must be a type."""
        if not self.left or self.left[-1] not in BYTES:
            raise PtxError("has no type that is supported")
        return self.left.pop()


Handler = Callable[["Emitter", Instruction, Modifiers], str]
HANDLERS: dict[str, Handler] = {}


def handles(*opcodes: str) -> Callable[[Handler], Handler]:
    """Registers the function that spells these opcodes in C++."""

    def register(handler: Handler) -> Handler:
        for opcode in opcodes:
            HANDLERS[opcode] = handler
        return handler

    return register


def identifier(name: str) -> str:
    return "v_" + re.sub(r"\W", lambda match: f"_{ord(match.group()):x}_", name.removeprefix("%"))


def register_type(kind: str) -> str:
    if kind == "pred":
        return "bool"
    return kind if kind in ("f32", "f64") else f"b{8 * BYTES[kind]}"


def value_type(kind: str) -> str:
    """The C++ type of an instruction's type: bits are unsigned integers."""
    if kind == "pred":
        return "bool"
    return f"u{kind[1:]}" if kind[0] == "b" and kind[1:].isdigit() and kind != "b128" else kind


@dataclass(frozen=True)
class Place:
    """Where a symbol lives: its state space and the C++ expression of its address."""

    space: str
    address: str


class Emitter:
    """The C++ of one function."""

    def __init__(self, function: Function, places: dict[str, Place], functions: dict[str, Function]) -> None:
        self.function = function
        self.places = places
        self.functions = functions
        self.label_index = {s.name: i for i, s in enumerate(function.body) if isinstance(s, Label)}
        self.tables = {s.name: s.targets for s in function.body if isinstance(s, Label) and s.targets is not None}
        self.index = 0
        self.called: set[str] = set()

    # --- operands
    def place(self, name: str) -> Place:
        if name not in self.places:
            raise PtxError(f"unknown symbol {name!r}")
        return self.places[name]

    def raw(self, operand: Operand) -> str:
        """An expression for the operand's bits in whatever width it has."""
        if isinstance(operand, Register):
            if operand.name in self.function.registers:
                return identifier(operand.name)
            if operand.name not in SPECIAL:
                raise PtxError(f"the special register {operand.name} is not supported")
            return SPECIAL[operand.name]
        if isinstance(operand, Immediate):
            if operand.type is None:
                return f"{operand.value}ull" if operand.value >= 1 << 63 else f"s64({operand.value}ll)"
            return f"0x{operand.value:x}u" + ("ll" if operand.type == "f64" else "")
        if isinstance(operand, Symbol):
            return self.place(operand.name).address
        if isinstance(operand, Address):
            return self.address(operand)
        raise PtxError(f"unexpected operand {operand}")

    def read(self, operand: Operand, kind: str) -> str:
        if kind == "pred":
            if isinstance(operand, Not):
                return f"!{self.read(operand.register, kind)}"
            if isinstance(operand, Immediate):
                return "true" if operand.value else "false"
            return self.raw(operand)
        if isinstance(operand, Register):
            declared = self.function.registers.get(operand.name)
            if declared is not None and register_type(declared).replace("b", "u") == value_type(kind):
                return identifier(operand.name)  # as get would say, at a tenth of the compiler's time
        return f"get<{value_type(kind)}>({self.raw(operand)})"

    def write(self, operand: Operand, value: str) -> str:
        if operand == Register("_"):
            return f"(void)({value});"
        if not isinstance(operand, Register) or operand.name not in self.function.registers:
            raise PtxError(f"{operand} is no destination")
        return f"put({identifier(operand.name)}, {value});"

    def address(self, operand: Address) -> str:
        base = self.raw(operand.base)
        return f"(u64({base}) + {operand.offset}ll)" if operand.offset else f"u64({base})"

    def space_of(self, operand: Operand) -> str | None:
        """The state space that an address names by its symbol, if it does."""
        if isinstance(operand, Address) and isinstance(operand.base, Symbol):
            return self.place(operand.base.name).space
        return None

    def goto(self, label: str) -> str:
        if label not in self.label_index:
            raise PtxError(f"no label {label!r}")
        backward = self.label_index[label] <= self.index
        return f"{{ {'burn(thread); ' if backward else ''}goto {identifier(label)}; }}"

    # --- statements
    def statement(self, instruction: Instruction) -> str:
        handler = HANDLERS.get(instruction.opcode)
        try:
            if handler is None:
                raise PtxError("is not supported")
            modifiers = Modifiers(instruction.modifiers)
            try:
                text = handler(self, instruction, modifiers)
            except PtxError:
                raise
            except (ValueError, IndexError) as error:
                raise PtxError(f"operands or modifiers are not supported: {error}") from error
            if modifiers.left:
                raise PtxError(f"modifiers {modifiers.left} are not supported")
            if instruction.guard is not None:
                text = f"if ({self.read(instruction.guard, 'pred')}) {{ {text} }}"
        except PtxError as error:
            raise PtxError(f"line {instruction.line}: {instruction}: {error}") from None
        return text

    def body(self, path: str) -> Iterator[str]:
        """The function's C++ statements, with #line directives of the source if -lineinfo gave it, else of the PTX."""
        for name, kind in self.function.registers.items():
            poison = (
                "false" if kind == "pred" else f"get<{register_type(kind)}>(~{'b128(0)' if kind == 'b128' else '0ull'})"
            )
            yield f"    {register_type(kind)} {identifier(name)} = {poison};"
        yield "    bool carry = false;"
        yield "    (void)carry;"
        for index, statement in enumerate(self.function.body):
            self.index = index
            if isinstance(statement, Label):
                if statement.targets is None:
                    yield f"{identifier(statement.name)}:;"
                continue
            file, line = statement.source or (path, statement.line)
            yield f'#line {line} "{file}"'
            yield f"    {self.statement(statement)}"


# Bytes between two arrays of shared memory: more than an index that is one row off leads over.
SHARED_GAP = 1024


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class SharedMemory:
    """The arrays of a kernel, one after another as a device has them, but for a gap between any two.

    Attributes:
        bytes: of shared memory that a device has.
        end: of the last array, with the gaps.
        gaps: their begins and ends.
    """

    def __init__(self) -> None:
        self.bytes = self.end = 0
        self.gaps: list[tuple[int, int]] = []

    def place(self, count: int, alignment: int) -> Place:
        self.bytes = _aligned(self.bytes, alignment) + count
        begin = _aligned(self.end + SHARED_GAP, alignment) if self.end else 0
        if self.end:
            self.gaps.append((self.end, begin))
        self.end = begin + count
        return Place("shared", f"(kSharedBase + {begin}u)")


class Translation:
    """The C++ of one module. `path` names it in faults and in debug information, `tag` its variables among all."""

    def __init__(self, module: Module, path: str, tag: str) -> None:
        self.module = module
        self.path = path
        self.tag = tag
        self.functions = {f.name: f for f in module.functions if not f.is_declaration}
        self.module_places = {
            v.name: Place(v.space, f"reinterpret_cast<u64>({self.global_name(v)})")
            for v in self.device_variables(module.variables)
        }
        for function in self.functions.values():
            if self.device_variables(function.variables):
                raise PtxError(f"{function.name}: a .global variable inside a function is not supported")

    @staticmethod
    def device_variables(variables: list[Variable]) -> list[Variable]:
        return [variable for variable in variables if variable.space in ("global", "const")]

    def global_name(self, variable: Variable) -> str:
        return f"g{self.tag}_{identifier(variable.name)}"

    def variables(self) -> str:
        """The module's __device__ and __constant__ variables."""
        variables = self.device_variables(self.module.variables)
        lines = ['#include "device.h"', ""]
        for v in variables:
            if v.size_bytes is None:
                raise PtxError(f"{v.name}: an extern .global variable is not supported")
            initial = ", ".join(map(str, v.initial))
            lines.append(
                f'extern "C" {{ alignas({max(v.alignment, 16)}) unsigned char '
                f"{self.global_name(v)}[{v.size_bytes}] = {{{initial}}}; }}"
            )
        lines.append("namespace { [[gnu::constructor]] void add_all() {")
        lines += [f'    emu::add_variable({{"{v.name}", {self.global_name(v)}, {v.size_bytes}}});' for v in variables]
        return "\n".join([*lines, "} }", ""])

    def reachable(self, entry: Function) -> list[Function]:
        """The entry and what it calls, callees first."""
        order: list[Function] = []

        def visit(function: Function, path: tuple[str, ...]) -> None:
            if function.name in path:
                raise PtxError(f"{function.name}: recursion is not supported")
            for statement in function.body:
                if isinstance(statement, Instruction) and statement.opcode == "call":
                    for operand in statement.operands:
                        if isinstance(operand, Symbol) and operand.name in self.functions:
                            visit(self.functions[operand.name], (*path, function.name))
            if function not in order:
                order.append(function)

        visit(entry, ())
        return order

    def kernel(self, name: str) -> str:
        """The .entry `name`, with the functions that it calls."""
        entry = self.functions[name]
        functions = self.reachable(entry)
        shared: dict[str, Place] = {}
        memory = SharedMemory()
        dynamic = [v for v in self.module.variables if v.space == "shared" and v.size_bytes is None]
        static = [v for v in self.module.variables if v.space == "shared" and v.size_bytes is not None]
        used = {o.name for f in functions for s in f.body if isinstance(s, Instruction) for o in _symbols(s.operands)}
        static = [v for v in static if v.name in used]
        for variable in static + [v for f in functions for v in f.variables if v.space == "shared"]:
            assert variable.size_bytes is not None
            shared[variable.name] = memory.place(variable.size_bytes, variable.alignment)
        dynamic = [v for v in dynamic if v.name in used]
        if dynamic:  # all of them are one array
            place = memory.place(0, max(16, *(v.alignment for v in dynamic)))
            shared |= {v.name: place for v in dynamic}

        lines = ['#include "device.h"', "", "namespace emu {", ""]
        lines += [
            f'extern "C" unsigned char {self.global_name(v)}[];' for v in self.device_variables(self.module.variables)
        ]
        lines.append("namespace {")
        for function in functions:
            lines += self.function_text(function, shared)
        table, parameter_offset = [], 0
        for parameter in entry.parameters:
            assert parameter.size_bytes is not None
            parameter_offset = _aligned(parameter_offset, parameter.alignment)
            table.append(f"{{{parameter_offset}, {parameter.size_bytes}}}")
            parameter_offset += parameter.size_bytes
        threads = 0
        for directive in ("maxntid", "reqntid"):
            if directive in entry.directives:
                threads = 1
                for extent in entry.directives[directive]:
                    threads *= extent
        lines += [
            f"const Parameter parameters[] = {{{', '.join([*table, '{0, 0}'])}}};",
            f"const Gap gaps[] = {{{', '.join(f'{{{begin}, {end}}}' for begin, end in [*memory.gaps, (0, 0)])}}};",
            f'const Kernel kernel{{"{entry.name}", {identifier(entry.name)}, '
            f"parameters, {len(table)}, {memory.bytes}, {threads}, "
            f"gaps, {len(memory.gaps)}, {memory.end - memory.bytes}, {_version_of(self.module.target)}}};",
            "[[gnu::constructor]] void add() { add_kernel(&kernel); }",
            "}",
            "}  // namespace emu",
            "",
        ]
        return "\n".join(lines)

    def function_text(self, function: Function, shared: dict[str, Place]) -> Iterator[str]:
        places = {**self.module_places, **shared}
        setup: list[str] = []
        offset = 0
        for parameter in function.parameters + function.results:
            name = identifier(parameter.name)
            places[parameter.name] = Place("param", f"reinterpret_cast<u64>({name})")
            if function.is_entry:
                assert parameter.size_bytes is not None
                offset = _aligned(offset, parameter.alignment)
                setup.append(f"    const unsigned char* const {name} = running.parameters + {offset};")
                offset += parameter.size_bytes
        for variable in function.variables:
            if variable.space in ("local", "param"):
                name = identifier(variable.name)
                places[variable.name] = Place(variable.space, f"reinterpret_cast<u64>({name})")
                setup.append(f"    alignas({max(variable.alignment, 16)}) unsigned char {name}[{variable.size_bytes}];")
        emitter = Emitter(function, places, self.functions)
        arguments = ["Thread& thread"]
        if not function.is_entry:
            arguments += [f"unsigned char* {identifier(p.name)}" for p in function.results + function.parameters]
        yield f"void {identifier(function.name)}({', '.join(arguments)}) {{"
        yield from setup
        yield from emitter.body(self.path)
        yield "}"


def _version_of(target: str) -> int:
    """90 for sm_90 and sm_90a."""
    return int(re.sub(r"\D", "", target))


def _symbols(operands: list[Operand]) -> Iterator[Symbol]:
    for operand in operands:
        if isinstance(operand, Symbol):
            yield operand
        elif isinstance(operand, Address) and isinstance(operand.base, Symbol):
            yield operand.base
