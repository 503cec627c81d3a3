"""Tensor-core instructions that a part of a warp may reach alone, in the text of nvdisasm.

All lanes of a warp must issue them together. So they must not depend on a branch that lanes of one warp may take
differently. What differs between lanes comes from the number of the thread and from memory at addresses that differ.
The number of the warp, which is that of the thread without its five lowest bits, does not differ. A thread block must
have one dimension for that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)(.*?);?\s*$")
_LABEL = re.compile(r"^([.$]\S+):$")
_TARGET = re.compile(r"`\(([^)]+)\)")
_REGISTER = re.compile(r"(?<![UA-Z])(R\d+|P\d)(\.64)?(?![\w])")
_TENSOR_CORES = ("HMMA", "IMMA", "QMMA", "OMMA")
_WITHOUT_RESULT = ("BRA", "CALL", "EXIT", "BPT", "BAR", "BSSY", "BSYNC", "WARPSYNC", "NOP")
_THE_SAME_IN_ALL_LANES = ("R2UR", "S2UR", "VOTE", "VOTEU", "ULDC", "UMOV")
_END = -1  # of the kernel, after every EXIT


@dataclass(frozen=True)
class _Instruction:
    text: str
    predicate: str | None  # the register without its negation
    mnemonic: str
    operands: Sequence[str]
    successors: Sequence[int]

    @property
    def opcode(self) -> str:
        return self.mnemonic.partition(".")[0]


def reached_by_some_lanes(text: str) -> list[str]:
    """The lines of a kernel's tensor-core instructions that a part of a warp may reach alone.

    Raises:
        ValueError: there is a jump whose target the text does not name.
    """
    code = _parse(text)
    meeting = _where_ways_meet(code)
    parted: set[int] = set()
    while True:
        differing = _differing(code, parted)
        found = set(parted)
        for index, instruction in enumerate(code):
            if len(instruction.successors) > 1 and instruction.predicate in differing[index]:
                found |= _between(code, index, meeting[index])
        if found == parted:
            break
        parted = found
    return [
        instruction.text
        for index, instruction in enumerate(code)
        if instruction.opcode in _TENSOR_CORES and (index in parted or instruction.predicate in differing[index])
    ]


def _parse(text: str) -> list[_Instruction]:
    lines: list[re.Match[str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(lines)
        elif match := _LINE.match(line):
            lines.append(match)
    code = []
    for index, match in enumerate(lines):
        predicate, mnemonic, rest = match.groups()
        opcode, target = mnemonic.partition(".")[0], _TARGET.search(rest)
        operands = [operand.strip() for operand in rest.split(",")]
        jumps = opcode in ("BRA", "CALL")  # without a RET, which is refused, ptxas has a CALL for a jump that is far
        if jumps and re.match(r"!?U?P\d", operands[0]):
            predicate = operands[0]
        if opcode in ("BRX", "JMP", "RET") or (jumps and (not target or target[1] not in labels)):
            raise ValueError(f"a jump to an unknown place: {match[0].strip()}")
        after = [] if opcode == "BPT" or ((jumps or opcode == "EXIT") and not predicate) else [index + 1]
        after += [labels[target[1]]] if jumps and target else [_END] if opcode == "EXIT" else []
        register = predicate.lstrip("!") if predicate else None
        code.append(_Instruction(match[0].strip(), register, mnemonic, operands, after))
    return code


def _where_ways_meet(code: list[_Instruction]) -> dict[int, int]:
    """For each branch the first instruction that every way from it to the end passes."""
    # The nearest first, in lists: what every way from an instruction passes. Ways into a trap do not count.
    passed: dict[int, list[int]] = {_END: [_END]}
    changed = True
    while changed:
        changed = False
        for index in reversed(range(len(code))):
            ways = [passed[successor] for successor in code[index].successors if successor in passed]
            if ways:
                common = set(ways[0]).intersection(*ways[1:])
                every = [index, *(step for step in ways[0] if step in common)]
                if passed.get(index) != every:
                    passed[index], changed = every, True
    branches = (index for index, instruction in enumerate(code) if len(instruction.successors) > 1)
    return {index: passed[index][1] if index in passed else _END for index in branches}


def _between(code: list[_Instruction], branch: int, meeting: int) -> set[int]:
    waiting = [index for index in code[branch].successors if index not in (meeting, _END)]
    seen = set(waiting)
    while waiting:
        for index in code[waiting.pop()].successors:
            if index not in (meeting, _END) and index not in seen:
                seen.add(index)
                waiting.append(index)
    return seen


def _differing(code: list[_Instruction], parted: set[int]) -> list[frozenset[str]]:
    """The registers that may differ between lanes, before each instruction; "tid R0" says that R0 is the thread."""
    before: list[frozenset[str] | None] = [None] * len(code)
    before[0] = frozenset()
    waiting = [0]
    while waiting:
        index = waiting.pop()
        known = before[index]
        assert known is not None
        after = _after(code[index], known, index in parted)
        for successor in code[index].successors:
            had = before[successor] if successor != _END else after
            if had is None or not after <= had:
                before[successor] = after | (had or frozenset())
                waiting.append(successor)
    return [registers or frozenset() for registers in before]


def _after(instruction: _Instruction, before: frozenset[str], is_parted: bool) -> frozenset[str]:
    # A store, or a copy into shared memory, begins with its address.
    if instruction.opcode in _WITHOUT_RESULT or "[" in instruction.operands[0]:
        return before
    written, sources = _results(instruction)
    differs = any(source in before for source in sources) and not _is_of_the_warp(instruction, before)
    special = instruction.operands[-1] if instruction.opcode == "S2R" else ""
    differs |= special in ("SR_TID.X", "SR_LANEID") or instruction.opcode in ("SHFL", "ATOM", "ATOMG", "ATOMS")
    differs |= is_parted or instruction.predicate in before
    if instruction.opcode in _THE_SAME_IN_ALL_LANES:
        differs = False
    is_thread = special == "SR_TID.X" or (
        instruction.opcode in ("MOV", "IMAD") and ".MOV" in f".{instruction.mnemonic}" and _thread(sources, before)
    )
    marks = {f"tid {register}" for register in written}
    kept = before if instruction.predicate else before - set(written) - marks
    if not differs:
        return frozenset(kept)
    return frozenset(kept | set(written) | (marks if is_thread and not is_parted else set()))


def _thread(sources: Sequence[str], before: frozenset[str]) -> bool:
    return all(f"tid {source}" in before for source in sources if source in before)


def _is_of_the_warp(instruction: _Instruction, before: frozenset[str]) -> bool:
    """Whether an instruction takes no more of the thread's number than the number of its warp."""
    differing = [operand for operand in instruction.operands[1:] if operand.split(".")[0] in before]
    if len(differing) != 1 or f"tid {differing[0].split('.')[0]}" not in before:
        return False
    constants = [int(operand, 16) for operand in instruction.operands if re.fullmatch(r"0x[0-9a-f]+", operand)]
    if instruction.mnemonic.startswith("SHF.R"):
        return instruction.operands[1] == "RZ" and constants[:1] >= [5]
    if instruction.mnemonic == "LEA.HI":
        return constants[-1:] <= [27]
    is_and = instruction.mnemonic == "LOP3.LUT" and instruction.operands[-2:-1] == ["0xc0"]
    return is_and and constants[0] % 32 == 0


