"""A run of the benchmarks, from the command line's arguments to the files."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence

import torch

from benchmarks.cases import SHAPES, TOKENS, Case
from benchmarks.conformance import ConformanceError
from benchmarks.devices.cpu import Cpu
from benchmarks.devices.cuda import Cuda, TorchGpu
from benchmarks.devices.device import Device, DeviceError
from benchmarks.files import write_result
from benchmarks.limits import LimitsError
from benchmarks.peers.peer import Peer
from benchmarks.plan import Budget, Missing, Plan
from benchmarks.quiet import LOOK_SECONDS, Load, Watch
from benchmarks.report import record, table
from benchmarks.results import Measurement
from exllama_ops.cli.output import emit, say


def run(args: argparse.Namespace, command: str) -> int:
    """Measure what ``benchmarks.run`` was asked for and write it down.

    Args:
        args: of its parser.
        command: the line that makes the same results.

    Returns:
        The exit status: 1 if a result of ours is wrong or nothing can be measured. Nothing is written then.
    """
    measurements: list[Measurement] = []
    missing: list[Missing] = []
    try:
        device = _device(args)
        device.open()
        peers = _chosen(device.peers, args.peers)
        before = _load_before()
        with torch.inference_mode():
            for K, N in args.shapes or SHAPES:
                case = Case(K, N, args.bits, args.group_size, args.act_order)
                plan = Plan(case, args.M or TOKENS, peers, device=device, dtype=getattr(torch, args.dtype))
                for measurement in plan.measurements(device.measure_limits, Budget(args.seconds, args.rounds)):
                    measurements.append(measurement)
                    _say_times(measurement)
                missing += plan.missing
                del plan
                gc.collect()
    except (ConformanceError, DeviceError, LimitsError) as error:
        say(f"error: {error}")
        return 1
    result = record(command, device.machine(_packages(peers)), _configuration(args), measurements, missing, before)
    if not result["quiet"]:
        say(result["load"])
    text = table(result)
    emit(text)
    _write(args, device.label, result, text)
    return 0


def _device(args: argparse.Namespace) -> Device:
    if args.device == "cuda":
        return Cuda(TorchGpu(), getattr(torch, args.dtype))
    return Cpu(args.threads, args.isa)


def _load_before() -> Load:
    """What others take while this process does nothing."""
    watch = Watch()
    time.sleep(LOOK_SECONDS)
    load = watch.look()
    if not load.quiet:
        say(f"the machine is not quiet: {load}; the run goes on")
    return load


def _chosen(peers: Sequence[Peer], words: Sequence[str] | None) -> list[Peer]:
    return [peer for peer in peers if words is None or any(word.lower() in peer.name.lower() for word in words)]


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


def _write(args: argparse.Namespace, label: str, result: dict[str, object], text: str) -> None:
    order = "-act-order" if args.act_order else ""
    name = f"{args.bits}bit-g{args.group_size}{order}-{label}"
    folder = write_result(args.out, name, result, f"{text}\n![plot]({name}.svg)\n")
    if args.json is not None:
        args.json.write_text((folder / f"{name}.json").read_text())
    try:
        from benchmarks.plot import plot
    except ModuleNotFoundError as error:
        say(f"no plot is drawn: {error}; python -m benchmarks.plot {folder / name}.json draws it elsewhere")
        return
    plot(result, folder / f"{name}.svg")
