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
# Copies of the stacks take turns, so many bytes of them. A call with few tokens also takes other experts than the last.
COPIES_BYTES = 256 << 20
CHOICES, FEW_TOKENS = 4, 16
OURS = "ours"
# What the op takes after its tensors.
OPTIONS = (True, BITS, True, GROUP_SIZE)


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

    from benchmarks.limits import Limits, LimitsError
    from benchmarks.machine import description
    from benchmarks.peers import openvino_experts
    from exllama_ops.backends.cpu import BACKEND
    from exllama_ops.cli.output import emit, say

    torch.set_num_threads(args.threads)
    if BACKEND.library is None:
        say("error: no native CPU kernels were found at import; run `exllama-ops build` first")
        return 1
    try:
        limits = Limits(BACKEND.library.isa_in_use() or "", args.threads)
    except LimitsError as error:
        say(f"error: {error}")
        return 1
    rows = []
    for projection in PROJECTIONS:
        ways = _ways(projection, args.act_order, args.threads, say)
        for routing in ROUTINGS:
            for tokens in TOKENS:
                say(f"{projection.model} {projection.name}, {routing}, {tokens} tokens")
                # With 64 tokens OpenVINO takes ten times as long, and would take most of the time.
                left_out = openvino_experts.WAYS if tokens > FEW_TOKENS else {}
                some = {name: way for name, way in ways.items() if name not in left_out}
                rows.append(_times(projection, some, tokens, routing, args.seconds, limits.measure))
        del ways
    given = sys.argv[1:] if arguments is None else arguments
    packages = ["exllama-ops", "torch", "openvino"]
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.experts", *given]),
        "machine": description(args.threads, BACKEND.library.isa_in_use() or "", "native", packages),
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


