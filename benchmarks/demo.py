"""Decode speed of the demo model, on our kernels, dense and elsewhere: ``python -m benchmarks.demo``; see README.md.

All are the model of `exllama-ops run` with the same weights. On our kernels it is compiled layer by layer and whole, by
the backend "exllama" and by plain Inductor, and once with an output head of 8 bits. The dense one has nn.Linear layers.
OpenVINO GenAI decodes the file that the weights come from. All decode in turns, in another order each round. With
``--act-order`` the weights have an activation order, and the model that `freeze` rewrote decodes too.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import isa
from benchmarks.files import OUT_HELP, write_result

# Tokens of a turn: so few that both models see the same state of the machine.
TURN_TOKENS = 8
PROMPT_TOKENS = 16
DTYPES = ("float16", "bfloat16", "float32")
FROZEN, OURS, INDUCTOR, WHOLE = "exllama_ops frozen", "exllama_ops", "exllama_ops under Inductor", "exllama_ops whole"
HEAD, DENSE, GENAI, OTHER = "exllama_ops, 8-bit head", "dense", "OpenVINO GenAI", "other checkout"
# What is compared: each of the first with all that come after it.
COMPARED = (FROZEN, OURS, HEAD)
KINDS = (FROZEN, OURS, INDUCTOR, WHOLE, HEAD, DENSE, GENAI, OTHER)
HEAD_BITS = 8
# Projections of one input, which share an activation order in what GPTQ writes.
SHARED_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        isa.hold_to(args.isa)
        isa.hold_to_cores(args.threads)
    except isa.HoldError as error:
        parser.error(str(error))
    import torch

    from benchmarks.machine import commit, description
    from exllama_ops.backends.cpu import BACKEND
    from exllama_ops.cli.output import emit, say

    torch.set_num_threads(args.threads)
    BACKEND.build()
    library = BACKEND.library
    if library is None:
        say(f"error: the native CPU kernels are not in use: {'; '.join(BACKEND.failure)}")
        return 1
    machine = description(args.threads, library.isa_in_use() or "", args.isa, ["exllama-ops", "torch", "transformers"])
    given = sys.argv[1:] if arguments is None else arguments
    result: dict[str, Any] = {"command": f"python -m benchmarks.demo {shlex.join(given)}", "machine": machine}
    result["models"] = [
        _measure(dtype, args.seconds, args.act_order, args.kinds, args.other) for dtype in args.dtype or ["checkpoint"]
    ]
    if args.other:
        result["other_commit"] = commit(args.other)
    emit(_table(result))
    variant = ("-act-order" if args.act_order else "") + ("-other" if args.other else "")
    name = f"demo{variant}-{args.threads}thread{'' if args.threads == 1 else 's'}"
    write_result(args.out, name, result, _table(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Decode with the demo model on our kernels, in several ways, and dense, all compiled, in turns.",
    )
    add = parser.add_argument
    add("--threads", type=int, default=1, help="threads, and cores of the process (default: %(default)s)")
    add("--dtype", nargs="+", choices=DTYPES, help="of the activations (default: that of the checkpoint)")
    add("--isa", default="native", choices=sorted(isa.VARIABLES), help="hold all to it (default: %(default)s)")
    add("--seconds", type=float, default=30, help="of decoding for each dtype (default: %(default)s)")
    add("--act-order", action="store_true", help="weights with an activation order; the frozen model too")
    add(
        "--kinds", nargs="+", choices=KINDS, metavar="KIND", help=f"some of {', '.join(map(repr, KINDS))}; default: all"
    )
    add("--other", type=Path, metavar="DIR", help="a checkout that decodes too, in turns, in a process of its own")
    add("--out", type=Path, metavar="DIR", help=OUT_HELP)
    return parser


def _measure(
    dtype: str,
    seconds: float,
    act_order: bool,
    wanted: Sequence[str] | None = None,
    other: Path | None = None,
) -> dict[str, Any]:
    """Decode for some seconds in one dtype; "checkpoint" for that of the checkpoint."""
    import torch

    from benchmarks import genai, other_checkout
    from exllama_ops import freeze, load_model
    from exllama_ops.cli.output import say
    from exllama_ops.integrations.demo import demo_checkpoint
    from exllama_ops.integrations.generation import CompiledGenerator
    from exllama_ops.progress import Screen

    with Screen() as screen:
        path = demo_checkpoint(screen)
    chosen = None if dtype == "checkpoint" else getattr(torch, dtype)
    quantized = load_model(path, chosen)
    name = str(quantized.dtype).removeprefix("torch.")

    def model() -> Any:
        return with_act_order(load_model(path, chosen)) if act_order else load_model(path, chosen)

    def frozen() -> Any:
        found = model()
        report = freeze(found, {"input_ids": torch.ones(1, 8, dtype=torch.int64), "use_cache": False})
        say(f"freeze: {len(report.fused)} products of several layers, {len(report.folded)} activation orders folded")
        return found

    def head() -> Any:
        return load_model(path, chosen, lm_head_bits=HEAD_BITS)

    def compiled(make: Callable[[], Any], **options: Any) -> Callable[[], float]:
        generator = CompiledGenerator(make(), **options)
        generator.warm_up()
        return lambda: decode_ms(generator)

    makers: dict[str, Callable[[], Callable[[], float]]] = {
        FROZEN: lambda: compiled(frozen, backend="exllama"),
        OURS: lambda: compiled(model, backend="exllama"),
        INDUCTOR: lambda: compiled(model),
        WHOLE: lambda: compiled(model, backend="exllama", mode="whole"),
        HEAD: lambda: compiled(head, backend="exllama"),
        DENSE: lambda: compiled(lambda: dense(model())),
    }
    if not act_order:
        del makers[FROZEN]
    else:
        del makers[HEAD]  # whose activations have the order of the others
    with ExitStack() as stack:
        makers[GENAI] = lambda: genai.turns(stack, PROMPT_TOKENS, TURN_TOKENS, torch.get_num_threads())
        if other is not None:
            makers[OTHER] = lambda: other_checkout.turns(
                stack, other, path, name, PROMPT_TOKENS, TURN_TOKENS, torch.get_num_threads()
            )
        turn: dict[str, Callable[[], float]] = {}
        for kind, make in makers.items():
            if wanted is None or kind in wanted:
                say(f"{name}, {kind}: compiling or loading (minutes, the first time)")
                try:
                    turn[kind] = make()
                except genai.MissingError as error:
                    say(f"{name}, {kind}: left out: {error}")
        times: dict[str, list[float]] = {kind: [] for kind in turn}
        shuffle = random.Random(0)
        start = time.perf_counter()
        rounds = 0
        while not rounds or time.perf_counter() - start < seconds:
            # What the machine does at a fixed interval, or the last model leaves in the caches, must not meet the same
            # one.
            for kind in shuffle.sample(list(turn), len(turn)):
                times[kind].append(turn[kind]())
            rounds += 1
    kinds = list(times)
    return {
        "dtype": name,
        "turns": rounds,
        "ms_per_token": {kind: _spread(values) for kind, values in times.items()},
        "times_faster": {
            kind: {other: _spread(_ratios(times[kind], times[other])) for other in kinds[kinds.index(kind) + 1 :]}
            for kind in kinds
            if kind in COMPARED
        },
    }


def _ratios(ours: Sequence[float], other: Sequence[float]) -> list[float]:
    return [b / a for a, b in zip(ours, other, strict=True)]


def _spread(values: list[float]) -> dict[str, float]:
    from benchmarks.timing import Spread

    spread = Spread.of(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return {"median": spread.median, "iqr": spread.iqr, "low_quartile": low, "high_quartile": high}


def dense(model: Any) -> Any:
    """The same model with its weights dequantized into nn.Linear, in place."""
    from torch import nn

    from exllama_ops import ExllamaLinear

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, ExllamaLinear)]
    for name, layer in layers:
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.dequantize().to(model.dtype).contiguous(), requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.to(model.dtype), requires_grad=False)
        model.set_submodule(name, linear.eval())
    return model


def with_act_order(model: Any) -> Any:
    """The model with its weights quantized again, in place, in activation orders that layers of one input share."""
    import torch

    from exllama_ops import ExllamaLinear, convert, quantize

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, ExllamaLinear)]
    dense(model)
    orders: dict[str, Any] = {}
    weights = {}
    for name, layer in layers:
        block, _, projection = name.rpartition(".")
        g_idx = torch.arange(layer.in_features, dtype=torch.int32) // layer.group_size
        order = orders.setdefault(
            f"{block}.{SHARED_INPUT.get(projection, projection)}",
            torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(len(orders))),
        )
        linear = model.get_submodule(name)
        weights[name] = quantize(linear.weight, layer.bits, layer.group_size, g_idx=g_idx[order], bias=linear.bias)
    convert(model, weights)
    return model


def decode_ms(generator: Any) -> float:
    """Milliseconds of a token in a turn; the prompt and the first token are not timed."""
    generator.prefill(list(range(1, PROMPT_TOKENS + 1)), TURN_TOKENS + 2)
    token = generator.decode(1).argmax()
    start = time.perf_counter()
    for _ in range(TURN_TOKENS):
        token = generator.decode(token).argmax()
    return 1e3 * (time.perf_counter() - start) / TURN_TOKENS


def _table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        "# Decoding with the demo model",
        "",
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {machine['isa']}, commit "
        f"{machine['commit']}, torch {machine['packages']['torch']}; all models compiled, {TURN_TOKENS} tokens a "
        "turn; median ms of a token ± interquartile range. Ratios have their quartiles.",
        "",
        f"```\n{result['command']}\n```",
        "",
        *([f"The other checkout is commit {result['other_commit']}.", ""] if "other_commit" in result else []),
    ]
    kinds = result["models"][0]["ms_per_token"]
    lines += [f"| dtype | {' | '.join(kinds)} |", f"| --- |{' ---: |' * len(kinds)}"]
    for row in result["models"]:
        cells = (f"{value['median']:.1f} ±{value['iqr']:.1f}" for value in row["ms_per_token"].values())
        lines.append(f"| {row['dtype']} | {' | '.join(cells)} |")
    lines += [
        "",
        "Times faster, of the two in a turn:",
        "",
        "| dtype | model | than | median | quartiles |",
        "| --- | --- | --- | ---: | --- |",
    ]
    for row in result["models"]:
        for kind, others in row["times_faster"].items():
            for other, value in others.items():
                quartiles = f"{value['low_quartile']:.2f} to {value['high_quartile']:.2f}"
                lines.append(f"| {row['dtype']} | {kind} | {other} | {value['median']:.2f} | {quartiles} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
