"""The small smoke test under compute-sanitizer, by one of its tools; only our kernels are looked at."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tools.gpu_hour.part import Options
from tools.gpu_hour.process import find
from tools.gpu_hour.records import Result

_PROGRAM = "compute-sanitizer"
_ERRORS_FOUND = 86
_SUMMARY = re.compile(r"========= (ERROR SUMMARY|RACECHECK SUMMARY): (.*)")
_SHOWN = 20


def run(what: str, options: Options) -> Result:
    """Run a tool."""
    program = find(_PROGRAM)
    command = command_of(program or _PROGRAM, what)
    if options.dry:
        return Result("passed", " ".join(command), not_walked=["the tool: it needs a device"])
    if program is None:
        return Result("skipped", f"there is no {_PROGRAM}")
    # Each tensor has an allocation of its own, so that a step beyond its end is one beyond its memory.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ended = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(ended.stdout)
    return result_of(ended.stdout, ended.returncode)


def command_of(program: str, tool: str) -> list[str]:
    """The line that runs a tool."""
    options = [f"--tool={tool}", f"--error-exitcode={_ERRORS_FOUND}", "--kernel-name=kernel_substring=exllama"]
    return [program, *options, "--show-backtrace=device", sys.executable, "-m", "tools.gpu_hour.steps.smoke"]


def result_of(printed: str, status: int) -> Result:
    """What the tool has printed, by its exit status."""
    summaries = [match[2] for match in _SUMMARY.finditer(printed)]
    lines = [line[10:].strip() for line in printed.splitlines() if line.startswith("========= ") and line[10:].strip()]
    if status == 0 and summaries:
        return Result("passed", summaries[-1])
    summary = summaries[-1] if summaries else "it has written no summary"
    return Result("failed", f"{summary} (exit status {status})", lines[:_SHOWN])
