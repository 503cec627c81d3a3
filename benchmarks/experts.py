"""Products of all experts of a mixture beside a loop and a dense product: ``python -m benchmarks.experts``."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import isa
from benchmarks.files import OUT_HELP, write_result

BITS, GROUP_SIZE = 4, 128
TOKENS = (1, 8, 64, 512)
ROUTINGS = ("uniform", "skewed")


class Projection(NamedTuple):
    """One projection of the experts of a model."""

    model: str
    name: str
    E: int
    top_k: int
    K: int
    N: int


PROJECTIONS = (
    Projection("Mixtral 8x7B", "up", 8, 2, 4096, 14336),
    Projection("Mixtral 8x7B", "down", 8, 2, 14336, 4096),
    Projection("Qwen3-30B-A3B", "up", 128, 8, 2048, 768),
    Projection("Qwen3-30B-A3B", "down", 128, 8, 768, 2048),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experts",
        description="Time gptq_moe_gemm beside a loop over gptq_gemm and torch._grouped_mm of dense weights.",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads, and cores (default: %(default)s)")
    parser.add_argument("--act-order", action="store_true", help="each expert has an order of rows of its own")
    parser.add_argument("--seconds", type=float, default=3, help="for each row of the table (default: %(default)s)")
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
    rows = []
    for projection in PROJECTIONS:
        weights, dense = stacks(projection, args.act_order), dense_stack(projection)
        for routing in ROUTINGS:
            for tokens in TOKENS:
                say(f"{projection.model} {projection.name}, {routing}, {tokens} tokens")
                rows.append(_times(projection, weights, dense, tokens, routing, args.seconds))
    given = sys.argv[1:] if arguments is None else arguments
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.experts", *given]),
        "machine": description(args.threads, BACKEND.library.isa_in_use() or "", "native", ["exllama-ops", "torch"]),
        "act_order": args.act_order,
        "rows": rows,
    }
    emit(_table(result))
    name = f"experts{'-act-order' * args.act_order}-{args.threads}thread{'s' * (args.threads > 1)}"
    say(f"written to {write_result(args.out, name, result, _table(result))}")
    return 0


def stacks(projection: Projection, act_order: bool) -> tuple[Any, ...]:
    """What gptq_moe_gemm takes before the offsets: random words, whose values cost what any do."""
    import torch

    E, K, N = projection.E, projection.K, projection.N
    G = K // GROUP_SIZE
    low, high = -(2**31), 2**31
    orders = torch.stack([torch.randperm(K) for _ in range(E)]) if act_order else torch.empty(0)
    return (
        torch.randint(low, high, (E, K * BITS // 32, N), dtype=torch.int32),
        torch.randint(low, high, (E, G, N * BITS // 32), dtype=torch.int32),
        (torch.rand(E, G, N) * 0.01 + 0.001).bfloat16(),
        orders.to(torch.int32),
    )


def dense_stack(projection: Projection) -> Any:
    """Weights of the same sizes as torch._grouped_mm takes them: (E, K, N) bfloat16."""
    import torch

    return (torch.randn(projection.E, projection.N, projection.K) * 0.01).bfloat16().mT


def offsets_of(projection: Projection, tokens: int, routing: str) -> Any:
    """The rows of each expert: choices without favourites, or by a Zipf distribution over the experts."""
    import torch

    random = torch.Generator().manual_seed(tokens)
    ranks = torch.arange(1, projection.E + 1, dtype=torch.float32)
    odds = torch.ones(projection.E) if routing == "uniform" else 1 / ranks
    chosen = torch.multinomial(odds.expand(tokens, -1), projection.top_k, generator=random)
    counts = torch.bincount(chosen.flatten(), minlength=projection.E)
    return torch.cat([torch.zeros(1), counts.cumsum(0)]).to(torch.int32)


def _times(
    projection: Projection, weights: Sequence[Any], dense: Any, tokens: int, routing: str, seconds: float
) -> dict[str, Any]:
    """Milliseconds of each way: the median of the rounds, in each of which every way is timed once."""
    import statistics

    import torch

    from benchmarks.quiet import Watch
    from benchmarks.timing import HostTimer, Runner, interleave

    offsets = offsets_of(projection, tokens, routing)
    x = torch.randn(tokens * projection.top_k, projection.K).bfloat16()
    options = (True, BITS, True, GROUP_SIZE)
    grouped: Callable[[], object] = partial(torch.ops.exllama.gptq_moe_gemm, x, *weights, offsets, *options)
    runners = [
        Runner("ours", [grouped]),
        Runner("loop", [partial(_loop, x, weights, offsets.tolist(), options)]),
        Runner("dense", [partial(torch._grouped_mm, x, dense, offs=offsets[1:])]),
    ]
    timer = HostTimer()
    for runner in runners:
        timer.warm_up(runner, tokens)
    watch = Watch()
    samples = interleave(runners, dict, tokens=tokens, seconds=seconds, rounds=5, timer=timer)
    ms = {name: 1000 * statistics.median(sample.seconds for sample in found) for name, found in samples.items()}
    return {
        **projection._asdict(),
        "tokens": tokens,
        "routing": routing,
        "experts_with_rows": int((offsets.diff() > 0).sum()),
        "ms": ms,
        "loop_of_ours": ms["loop"] / ms["ours"],
        "dense_of_ours": ms["dense"] / ms["ours"],
        "load": watch.look().record(),
    }


def _loop(x: Any, weights: Sequence[Any], bounds: Sequence[int], options: Sequence[Any]) -> Any:
    """What an engine does without the op: a product of each expert that has rows, into its rows of the result."""
    import torch

    qweight, qzeros, scales, orders = weights
    out = x.new_empty(x.shape[0], qweight.shape[2])
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            order = orders[expert] if orders.numel() else orders
            weight = (qweight[expert], qzeros[expert], scales[expert], order)
            out[start:stop] = torch.ops.exllama.gptq_gemm(x[start:stop], *weight, *options)
    return out


def _table(result: Mapping[str, Any]) -> str:
    machine, order = result["machine"], ", an order of rows for each expert" * result["act_order"]
    lines = [
        f"`{result['command']}`",
        "",
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}. "
        f"{BITS} bits, groups of {GROUP_SIZE}{order}; x in bfloat16.",
        "`loop` calls `gptq_gemm` for each expert that has rows. `dense` is `torch._grouped_mm` of bfloat16 weights.",
        "",
        "| Model | Projection | Routing | Tokens | Experts with rows | ours, ms | loop / ours | dense / ours | quiet |",
        "|" + "---|" * 9,
    ]
    for row in result["rows"]:
        quiet = "yes" if row["load"]["quiet"] else "no"
        lines.append(
            f"| {row['model']} | {row['name']} {row['K']} x {row['N']} | {row['routing']} | {row['tokens']} "
            f"| {row['experts_with_rows']} of {row['E']} | {row['ms']['ours']:.3f} | {row['loop_of_ours']:.3f} "
            f"| {row['dense_of_ours']:.3f} | {quiet} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
