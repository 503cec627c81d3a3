"""Instructions on the way through a kernel's machine code, counted in the text of nvdisasm.

A loop body has paths that a problem does not take: other dtypes, ends of rows, a group that ends inside a step. What a
trip costs is therefore the cheapest cycle through the control-flow graph that still does the trip's work. The work is
named by the instructions that must be issued: multiply-adds of the tensor cores, FFMA, loads. An instruction counts
once for a warp, whether its predicate holds or not: it takes an issue slot.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)(.*?);?\s*$")
_TARGET = re.compile(r"`\(([^)]+)\)")
# The shape is in the mnemonic: HMMA.16816 multiplies 16 x 8 x 16 numbers of a warp.
_TENSOR_CORE = {"HMMA.16816": 2048, "HMMA.1688": 1024}


class SassError(ValueError):
    """The text is not what this module can read, or no way through it does the work."""


@dataclass
class _Block:
    """Instructions without a branch between them, and the names of the blocks that may follow."""

    counts: Counter[str] = field(default_factory=Counter)
    successors: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)


def kernels(text: str) -> dict[str, str]:
    """The code of each kernel in what ``nvdisasm -c`` prints, by its mangled name."""
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], (re.split(r"^\t\.section", code, flags=re.M)[0] for code in parts[1::2]), strict=True))


class Code:
    """The control-flow graph of one kernel.

    Args:
        text: one value of `kernels`.
    """

    def __init__(self, text: str) -> None:
        self._blocks: dict[str, _Block] = {}
        name, numbered = "", 0
        self._blocks[name] = block = _Block()
        open_end = True
        for line in text.splitlines():
            label = re.match(r"^([.$]\S+):$", line.strip())
            if label:
                if label[1].startswith("$") and label[1] in line and "$__internal" not in label[1]:
                    continue  # a second name of the kernel's beginning
                if open_end:
                    block.successors.append(label[1])
                name = label[1]
                self._blocks[name] = block = _Block()
                open_end = True
                continue
            instruction = _INSTRUCTION.match(line)
            if not instruction or not open_end:
                continue
            predicate, mnemonic, operands = instruction.groups()
            _count(block.counts, mnemonic)
            opcode = mnemonic.split(".")[0]
            target = _TARGET.search(operands)
            if opcode == "CALL" and target and "$__internal" in target[1]:
                block.calls.append(target[1])
                continue
            if opcode in ("BRA", "CALL", "EXIT", "RET", "BRX", "JMP"):
                if opcode in ("BRX", "JMP") or (opcode in ("BRA", "CALL") and not target):
                    raise SassError(f"a jump that this module does not know: {line.strip()}")
                if opcode in ("BRA", "CALL") and target:
                    block.successors.append(target[1])
                if opcode == "RET":
                    block.successors.append("return")
                # BRA.DIV and branches with a predicate as an operand go on too.
                open_end = bool(predicate) or ".DIV" in mnemonic or re.match(r"\s*U?!?U?P\d", operands) is not None
                if open_end:
                    numbered += 1
                    name = f"after {numbered}"
                    block.successors.append(name)
                    self._blocks[name] = block = _Block()
        self._called: dict[str, int] = {}

    def cheapest_cycle(self, needs: Mapping[str, int]) -> int:
        """How many instructions the cheapest way from a block back to itself issues that issues all of ``needs``.

        Args:
            needs: by "macs" of the tensor cores, or the beginning of a mnemonic, at least how many. No beginning may be
                one of another, so that an instruction meets one need.

        Raises:
            SassError: there is no such cycle.
        """
        keys = sorted(needs)
        if any(b.startswith(a) for a, b in pairwise(keys)):
            raise SassError(f"an instruction meets two needs of {keys}")
        wanted = tuple(needs[key] for key in keys)
        gains = {
            name: tuple(
                sum(count for mnemonic, count in block.counts.items() if mnemonic.startswith(key)) for key in keys
            )
            for name, block in self._blocks.items()
        }
        best: int | None = None
        counted = tuple(key != "macs" for key in keys)
        # A cycle that is found early ends the search for others, and large blocks are on the cheapest.
        for header in sorted(self._headers(), key=lambda name: sum(gains[name]), reverse=True):
            cost = self._cycle(header, gains, wanted, counted, best)
            best = best if cost is None else cost
        if best is None:
            raise SassError(f"no cycle issues {dict(needs)}")
        return best

    def _headers(self) -> list[str]:
        """The blocks that a later block, or the same, goes back to: every cycle passes one."""
        order = {name: number for number, name in enumerate(self._blocks)}
        back = [s for name, b in self._blocks.items() for s in b.successors if order.get(s, len(order)) <= order[name]]
        return list(dict.fromkeys(back))

    def _cycle(
        self,
        start: str,
        gains: Mapping[str, tuple[int, ...]],
        wanted: tuple[int, ...],
        counted: tuple[bool, ...],
        below: int | None,
    ) -> int | None:
        """By A*: what is still needed of instructions that are counted costs at least their number."""

        def still(had: tuple[int, ...]) -> int:
            return sum(b - a for a, b, counts in zip(had, wanted, counted, strict=True) if counts)

        nothing = tuple(0 for _ in wanted)
        queue = [(still(nothing), 0, start, nothing)]
        done: set[tuple[str, tuple[int, ...]]] = set()
        while queue:
            bound, cost, name, had = heapq.heappop(queue)
            if below is not None and bound >= below:
                return None
            if name == start and had == wanted:
                return cost
            if (name, had) in done or name not in self._blocks:
                continue
            done.add((name, had))
            has = tuple(min(a + b, limit) for a, b, limit in zip(had, gains[name], wanted, strict=True))
            block = self._blocks[name]
            here = cost + block.counts.total() - block.counts["macs"] + sum(map(self._call, block.calls))
            for successor in block.successors:
                heapq.heappush(queue, (here + still(has), here, successor, has))
        return None

    def _call(self, name: str) -> int:
        """The cheapest way through a subroutine."""
        if name not in self._called:
            queue, done = [(0, name)], set()
            while queue:
                cost, at = heapq.heappop(queue)
                if at == "return":
                    self._called[name] = cost
                    break
                if at in done:
                    continue
                done.add(at)
                block = self._blocks[at]
                for successor in block.successors:
                    heapq.heappush(queue, (cost + block.counts.total(), successor))
            else:
                raise SassError(f"{name} does not return")
        return self._called[name]


def _count(counts: Counter[str], mnemonic: str) -> None:
    counts[mnemonic] += 1
    if mnemonic.startswith("HMMA"):
        shape = next((macs for name, macs in _TENSOR_CORE.items() if mnemonic.startswith(name + ".")), None)
        if shape is None:
            raise SassError(f"a tensor-core instruction that this module does not know: {mnemonic}")
        counts["macs"] += shape
