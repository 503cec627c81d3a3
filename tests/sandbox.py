"""A copy of the package whose native kernels are a stub that compiles in seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from exllama_ops.backends.native.compile import CPU

ROOT = Path(__file__).parents[1]
MARK = 0x2A2A2A2A  # what the stub's gptq_unshuffle writes

CALL = """
import torch, exllama_ops
none = torch.empty(0, dtype=torch.int32)
words = torch.ops.exllama.gptq_unshuffle(torch.zeros(4, 8, dtype=torch.int32), none, 4)
print(int(words[0, 0]))
print(exllama_ops.backends.report()[0])
"""


class Sandbox:
    """A copy of the package with stub kernels, and a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.cache = folder / "cache"
        ignore = shutil.ignore_patterns("__pycache__", "_native", "_csrc")
        shutil.copytree(ROOT / "exllama_ops", self.root / "exllama_ops", ignore=ignore)
        csrc = next(path for path in (ROOT / "csrc", ROOT / "exllama_ops" / "_csrc") if path.is_dir())
        for part in ("bindings", "layout"):
            shutil.copytree(csrc / part, self.root / "csrc" / part)
        (self.root / "csrc" / "cpu").mkdir()
        for file in ("cpu.h", "workers.h", "workers.cpp"):
            shutil.copy(csrc / "cpu" / file, self.root / "csrc" / "cpu")
        self.stub = self.root / "csrc" / "cpu" / "stub.cpp"
        shutil.copy(ROOT / "tests" / "backends" / "stub_cpu.cpp", self.stub)

    def environment(self, changes: Mapping[str, str]) -> dict[str, str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("EXLLAMA_OPS_")}
        return {**clean, "PYTHONPATH": str(self.root), "EXLLAMA_OPS_CACHE": str(self.cache), **changes}

    def start(self, *command: str, **changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.root,
            env=self.environment(changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, **changes: str) -> tuple[int, str, str]:
        process = self.start(*command, **changes)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def call(self, code: str = CALL, **changes: str) -> tuple[str, str]:
        """stdout and stderr of a process that calls an op."""
        status, out, err = self.run("-c", code, **changes)
        assert status == 0, err
        return out, err

    def libraries(self) -> list[Path]:
        return sorted(self.cache.glob(f"native/*/{CPU.library}"))
