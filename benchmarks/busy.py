"""What a product takes while another program wants one of the cores: ``python -m benchmarks.busy``; see README.md."""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.files import OUT_HELP, write_result

# (K, N, group size), 4 bits, one token: a layer of a 7B model, and one of the demo model.
SHAPES = ((4096, 4096, 128), (576, 1536, 32))
THREADS = (1, 2)
# Copies of a weight take turns, so that it comes from memory.
COPIES_BYTES = 256 << 20
# Longer than the turns in which an operating system shares a core.
WINDOW_SECONDS = 0.05
_LOOP = "while True: pass"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.busy",
        description="Time gptq_gemm on one and two threads, beside a busy loop on one core and without it, in turns.",
    )
    parser.add_argument("--seconds", type=float, default=60, help="of timing (default: %(default)s)")
    parser.add_argument("--core", type=int, default=0, help="that the loop runs on (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=OUT_HELP)
    args = parser.parse_args(arguments)
    from benchmarks.machine import description
    from exllama_ops.backends.cpu import BACKEND
    from exllama_ops.cli.output import emit, say

    if BACKEND.library is None:
        say("error: no native CPU kernels were found at import; run `exllama-ops build` first")
        return 1
    given = sys.argv[1:] if arguments is None else arguments
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.busy", *given]),
        "machine": description(max(THREADS), BACKEND.library.isa_in_use() or "", "native", ["exllama-ops", "torch"]),
        "microseconds": _measure(args.seconds, args.core),
    }
    emit(table(result))
    write_result(args.out, "busy", result, table(result))
    return 0


def _measure(seconds: float, core: int) -> list[dict[str, Any]]:
    """Microseconds of a call of each kind, in turns."""
    import torch

    products = {shape: _products(*shape) for shape in SHAPES}
    kinds = [(shape, threads, busy) for shape in SHAPES for threads in THREADS for busy in (False, True)]
    times: dict[Any, list[float]] = {kind: [] for kind in kinds}
    shuffle, start = random.Random(0), time.perf_counter()
    with busy_loop(core) as wanted, torch.inference_mode():
        while not times[kinds[-1]] or time.perf_counter() - start < seconds:
            for shape, threads, busy in shuffle.sample(kinds, len(kinds)):
                wanted(busy)
                torch.set_num_threads(threads)
                times[shape, threads, busy] += calls_in_window(products[shape])
    return [
        {"K": K, "N": N, "group_size": group_size, "threads": threads, "busy": busy, **spread(times[kind])}
        for kind in kinds
        for (K, N, group_size), threads, busy in [kind]
    ]


@contextmanager
def busy_loop(core: int) -> Iterator[Callable[[bool], None]]:
    """A function that says whether a loop shall run on a core from now on."""
    process = subprocess.Popen([sys.executable, "-c", _LOOP])
    try:
        os.sched_setaffinity(process.pid, [core])

        def wanted(busy: bool) -> None:
            process.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)

        yield wanted
    finally:
        process.kill()
        process.wait()


def _products(K: int, N: int, group_size: int) -> list[Callable[[], object]]:
    """Calls with one token, on one copy of the weight after the other."""
    import torch

    def words(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int32)

    order, x = torch.empty(0, dtype=torch.int32), torch.randn(1, K).half()

    def product() -> Callable[[], object]:
        scales = torch.rand(K // group_size, N).half() / 100
        weight = (words(K // 8, N), words(K // group_size, N // 8), scales, order, True, 4, True, group_size)
        return lambda: torch.ops.exllama.gptq_gemm(x, *weight)

    return [product() for _ in range(COPIES_BYTES // (K * N // 2))]


def calls_in_window(products: Sequence[Callable[[], object]]) -> list[float]:
    """Microseconds of each call, as many as one window holds, after one that is not timed."""
    times: list[float] = []
    products[0]()
    start = end = time.perf_counter()
    while end - start < WINDOW_SECONDS:
        begin = time.perf_counter()
        products[(len(times) + 1) % len(products)]()
        end = time.perf_counter()
        times.append(1e6 * (end - begin))
    return times


def spread(times: Sequence[float]) -> dict[str, float]:
    """Mean, median and quartiles; a stolen core shows in the mean, since the few calls that it hits take long."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"calls": len(times), "mean": statistics.fmean(times), "median": median, "q1": low, "q3": high}


def table(result: dict[str, Any]) -> str:
    """The result as a page."""
    machine = result["machine"]
    lines = [
        "# A busy core",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}, commit {machine['commit']}, torch "
        f"{machine['packages']['torch']}; gptq_gemm of one token, 4 bits, microseconds of a call. Busy: a loop is "
        "pinned to one core. The last column is the mean by that of one thread, idle or busy alike.",
        "",
        f"```\n{result['command']}\n```",
        "",
        "| K x N, group | threads | | mean | median | quartiles | by one thread |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    rows = result["microseconds"]
    one_thread = {(row["K"], row["N"], row["busy"]): row["mean"] for row in rows if row["threads"] == 1}
    for row in rows:
        shape, state = f"{row['K']} x {row['N']}, {row['group_size']}", "busy" if row["busy"] else "idle"
        lines.append(
            f"| {shape} | {row['threads']} | {state} | "
            f"{row['mean']:.1f} | {row['median']:.1f} | {row['q1']:.1f} to {row['q3']:.1f} | "
            f"{row['mean'] / one_thread[row['K'], row['N'], row['busy']]:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
