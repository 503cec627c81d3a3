"""One part, in a process of its own: ``python -m tools.gpu_hour.part smoke.mma --out FOLDER``."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_hour.plan import PARTS
from tools.gpu_hour.records import Folder, Result


@dataclass(frozen=True)
class Options:
    """What a step is told.

    Args:
        folder: the output folder.
        dry: whether no device is touched and the host stands in its place.
    """

    folder: Folder
    dry: bool = False


def refuse_other_backends() -> None:
    """Make an error of the warning that another backend computes in the place of the CUDA kernels."""
    warnings.filterwarnings("error", message="exllama_ops: the native CUDA kernels do not serve")


def run(name: str, options: Options) -> Result:
    """Run a part in this process; an exception is a failure, with its traceback in the log."""
    step, _, what = name.partition(".")
    refuse_other_backends()
    try:
        module = importlib.import_module(f"tools.gpu_hour.steps.{step}")
        result: Result = module.run(what, options)
    except Exception as error:
        traceback.print_exc()
        return Result("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_hour.part", description="Run one part of the hour.")
    parser.add_argument("name", choices=[part.name for part in PARTS])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args(arguments)
    folder = Folder(args.out)
    folder.open(resume=True)
    run(args.name, Options(folder)).write(folder.result(args.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
