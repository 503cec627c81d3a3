"""A parser for the PTX that nvcc and Triton emit: text -> Module of variables and functions of instructions.

It knows the grammar and the scopes, not the instruction set, which is the translator's. Source: PTX ISA, 4 to 7.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

BYTES = {"pred": 1, "b128": 16} | {f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}
BYTES |= {"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32": 4, "f64": 8}


class PtxError(ValueError):
    """PTX that is not understood; the message begins with its line."""


@dataclass(frozen=True)
class Register:
    """A declared register, or a special one such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal; a float is kept as the bits of its `type` (f32 or f64), an integer has type None."""

    value: int
    type: str | None = None


@dataclass(frozen=True)
class Symbol:
    """A variable, a function or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    """`{a, b}`, or the parenthesised list of a call."""

    elements: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """`d|p`: a destination and a predicate, or two predicates."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    """`!p`."""

    register: Operand


Operand = Register | Immediate | Symbol | Address | Vector | Pair | Not


@dataclass
class Variable:
    """A declaration in any state space; `size_bytes` is None for an array of unknown size (dynamic shared memory)."""

    name: str
    space: str
    type: str
    alignment: int
    size_bytes: int | None
    initial: bytes = b""


@dataclass
class Instruction:
    """One instruction: `@guard opcode.modifiers operands`, its PTX line and, under -lineinfo, its source line."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: list[Operand]
    line: int
    guard: Register | Not | None = None
    source: tuple[str, int] | None = None

    def __str__(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


@dataclass
class Label:
    """A branch target; with `targets` it is a table of labels for brx.idx."""

    name: str
    targets: tuple[str, ...] | None = None


@dataclass
class Function:
    """An .entry or a .func with all its declarations, whose names are unique in it, and its statements in order."""

    name: str
    is_entry: bool
    parameters: list[Variable]
    results: list[Variable]
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    body: list[Instruction | Label] = field(default_factory=list)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    is_declaration: bool = False


@dataclass
class Module:
    """One PTX file."""

    target: str = ""
    variables: list[Variable] = field(default_factory=list)
    functions: list[Function] = field(default_factory=list)


@dataclass(frozen=True)
class Token:
    text: str
    line: int


_TOKEN = re.compile(
    r"""(?P<string>"[^"]*")
      | (?P<float>0[fF][0-9a-fA-F]{8}\b | 0[dD][0-9a-fA-F]{16}\b)
      | (?P<integer>0[xX][0-9a-fA-F]+U? | \d+U?)
      | (?P<register>%[\w$]+(\.[xyzw]\b)?)
      | (?P<directive>\.\w+(::\w+)*)
      | (?P<name>[A-Za-z_$][\w$]*(\.\w+(::\w+)*)*)
      | (?P<mark>[{}()\[\]<>,;:|@!+\-=])
      | (?P<space>\s+)""",
    re.VERBOSE,
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def _tokens(text: str) -> list[Token]:
    text = _COMMENT.sub(lambda match: "\n" * match.group().count("\n"), text)
    tokens, position, line = [], 0, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise PtxError(f"line {line}: no token at {text[position : position + 20]!r}")
        if match.lastgroup != "space":
            tokens.append(Token(match.group(), line))
        line += match.group().count("\n")
        position = match.end()
    return tokens


def integer(text: str) -> int:
    return int(text.rstrip("U"), 0)


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens = _tokens(text)
        self.at = 0
        self.module = Module()
        self.files: dict[int, str] = {}
        self.source: tuple[int, int] | None = None

    # --- cursor
    def peek(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        if self.at >= len(self.tokens):
            raise PtxError("the file ends too early")
        token = self.tokens[self.at]
        if expected is not None and token.text != expected:
            raise PtxError(f"line {token.line}: expected {expected!r}, got {token.text!r}")
        self.at += 1
        return token.text

    def accept(self, text: str) -> bool:
        if self.peek() == text:
            self.at += 1
            return True
        return False

    @property
    def line(self) -> int:
        return self.tokens[min(self.at, len(self.tokens) - 1)].line

    # --- module level
    def parse(self) -> Module:
        # Sources are named at the end of the file, after the .loc lines that need them.
        for number, path in re.findall(r"\.file\s+(\d+)\s+\"([^\"]*)\"", " ".join(token.text for token in self.tokens)):
            self.files[int(number)] = path
        while self.at < len(self.tokens):
            word = self.take()
            if word == ".version":
                self.take()  # `9.0` is an integer and a directive to the tokenizer
                self.take()
            elif word == ".target":
                self.module.target = self.take()
                while self.accept(","):
                    self.take()
            elif word == ".address_size":
                if self.take() != "64":
                    raise PtxError(f"line {self.line}: only 64-bit addresses are supported")
            elif word == ".file":
                self.take()
                self.take()
                while self.accept(","):
                    self.take()
            elif word == ".section":
                self.skip_section()
            elif word in (".visible", ".weak", ".extern", ".common"):
                continue
            elif word in (".entry", ".func"):
                self.module.functions.append(self.function(word == ".entry"))
            elif word in (".global", ".const", ".shared"):
                self.module.variables.extend(self.variables(word[1:]))
            elif word != ";":
                raise PtxError(f"line {self.tokens[self.at - 1].line}: unknown directive {word!r}")
        return self.module

    def skip_section(self) -> None:
        while self.take() != "{":
            pass
        while self.take() != "}":
            pass

    def variables(self, space: str) -> list[Variable]:
        """The rest of `.space .align 4 .b8 a[16] = {...}, b;`."""
        alignment = None
        while True:
            word = self.take()
            if word == ".align":
                alignment = integer(self.take())
            elif word[1:] in BYTES:
                kind = word[1:]
                break
            elif word not in (".attribute", ".unified", ".ptr"):
                raise PtxError(f"line {self.line}: unknown type {word!r} in a declaration")
        width = BYTES[kind]
        declared = []
        while True:
            name, count = self.take(), 1
            is_open = False
            while self.accept("["):
                if self.accept("]"):
                    is_open = True
                else:
                    count *= integer(self.take())
                    self.take("]")
            initial = self.initializer(kind) if self.accept("=") else b""
            if is_open and initial:
                count, is_open = len(initial) // width, False
            declared.append(
                Variable(name, space, kind, alignment or width, None if is_open else count * width, initial)
            )
            if not self.accept(","):
                break
        self.accept(";")
        return declared

    def initializer(self, kind: str) -> bytes:
        if self.accept("{"):
            parts = [self.initializer(kind)]
            while self.accept(","):
                parts.append(self.initializer(kind))
            self.take("}")
            return b"".join(parts)
        negative = self.accept("-")
        line, text = self.line, self.take()
        if text[:2].lower() in ("0f", "0d"):
            return int(text[2:], 16).to_bytes(BYTES[kind], "little")
        if not text[0].isdigit():
            raise PtxError(f"line {line}: an initializer with the address of {text!r} is not supported")
        value = -integer(text) if negative else integer(text)
        if kind in ("f32", "f64"):
            return struct.pack("<f" if kind == "f32" else "<d", value)
        return (value % (1 << 8 * BYTES[kind])).to_bytes(BYTES[kind], "little")

    # --- functions
    def parameters(self) -> list[Variable]:
        found: list[Variable] = []
        self.take("(")
        while not self.accept(")"):
            self.accept(",")
            space = self.take()
            if space not in (".param", ".reg"):
                raise PtxError(f"line {self.line}: expected .param, got {space!r}")
            alignment, kind = None, ""
            while self.peek().startswith("."):
                word = self.take()
                if word == ".align":
                    alignment = integer(self.take())
                elif word[1:] in BYTES:
                    kind = word[1:]
                elif word not in (".ptr", ".global", ".shared", ".const", ".local"):
                    raise PtxError(f"line {self.line}: unknown parameter attribute {word!r}")
            name, count = self.take(), 1
            while self.accept("["):
                count *= integer(self.take())
                self.take("]")
            width = BYTES[kind]
            found.append(Variable(name, "param", kind, alignment or width, count * width))
        return found

    def function(self, is_entry: bool) -> Function:
        results = self.parameters() if self.peek() == "(" else []
        name = self.take()
        parameters = self.parameters() if self.peek() == "(" else []
        function = Function(name, is_entry, parameters, results)
        while self.peek() not in ("{", ";"):
            word = self.take()
            values = []
            while self.peek()[:1].isdigit():
                values.append(integer(self.take()))
                self.accept(",")
            if word not in (".maxntid", ".minnctapersm", ".reqntid", ".maxnreg", ".noreturn", ".pragma"):
                raise PtxError(f"line {self.line}: unknown function directive {word!r}")
            function.directives[word[1:]] = tuple(values)
        if self.accept(";"):
            function.is_declaration = True
            return function
        _Body(self, function).parse()
        return function


class _Body:
    """The statements of one function. Names declared in a nested `{ }` get the number of their scope appended."""

    def __init__(self, parser: _Parser, function: Function) -> None:
        self.parser = parser
        self.function = function
        self.scopes: list[tuple[int, dict[str, str]]] = []
        self.count = 0
        self.labels: dict[tuple[int, str], str] = {}
        self.open_scopes: list[list[int]] = []  # at each statement of the body

    def parse(self) -> None:
        parser = self.parser
        parser.source = None
        parser.take("{")
        self.open()
        while self.scopes:
            word = parser.peek()
            here = [number for number, _ in self.scopes]
            if parser.accept("{"):
                self.open()
            elif parser.accept("}"):
                self.scopes.pop()
            elif parser.accept(";"):
                continue
            elif word.startswith("."):
                self.directive(parser.take())
            elif parser.tokens[parser.at + 1].text == ":" and word != "@":
                self.label()
            else:
                self.function.body.append(self.instruction())
            self.open_scopes += [here] * (len(self.function.body) - len(self.open_scopes))
        self.resolve_labels()

    def open(self) -> None:
        self.scopes.append((self.count, {}))
        self.count += 1

    def declare(self, name: str) -> str:
        number, names = self.scopes[-1]
        names[name] = name if number == 0 else f"{name}$scope{number}"
        return names[name]

    def lookup(self, name: str) -> str:
        return next((names[name] for _, names in reversed(self.scopes) if name in names), name)

    def directive(self, word: str) -> None:
        parser = self.parser
        if word == ".loc":
            file, line, _ = integer(parser.take()), integer(parser.take()), parser.take()
            parser.source = (file, line)
            while parser.accept(","):  # function_name $x, inlined_at file line column
                if parser.take() == "function_name":
                    parser.take()
                    if parser.accept("+"):
                        parser.take()
                else:
                    file, line, _ = integer(parser.take()), integer(parser.take()), parser.take()
        elif word == ".reg":
            self.registers()
        elif word in (".shared", ".local", ".param", ".global", ".const"):
            for variable in parser.variables(word[1:]):
                variable.name = self.declare(variable.name)
                self.function.variables.append(variable)
        elif word == ".pragma":
            parser.take()
        else:
            raise PtxError(f"line {parser.line}: unknown directive {word!r} in a function")

    def registers(self) -> None:
        parser = self.parser
        kind = parser.take()[1:]
        if kind not in BYTES:
            raise PtxError(f"line {parser.line}: registers of type {kind!r} are not supported")
        while True:
            name = parser.take()
            if parser.accept("<"):
                names = [f"{name}{index}" for index in range(integer(parser.take()))]
                parser.take(">")
            else:
                names = [name]
            for each in names:
                self.function.registers[self.declare(each)] = kind
            if not parser.accept(","):
                break
        parser.take(";")

    def label(self) -> None:
        parser = self.parser
        name = parser.take()
        parser.take(":")
        number = self.scopes[-1][0]
        unique = name if number == 0 else f"{name}$scope{number}"
        self.labels[number, name] = unique
        targets = None
        if parser.accept(".branchtargets"):
            targets = [parser.take()]
            while parser.accept(","):
                targets.append(parser.take())
            parser.take(";")
        self.function.body.append(Label(unique, None if targets is None else tuple(targets)))

    def instruction(self) -> Instruction:
        parser = self.parser
        guard: Register | Not | None = None
        if parser.accept("@"):
            negated = parser.accept("!")
            register = Register(self.lookup(parser.take()))
            guard = Not(register) if negated else register
        line = parser.line
        opcode, *modifiers = parser.take().split(".")
        operands: list[Operand] = []
        while not parser.accept(";"):
            operands.append(self.operand())
            if not parser.accept(","):
                parser.take(";")
                break
        source = None
        if parser.source is not None and parser.source[0] in parser.files:
            source = (parser.files[parser.source[0]], parser.source[1])
        return Instruction(opcode, tuple(modifiers), operands, line, guard, source)

    def operand(self) -> Operand:
        parser = self.parser
        if parser.accept("!"):
            return Not(self.operand())
        if parser.accept("{"):
            return self.list_until("}")
        if parser.accept("("):
            return self.list_until(")")
        if parser.accept("["):
            base = self.atom()
            offset = 0
            if parser.accept("+"):
                sign = -1 if parser.accept("-") else 1
                offset = sign * integer(parser.take())
            elif parser.accept("-"):
                offset = -integer(parser.take())
            parser.take("]")
            return Address(base, offset)
        first = self.atom()
        if parser.accept("|"):
            return Pair(first, self.atom())
        if parser.accept("+"):  # the address of an element: symbol + constant
            return Address(first, integer(parser.take()))
        return first

    def list_until(self, closing: str) -> Vector:
        elements: list[Operand] = []
        while not self.parser.accept(closing):
            elements.append(self.operand())
            self.parser.accept(",")
        return Vector(tuple(elements))

    def atom(self) -> Register | Immediate | Symbol:
        parser = self.parser
        negative = parser.accept("-")
        text = parser.take()
        if text[:2] in ("0f", "0F"):
            return Immediate(int(text[2:], 16) ^ (negative << 31), "f32")
        if text[:2] in ("0d", "0D"):
            return Immediate(int(text[2:], 16) ^ (negative << 63), "f64")
        if text[0].isdigit():
            return Immediate(-integer(text) if negative else integer(text))
        name = self.lookup(text)
        if name in self.function.registers or text.startswith("%") or text == "_":
            return Register(name)
        return Symbol(name)

    def resolve_labels(self) -> None:
        for statement, scopes in zip(self.function.body, self.open_scopes, strict=True):
            if isinstance(statement, Label) and statement.targets is not None:
                statement.targets = tuple(self.resolve(name, scopes) for name in statement.targets)
            elif isinstance(statement, Instruction) and statement.opcode in ("bra", "brx"):
                statement.operands = [
                    Symbol(self.resolve(operand.name, scopes)) if isinstance(operand, Symbol) else operand
                    for operand in statement.operands
                ]

    def resolve(self, name: str, scopes: list[int]) -> str:
        for number in reversed(scopes):
            if (number, name) in self.labels:
                return self.labels[number, name]
        raise PtxError(f"no label {name!r} in {self.function.name}")


_ENTRY = re.compile(r"^[^\S\n]*(?:\.(?:visible|weak|extern)\s+)*\.entry\s+([\w$]+)", re.MULTILINE)
_NESTING = re.compile(r"[{}]|//[^\n]*|/\*.*?\*/|\"[^\"]*\"", re.DOTALL)


def _end_of_body(text: str, start: int) -> int:
    """Behind the brace that closes the first one after `start`."""
    depth = 0
    for match in _NESTING.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if match.group() == "}" and depth == 0:
            return match.end()
    raise PtxError("a function does not end")


def entries(text: str) -> dict[str, tuple[int, int]]:
    """The name of each .entry, and where its text begins and ends."""
    return {match[1]: (match.start(), _end_of_body(text, match.end())) for match in _ENTRY.finditer(text)}


def without_entries(text: str, keep: str | None = None) -> str:
    """The module without its .entry functions but `keep`, every line in its place: what one kernel needs."""
    pieces, position = [], 0
    for name, (start, end) in entries(text).items():
        if name != keep:
            pieces += [text[position:start], "\n" * text.count("\n", start, end)]
            position = end
    return "".join([*pieces, text[position:]])


def parse(text: str) -> Module:
    """The module of a PTX file.

    Raises:
        PtxError: the text is not PTX, or uses a directive that is not supported.
    """
    return _Parser(text).parse()
