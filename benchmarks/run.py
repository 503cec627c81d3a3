"""Time our kernels beside peers and limits: ``python -m benchmarks.run``; README.md has the commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import isa
from benchmarks.files import OUT_HELP

# Those of exllama_ops, which may not be imported before the variables are set; tests/structure compares the two.
WIDTHS = (2, 3, 4, 8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = command_line()
    args = parser.parse_args(arguments)
    if args.device == "cpu":
        args.threads, args.isa = args.threads or 1, args.isa or "native"
        try:
            isa.hold_to(args.isa)
            isa.hold_to_cores(args.threads)
        except isa.HoldError as error:
            parser.error(str(error))
    else:
        for option in ("threads", "isa"):
            if getattr(args, option) is not None:
                parser.error(f"--{option} is of the CPU; --device {args.device} has none")
    # Only now: what is imported here reads the variables that were just set.
    from benchmarks.session import run

    return run(args, _command(arguments))


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Time gptq_gemm and gptq_gemm_dx, in turns with other libraries and the device's limits.",
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where kernels run (default: %(default)s)")
    add("--threads", type=int, help="of the CPU: threads of all, and cores of the process (default: 1)")
    add("--bits", type=int, default=4, choices=WIDTHS, help="default: %(default)s")
    add("--group-size", type=int, default=128, choices=(32, 64, 128), help="default: %(default)s")
    add("--act-order", action="store_true", help="groups in a random order of the rows")
    add(
        "--dtype", default="float16", choices=("float16", "bfloat16", "float32"), help="of our x (default: %(default)s)"
    )
    add("--shapes", nargs="+", type=_shape, metavar="KxN", help="default: those of Llama-2-7B")
    add("--M", nargs="+", type=int, metavar="M", help="numbers of tokens (default: 1 4 16 64 256 1024)")
    add("--peers", nargs="*", metavar="WORD", help="those whose names have one of the words; none without a word")
    add("--isa", choices=sorted(isa.VARIABLES), help="of the CPU: hold all kernels to it (default: native)")
    add("--seconds", type=float, default=12, help="of timing for each shape and M (default: %(default)s)")
    add("--rounds", type=int, default=5, help="at least, for each shape and M (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the results there too")
    add("--out", type=Path, metavar="DIR", help=OUT_HELP)
    return parser


def _shape(text: str) -> tuple[int, int]:
    K, _, N = text.partition("x")
    return int(K), int(N)


def _command(arguments: Sequence[str] | None) -> str:
    given = sys.argv[1:] if arguments is None else arguments
    return " ".join(["python -m benchmarks.run", *given])


if __name__ == "__main__":
    sys.exit(main())