def copies(weights: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """As many copies of stacks as make `COPIES_BYTES` together, in huge pages, as layers have theirs."""
    count = -(-COPIES_BYTES // sum(tensor.nbytes for tensor in weights))
    return [tuple(_in_huge_pages(tensor) for tensor in weights) for _ in range(count)]


def _in_huge_pages(tensor: Any) -> Any:
    from exllama_ops.huge_pages import empty_in_huge_pages

    return empty_in_huge_pages(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def dense_stack(projection: Projection) -> Any:
    """Weights of the same sizes as torch._grouped_mm takes them: (E, K, N) bfloat16."""
    import torch

    return _in_huge_pages((torch.randn(projection.E, projection.N, projection.K) * 0.01).bfloat16()).mT


def offsets_of(projection: Projection, tokens: int, routing: str, seed: int = 0) -> Any:
    """The rows of each expert: choices without favourites, or by a Zipf distribution over the experts."""
    import torch

    random = torch.Generator().manual_seed(1000 * seed + tokens)
    ranks = torch.arange(1, projection.E + 1, dtype=torch.float32)
    odds = torch.ones(projection.E) if routing == "uniform" else 1 / ranks
    chosen = torch.multinomial(odds.expand(tokens, -1), projection.top_k, generator=random)
    counts = torch.bincount(chosen.flatten(), minlength=projection.E)
    return torch.cat([torch.zeros(1), counts.cumsum(0)]).to(torch.int32)


# Takes x and the offsets of the experts, and returns what is timed.
Bind = Callable[[Any, Any], Callable[[], object]]


def _ways(
    projection: Projection, act_order: bool, threads: int, say: Callable[[str], None]
) -> dict[str, Sequence[Bind]]:
    """Ours, the loop and the peers, each with its copies of the weights. A peer that is not here is missing."""
    from benchmarks.peers import openvino_experts

    weights, dense = copies(stacks(projection, act_order)), dense_stack(projection)
    ways: dict[str, Sequence[Bind]] = {
        OURS: [partial(_grouped, copy) for copy in weights],
        "loop": [partial(_bound_loop, copy) for copy in weights],
        "dense": [partial(_dense, dense)],
    }
    for name, prepare in openvino_experts.WAYS.items() if not act_order else ():
        try:
            ways[name] = [prepare(copy[:3], projection.K, projection.N, threads) for copy in weights]
        except Exception as error:
            say(f"missing: {name}: {error!r}")
    return ways


def _grouped(weights: Sequence[Any], x: Any, offsets: Any) -> Callable[[], object]:
    import torch

    return partial(torch.ops.exllama.gptq_moe_gemm, x, *weights, offsets, *OPTIONS)


def _bound_loop(weights: Sequence[Any], x: Any, offsets: Any) -> Callable[[], object]:
    return partial(_loop, x, weights, offsets.tolist(), OPTIONS)


def _dense(weight: Any, x: Any, offsets: Any) -> Callable[[], object]:
    import torch

    return partial(torch._grouped_mm, x, weight, offs=offsets[1:])


def _times(
    projection: Projection,
    ways: Mapping[str, Sequence[Bind]],
    tokens: int,
    routing: str,
    seconds: float,
    measure_limits: Callable[[], Mapping[str, float]],
) -> dict[str, Any]:
    """Milliseconds of each way: medians of rounds, in each of which every way is timed once; and of their ratios."""
    import statistics

    import torch

    from benchmarks.quiet import Watch
    from benchmarks.timing import HostTimer, Runner, interleave

    choices = [offsets_of(projection, tokens, routing, seed) for seed in range(CHOICES if tokens <= FEW_TOKENS else 1)]
    x = torch.randn(tokens * projection.top_k, projection.K).bfloat16()
    runners = [
        Runner(name, [bind(x, offsets) for offsets in choices for bind in copies_of_it])
        for name, copies_of_it in ways.items()
    ]
    timer = HostTimer()
    for runner in runners:
        timer.warm_up(runner, tokens)
    watch = Watch()
    samples = interleave(runners, measure_limits, tokens=tokens, seconds=seconds, rounds=5, timer=timer)
    ours = samples[OURS]
    with_rows = statistics.mean(int((offsets.diff() > 0).sum()) for offsets in choices)
    floors = [_floor(projection, tokens, with_rows, sample.limits) for sample in ours]
    return {
        **projection._asdict(),
        "tokens": tokens,
        "routing": routing,
        "experts_with_rows": with_rows,
        "rounds": len(ours),
        "ms": {name: 1000 * statistics.median(sample.seconds for sample in found) for name, found in samples.items()},
        "of_ours": {
            name: statistics.median(a.seconds / b.seconds for a, b in zip(found, ours, strict=True))
            for name, found in samples.items()
            if name != OURS
        },
        "floor_ms": 1000 * statistics.median(floors),
        "of_floor": statistics.median(floor / sample.seconds for floor, sample in zip(floors, ours, strict=True)),
        "load": watch.look(ours).record(),
    }


def _floor(projection: Projection, tokens: int, experts: float, limits: Mapping[str, float]) -> float:
    """Seconds that no kernel of our class is below: reading the weights of experts with rows, or multiplying."""
    entries = projection.K * projection.N
    nbytes = experts * entries * (BITS + (16 + BITS) / GROUP_SIZE) / 8
    return max(nbytes / limits["dram"], 2 * tokens * projection.top_k * entries / limits["int16"])


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
    others = list(result["rows"][0]["of_ours"])
    lines = [
        f"`{result['command']}`",
        "",
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}. "
        f"{BITS} bits, groups of {GROUP_SIZE}{order}; x in bfloat16.",
        "`loop` calls `gptq_gemm` for each expert that has rows. `dense` is `torch._grouped_mm` of bfloat16 weights.",
        "The floor is reading weights from DRAM, or multiplying at the int16 peak of vector units, which AMX exceeds.",
        "",
        "| Model | Projection | Routing | Tokens | Experts with rows | floor, ms | ours, ms | of the floor | "
        + "".join(f"{name} / ours | " for name in others)
        + "quiet |",
        "|" + "---|" * (9 + len(others)),
    ]
    for row in result["rows"]:
        ratios = " | ".join(f"{row['of_ours'][name]:.3f}" if name in row["of_ours"] else "" for name in others)
        quiet = "yes" if row["load"]["quiet"] else "no"
        lines.append(
            f"| {row['model']} | {row['name']} {row['K']} x {row['N']} | {row['routing']} | {row['tokens']} "
            f"| {row['experts_with_rows']:.3g} of {row['E']} | {row['floor_ms']:.3f} | {row['ms'][OURS]:.3f} "
            f"| {row['of_floor']:.0%} | {ratios} | {quiet} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
