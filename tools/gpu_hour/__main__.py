"""The command line: ``python -m tools.gpu_hour``, or ``make gpu``; docs/gpu.md has what to type."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.gpu_hour.hour import FOLDERS, Hour, say
from tools.gpu_hour.plan import PARTS, STEPS
from tools.gpu_hour.records import Folder
from tools.gpu_hour.report import write_report

OUT = Path("build") / "gpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 1 if a part failed or there is no device, 3 if another call has to go on.
    """
    args = _parser().parse_args(arguments)
    if not args.dry_run:
        return _hour(args, args.out)
    # The reference needs no compiler. It has to be named before the package is imported.
    os.environ["EXLLAMA_OPS_BACKEND"] = "reference"
    sys.path[:0] = FOLDERS
    with tempfile.TemporaryDirectory() as scratch:
        return _hour(args, Path(scratch))


def _hour(args: argparse.Namespace, out: Path) -> int:
    folder = Folder(out)
    folder.open(resume=args.resume or bool(args.step))
    parts = [part for part in PARTS if not args.step or {part.step, part.name} & set(args.step)]
    hour = Hour(folder, args.dry_run, args.library, None if args.minutes is None else 60 * args.minutes)
    left = hour.run(parts, resume=args.resume)
    records = [record for part in PARTS if (record := folder.record(part.name)) is not None]
    text = write_report(out, records, left, hour.sources)
    say("" if args.dry_run else f"\n{out / 'report.md'}")
    say(text.partition("\n## ")[0].strip())
    if left:
        why = "no time" if hour.has_device else "no CUDA device"
        say(f"\nThere was {why} for {', '.join(left)}: the same command with --resume goes on.")
        return 3 if hour.has_device else 1
    return 1 if any(record.result.status in ("failed", "timeout") for record in records) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_hour",
        description="Build the CUDA kernels, check, test, compare, profile and measure them on this machine's GPU.",
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=OUT,
        metavar="FOLDER",
        help="for logs, records and the report (default: %(default)s)",
    )
    add(
        "--step",
        action="append",
        metavar="NAME",
        choices=[*STEPS, *(part.name for part in PARTS)],
        help="one alone; again for more: %(choices)s",
    )
    add("--resume", action="store_true", help="go on after an earlier call with the same folder")
    add("--minutes", type=float, metavar="N", help="of this call; --resume goes on. Default: as many as it takes")
    add(
        "--library",
        type=Path,
        metavar="FOLDER",
        help="a CUDA library with its record, built elsewhere (default: library in --out, if it is there)",
    )
    add("--dry-run", action="store_true", help="walk every part without a device, and keep nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
