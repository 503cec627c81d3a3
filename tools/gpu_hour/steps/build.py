"""The CUDA library: what was built elsewhere is taken, else it is built here and kept for the other parts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from exllama_ops.backends.native import cache
from exllama_ops.backends.native.compile import CUDA
from tools.gpu_hour.part import Options
from tools.gpu_hour.records import Result

_COMMAND = (sys.executable, "-m", "exllama_ops", "build", "--cuda", "--json")


def run(what: str, options: Options) -> Result:
    """Have a library in ``library`` of the output folder, or the one that was named."""
    if options.dry:
        reasons = cache.reasons_against_building(CUDA)
        return Result(
            "passed",
            "it could be built here" if not reasons else f"it could not be built here: {'; '.join(reasons)}",
            not_walked=["nvcc: a build takes minutes"],
        )
    given, own = os.environ.get(CUDA.given), options.folder.library
    built = _build(dict(os.environ))
    if isinstance(built, str) and given == str(own.resolve()):
        print(f"{built}\nThe library that an earlier call left is built anew.")
        built = _build({name: value for name, value in os.environ.items() if name != CUDA.given})
    if isinstance(built, str):
        return Result("failed", built)
    if built["origin"] != "given":
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(Path(built["library"]).parent, own)
    size = Path(built["library"]).stat().st_size / 2**20
    seconds = f"{built['seconds']:.0f} s of compiling" if built["origin"] == "built" else "not compiled now"
    return Result("passed", f"{built['origin']}: {built['library']}, {size:.1f} MiB, {seconds}", data=built)


def _build(environment: dict[str, str]) -> dict[str, Any] | str:
    """What the command says of the library, or its error."""
    ended = subprocess.run(_COMMAND, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if ended.returncode:
        return f"exllama-ops build --cuda ended by exit status {ended.returncode}; the log has its words"
    built: dict[str, Any] = json.loads(ended.stdout)
    return built