def _results(instruction: _Instruction) -> tuple[list[str], list[str]]:
    """The registers that an instruction writes, and those that it reads."""
    operands = instruction.operands
    most = 1 + (2 if instruction.opcode in ("IADD3", "LEA", "IMAD", "LOP3") else 1)
    count = 1
    while count < min(most, len(operands)) and re.fullmatch(r"P[\dT]", operands[count]):
        count += 1
    if instruction.opcode == "SHFL":
        count = 2
    if instruction.opcode == "R2P":
        return [f"P{number}" for number in range(7)], list(_registers(operands[1:]))
    wide = next((int(bits) // 32 for bits in re.findall(r"\.(64|128)\b", instruction.mnemonic)), 1)
    if ".WIDE" in instruction.mnemonic or instruction.mnemonic == "CS2R":
        wide = 2
    if instruction.opcode in (*_TENSOR_CORES, "LDSM"):
        wide = 4
    written = []
    for register in _registers(operands[:count]):
        letter, number = register[0], int(register[1:])
        written += [f"{letter}{number + i}" for i in range(wide if letter == "R" else 1)]
    return written, list(_registers(operands[count:]))


def _registers(operands: Sequence[str]) -> Iterator[str]:
    for operand in operands:
        for register, wide in _REGISTER.findall(operand):
            yield register
            if wide:
                yield f"R{int(register[1:]) + 1}"
