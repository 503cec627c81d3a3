"""A run of the benchmarks, from the command line's arguments to the files."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cases import SHAPES, TOKENS, Case
from benchmarks.conformance import ConformanceError
from benchmarks.limits import Limits, LimitsError
from benchmarks.machine import description
from benchmarks.peers import PEERS
from benchmarks.peers.peer import Peer
from benchmarks.plan import Budget, Missing, Plan
from benchmarks.report import record, table
from benchmarks.results import Measurement
from exllama_ops.backends.cpu import BACKEND
from exllama_ops.cli.output import emit, say


def run(args: argparse.Namespace, command: str) -> int:
    """Measure what ``benchmarks.run`` was asked for and write it down.

    Args:
        args: of its parser.
        command: the line that makes the same results.

    Returns:
        The exit status: 1 if a result of ours is wrong or nothing can be measured. Nothing is written then.
    """
    torch.set_num_threads(args.threads)
    measurements: list[Measurement] = []
    missing: list[Missing] = []
    peers = _chosen(args.peers)
    try:
        isa = _isa_in_use()
        limits = Limits(isa, args.threads)
        with torch.inference_mode():
            for K, N in args.shapes or SHAPES:
                case = Case(K, N, args.bits, args.group_size, args.act_order)
                plan = Plan(
                    case,
                    args.M or TOKENS,
                    peers,
                    threads=args.threads,
                    held=args.isa,
                    dtype=getattr(torch, args.dtype),
                )
                for measurement in plan.measurements(limits.measure, Budget(args.seconds, args.rounds)):
                    measurements.append(measurement)
                    _say_times(measurement)
                missing += plan.missing
                del plan
                gc.collect()
    except (ConformanceError, LimitsError) as error:
        say(f"error: {error}")
        return 1
    machine = description(args.threads, isa, args.isa, _packages(peers))
    result = record(command, machine, _configuration(args), measurements, missing)
    text = table(result)
    emit(text)
    _write(args, result, text)
    return 0


def _isa_in_use() -> str:
    """The instruction set of our kernels; builds them if need be."""
    BACKEND.build()
    isa = None if BACKEND.library is None else BACKEND.library.isa_in_use()
    if isa is None:
        reasons = "; ".join(BACKEND.failure) or "EXLLAMA_OPS_CPU_ISA names an instruction set that this CPU lacks"
        raise LimitsError(f"the native CPU kernels are not in use: {reasons}")
    return isa


def _chosen(words: Sequence[str] | None) -> list[Peer]:
    return [peer for peer in PEERS if words is None or any(word.lower() in peer.name.lower() for word in words)]


def _packages(peers: Sequence[Peer]) -> list[str]:
    return ["exllama-ops", "torch", *(package for peer in peers for package in peer.packages)]


def _configuration(args: argparse.Namespace) -> dict[str, object]:
    return {
        "bits": args.bits,
        "group_size": args.group_size,
        "act_order": args.act_order,
        "dtype_of_our_x": args.dtype,
        "seconds": args.seconds,
        "rounds_at_least": args.rounds,
    }


def _say_times(measurement: Measurement) -> None:
    times = {kernel.name: 1e3 * measurement.seconds(kernel).median for kernel in measurement.kernels}
    say("  " + ", ".join(f"{name} {ms:.3g} ms" for name, ms in times.items()))


def _write(args: argparse.Namespace, result: dict[str, object], text: str) -> None:
    from benchmarks.plot import plot

    order = "-act-order" if args.act_order else ""
    held = "" if args.isa == "native" else f"-{args.isa}"
    plural = "" if args.threads == 1 else "s"
    stem = f"{args.bits}bit-g{args.group_size}{order}{held}-{args.threads}thread{plural}"
    args.out.mkdir(parents=True, exist_ok=True)
    line = json.dumps(result, indent=1) + "\n"
    files: dict[Path, str] = {
        args.out / f"{stem}.json": line,
        args.out / f"{stem}.md": f"{text}\n![plot]({stem}.svg)\n",
    }
    if args.json is not None:
        files[args.json] = line
    for path, content in files.items():
        path.write_text(content)
    plot(result, args.out / f"{stem}.svg")
