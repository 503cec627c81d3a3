"""Programs in a process of their own: a fresh device, or one that a fault leaves useless."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
# What programs share: a weight of act-order on the host, and x.
WEIGHT = """
import torch, exllama_ops
from conformance.weights import Case, build
from cuda import bounds
from exllama_ops.testing.bounds import assert_within_bound

weight = build(Case(4, 512, 128, 128, "perm"))
x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0)).half()
"""


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program after `WEIGHT`, with the modules of the tests."""
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS.parent / "tools")))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, "-c", WEIGHT + program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def assert_ended_well(ended: subprocess.CompletedProcess[str]) -> None:
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.endswith("done\n")
