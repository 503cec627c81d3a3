"""What a call and a compilation cost beside the arithmetic: ``python -m benchmarks.overhead``; see README.md.

The product is so small (one token, 32 x 32, 4 bits) that a call of it is all overhead.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import isa
from benchmarks.files import OUT_HELP, write_result

SIZE = 32
# A round of each kind takes this long. It is shorter than the turns in which an operating system shares a core. So the
# least of many rounds is one that nothing interrupted, for long calls as for short ones.
WINDOW_SECONDS = 1e-4
ROUNDS = 4000
# Products of a chain that is compiled: what a chain costs more than one product, by the products that it has more.
CHAIN = 21
ONE, MANY, ONE_MORE = "compiled graph of one op", f"compiled graph of {CHAIN} ops", "one more op in compiled code"
BACKENDS = ("exllama", "inductor")

# In a process of its own, whose caches of compiled code are those of the environment.
_COMPILE_DEMO = """
import sys, time
import torch
from exllama_ops import load_model
from exllama_ops.integrations.generation import CompiledGenerator
torch.set_num_threads(int(sys.argv[2]))
generator = CompiledGenerator(load_model(sys.argv[1], progress=False), mode="whole", backend=sys.argv[3])
start = time.perf_counter()
generator.warm_up()
print(time.perf_counter() - start)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description="Measure what a call costs beside its arithmetic, and compiling the demo model.",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads, and cores (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=OUT_HELP)
    args = parser.parse_args(arguments)
    try:
        isa.hold_to_cores(args.threads)
    except isa.HoldError as error:
        parser.error(str(error))
    import torch

    from benchmarks.machine import description
    from exllama_ops.backends.cpu import BACKEND
    from exllama_ops.cli.output import emit, say
    from exllama_ops.integrations.demo import demo_checkpoint
    from exllama_ops.progress import Screen

    torch.set_num_threads(args.threads)
    if BACKEND.library is None:
        say("error: no native CPU kernels were found at import; run `exllama-ops build` first")
        return 1
    isa_in_use = BACKEND.library.isa_in_use() or ""
    with Screen() as screen:
        path = demo_checkpoint(screen)
    given = sys.argv[1:] if arguments is None else arguments
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.overhead", *given]),
        "machine": description(args.threads, isa_in_use, "native", ["exllama-ops", "torch", "transformers"]),
        "microseconds": _calls(),
        "compile_seconds": {backend: compile_seconds(path, args.threads, backend) for backend in BACKENDS},
    }
    emit(_table(result))
    write_result(args.out, "overhead", result, _table(result))
    return 0


def _calls() -> dict[str, dict[str, float]]:
    """Microseconds of a call of each kind."""
    import torch

    from exllama_ops import ExllamaLinear, quantize

    torch.manual_seed(0)
    layer = ExllamaLinear.from_weight(quantize(torch.randn(SIZE, SIZE), 4, SIZE))
    x = torch.randn(1, SIZE)
    gemm = torch.ops.exllama.gptq_gemm.default
    args = (x, *layer.to_packed().weight.arguments)

    def chain(products: int) -> Callable[[], object]:
        def function(x: torch.Tensor) -> torch.Tensor:
            for _ in range(products):
                x = gemm(x, *args[1:])
            return x

        compiled = torch.compile(function, fullgraph=True)
        return lambda: compiled(x)

    times: dict[str, list[float]] = {}
    with torch.inference_mode():
        kinds = {
            "eager op, inference_mode": lambda: gemm(*args),
            "eager ExllamaLinear, inference_mode": lambda: layer(x),
            "aten.empty_like, inference_mode": lambda: torch.empty_like(x),
            ONE: chain(1),
            MANY: chain(CHAIN),
        }
        times.update(_rounds(kinds))
    with torch.no_grad():
        times.update(
            _rounds({"eager op, no_grad": lambda: gemm(*args), "eager ExllamaLinear, no_grad": lambda: layer(x)})
        )
    spreads = {name: _spread(values) for name, values in times.items()}
    more = [(many - one) / (CHAIN - 1) for one, many in zip(times[ONE], times[MANY], strict=True)]
    # The least difference would be that of a chain and a single op which met more of the machine's other work.
    least = (spreads[MANY]["least"] - spreads[ONE]["least"]) / (CHAIN - 1)
    return {**spreads, ONE_MORE: {**_spread(more), "least": least}}


def _rounds(kinds: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Microseconds of a call of each kind, in turns."""
    calls = {name: _calls_in_window(call) for name, call in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(ROUNDS):
        for name, call in kinds.items():
            times[name].append(1e6 * _seconds(call, calls[name]))
    return times


def _calls_in_window(call: Callable[[], object]) -> int:
    return max(1, int(WINDOW_SECONDS / min(_seconds(call, 1) for _ in range(20))))


def _seconds(call: Callable[[], object], calls: int) -> float:
    """Seconds per call, averaged over `calls`. One untimed call warms the caches first."""
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _spread(values: Sequence[float]) -> dict[str, float]:
    from benchmarks.timing import Spread

    spread = Spread.of(values)
    return {"median": spread.median, "iqr": spread.iqr, "least": min(values)}


def compile_seconds(checkpoint: Path, threads: int, backend: str) -> dict[str, float]:
    """Seconds to compile a model's two graphs: with empty caches, and in a second process that finds the first's."""
    with tempfile.TemporaryDirectory() as caches:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
        command = [sys.executable, "-c", _COMPILE_DEMO, str(checkpoint), str(threads), backend]

        def run() -> float:
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            return float(done.stdout)

        return {"cold": run(), "warm": run()}


def _table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        "# Overhead",
        "",
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {machine['isa']}, commit "
        f"{machine['commit']}, torch {machine['packages']['torch']}; float32, 1 x {SIZE} times {SIZE} x {SIZE}, "
        f"4 bits; median of {ROUNDS} rounds of {1e6 * WINDOW_SECONDS:g} us ± interquartile range, and the least of the "
        "rounds, which other work on the machine disturbs least; arithmetic included.",
        "",
        f"```\n{result['command']}\n```",
        "",
        "| a call of | microseconds | least |",
        "| --- | ---: | ---: |",
        *(
            f"| {name} | {t['median']:.2f} ±{t['iqr']:.2f} | {t['least']:.2f} |"
            for name, t in result["microseconds"].items()
        ),
        "",
        "| compiling the two graphs of the demo model | cold, seconds | warm |",
        "| --- | ---: | ---: |",
        *(
            f'| backend "{backend}" | {seconds["cold"]:.1f} | {seconds["warm"]:.1f} |'
            for backend, seconds in result["compile_seconds"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
