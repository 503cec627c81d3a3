"""Compiles exported programs into AOTInductor packages; a process of its own runs this file.

Its argument TASKS is a JSON file with a list of objects. In them "program" and "package" are paths, "options" are
Inductor's, and "fuse" says whether `FuseSharedInput` passes over the program first. As many processes as are asked for
run at once. They are forked, so that they share the imports, a good part of the work.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._inductor.compile_fx
from torch._inductor.cpu_vec_isa import valid_vec_isa_list

from exllama_ops.compile.shared_input import FuseSharedInput


def main(tasks: str, processes: str) -> int:
    """Compile all; returns the exit status."""
    waiting: list[dict[str, Any]] = json.loads(Path(tasks).read_text(encoding="utf-8"))
    # It compiles and runs programs, and remembers the answer, which the forked processes share.
    valid_vec_isa_list()
    running = failed = 0
    while (waiting and not failed) or running:
        if waiting and not failed and running < int(processes):
            task = waiting.pop(0)
            if os.fork() == 0:
                os._exit(_status(task))
            running += 1
        else:
            _, status = os.wait()
            running -= 1
            failed |= status
    return int(failed != 0)


def _status(task: dict[str, Any]) -> int:
    try:
        _compile(**task)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def _compile(program: str, package: str, options: dict[str, Any], fuse: bool) -> None:
    exported = torch.export.load(program)
    if fuse:
        FuseSharedInput()(exported.graph)
        exported.graph_module.recompile()
    # It appears complete: whoever waits counts the packages that are there.
    unfinished = f"{package}.unfinished.pt2"
    torch._inductor.aoti_compile_and_package(exported, package_path=unfinished, inductor_configs=options)
    os.rename(unfinished, package)
