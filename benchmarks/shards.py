"""Row shards of an act-order weight beside the whole weight: ``python -m benchmarks.shards``; see README.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import isa
from benchmarks.files import OUT_HELP, write_result

SIZE, BITS, GROUP_SIZE = 4096, 4, 128
WAYS = (2, 4)
TOKENS = (1, 8, 64, 256)
# Copies of the whole weight take turns, and as many bytes of each shard.
COPIES = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shards",
        description="Time a row shard of an act-order weight beside the whole weight.",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads, and cores (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="for each M (default: %(default)s)")
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

    torch.set_num_threads(args.threads)
    if BACKEND.library is None:
        say("error: no native CPU kernels were found at import; run `exllama-ops build` first")
        return 1
    weights = _weights()
    given = sys.argv[1:] if arguments is None else arguments
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.shards", *given]),
        "machine": description(args.threads, BACKEND.library.isa_in_use() or "", "native", ["exllama-ops", "torch"]),
        "weights": {name: _described(weight) for name, weight in weights.items()},
        "tokens": [{"M": M, **_times(weights, M, args.seconds)} for M in TOKENS],
    }
    emit(_table(result))
    name = f"act-order-shards-{args.threads}thread{'s' * (args.threads > 1)}"
    say(f"written to {write_result(args.out, name, result, _table(result))}")
    return 0


def _weights() -> dict[str, Any]:
    """The packed whole, and the first of its row shards, by name."""
    from benchmarks.cases import Case, Weight
    from exllama_ops import prepare

    whole = Weight(Case(SIZE, SIZE, BITS, GROUP_SIZE, act_order=True))
    shards = {f"1/{ways}": prepare(whole.checkpoint.shard(slice(0, SIZE // ways))) for ways in WAYS}
    return {"whole": whole.packed, **shards}


def _described(weight: Any) -> dict[str, int]:
    """The sizes of a packed weight."""
    rows = weight.qweight.shape[0] * 32 // weight.bits
    return {"rows of W": weight.in_features, "rows": rows, "group_size": weight.group_size}


def _times(weights: Mapping[str, Any], M: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of each weight, and the ratios to the whole.

    A time is the least of the rounds, in each of which every weight is timed once. It is one that nothing interrupted,
    for long calls as for short ones.
    """
    import torch

    from benchmarks.quiet import Watch
    from benchmarks.timing import HostTimer, interleave

    runners = [_runner(name, weight, torch.randn(M, weight.in_features).half()) for name, weight in weights.items()]
    timer = HostTimer()
    for runner in runners:
        timer.warm_up(runner, M)
    watch = Watch()
    samples = interleave(runners, dict, tokens=M, seconds=seconds, rounds=5, timer=timer)
    load = watch.look()
    ms = {name: 1000 * min(sample.seconds for sample in found) for name, found in samples.items()}
    return {
        "ms": ms,
        "of_the_whole": {name: time / ms["whole"] for name, time in ms.items() if name != "whole"},
        "load": load.record(),
    }


def _runner(name: str, weight: Any, x: Any) -> Any:
    import torch

    from benchmarks.timing import Runner

    copies = COPIES * SIZE // weight.in_features
    calls: list[Callable[[], object]] = []
    for _ in range(copies):
        qweight, *rest = weight.weight.arguments
        calls.append(partial(torch.ops.exllama.gptq_gemm, x, qweight.clone(), *rest))
    return Runner(name, calls)


def _table(result: Mapping[str, Any]) -> str:
    machine, weights = result["machine"], result["weights"]
    lines = [
        f"`{result['command']}`",
        "",
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}. "
        f"{SIZE} x {SIZE}, {BITS} bits, groups of {GROUP_SIZE}, act-order; x in float16.",
        "A row shard is filled: "
        + "; ".join(
            f"{name} has {sizes['rows of W']} rows of W in {sizes['rows']}, in groups of {sizes['group_size']}"
            for name, sizes in weights.items()
            if name != "whole"
        )
        + ".",
        "",
        f"| M | {' | '.join(f'{name}, ms' for name in weights)} | "
        + " | ".join(f"{name} of the whole" for name in weights if name != "whole")
        + " | quiet |",
        "|" + "---|" * (2 * len(weights) + 1),
    ]
    for row in result["tokens"]:
        cells = [f"{row['ms'][name]:.3f}" for name in weights]
        ratios = [f"{ratio:.3f}" for ratio in row["of_the_whole"].values()]
        lines.append(f"| {row['M']} | {' | '.join([*cells, *ratios])} | {'yes' if row['load']['quiet'] else 'no'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
