"""What the hour is made of: its parts in order, each with the minutes that it takes and those that it may take.

A part is a process of its own, so a fault of the device ends one part and not the hour. Nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_HEADERS = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
# What the smoke test goes through: every algorithm of the library, by its header.
ALGORITHMS = tuple(
    name for path in sorted(_HEADERS.glob("gemm_*.h")) for name in re.findall(r'kName = "(\w+)";', path.read_text())
)
SANITIZERS = ("memcheck", "synccheck", "initcheck", "racecheck")


@dataclass(frozen=True)
class Part:
    """A part of the hour.

    Args:
        name: the step, or the step and what of it, as "smoke.mma".
        minutes: that it is expected to take.
        limit_minutes: after which it is ended; below ten, which is what a command may take on a borrowed machine.
        needs_gpu: whether it is skipped where there is none.
        limit_elsewhere: the limit where there is no GPU, whose minutes would be counted; 0 for the same.
    """

    name: str
    minutes: float
    limit_minutes: float
    needs_gpu: bool = True
    limit_elsewhere: float = 0

    @property
    def step(self) -> str:
        """The module of ``steps`` that runs it."""
        return self.name.partition(".")[0]


PARTS = (
    Part("environment", 0.2, 2, needs_gpu=False),
    Part("build", 5, 9.5, needs_gpu=False, limit_elsewhere=90),
    *(Part(f"smoke.{algorithm}", 0.3, 3) for algorithm in ALGORITHMS),
    Part("smoke.others", 0.3, 3),
    Part("smoke.captures", 0.5, 4),
    Part("smoke.settings", 0.5, 4),
    Part("timing.in_order", 1.5, 5),
    Part("timing.act_order", 1.5, 5),
    Part("tests.gpu", 4, 9.5),
    *(Part(f"sanitize.{tool}", 2, 6) for tool in SANITIZERS),
    Part("tests.conformance_cuda", 5, 9.5),
    Part("tests.conformance_overlapping", 5, 9.5),
    Part("tests.conformance_triton", 6, 9.5),
    Part("peers.in_order", 4, 9.5),
    Part("peers.act_order", 3, 9.5),
    Part("profile", 1.5, 5),
    Part("constants", 1, 4),
)
STEPS = tuple(dict.fromkeys(part.step for part in PARTS))
