"""Decode speed of the demo model, on our kernels and dense: ``python -m benchmarks.demo``; README.md has the commands.

All are the model of `exllama-ops run` with the same weights: on our kernels compiled by the backend "exllama" and by
plain Inductor, and dequantized into nn.Linear and compiled by Inductor. With --freeze, it has an activation order and
is compiled by the backend "exllama", frozen and as it is. They decode in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import isa
from benchmarks.run import RESULTS

# Tokens of a turn: so few that both models see the same state of the machine.
TURN_TOKENS = 8
PROMPT_TOKENS = 16
DTYPES = ("float16", "bfloat16", "float32")
OURS, INDUCTOR, DENSE = "exllama_ops", "exllama_ops under Inductor", "dense"
FROZEN, UNFROZEN = "frozen", "unfrozen"


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

    from benchmarks.machine import description
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
    result: dict[str, Any] = {"command": " ".join(["python -m benchmarks.demo", *given]), "machine": machine}
    result["models"] = [_measure(dtype, args.seconds, args.freeze) for dtype in args.dtype or ["checkpoint"]]
    emit(_table(result))
    args.out.mkdir(parents=True, exist_ok=True)
    kind = "demo-freeze" if args.freeze else "demo"
    stem = args.out / f"{kind}-{args.threads}thread{'' if args.threads == 1 else 's'}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(_table(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Decode with the demo model on our kernels, by two backends, and dense, all compiled, in turns.",
    )
    add = parser.add_argument
    add("--threads", type=int, default=1, help="threads, and cores of the process (default: %(default)s)")
    add("--dtype", nargs="+", choices=DTYPES, help="of the activations (default: that of the checkpoint)")
    add("--freeze", action="store_true", help="compare the model with an activation order, frozen and as it is")
    add("--isa", default="native", choices=sorted(isa.VARIABLES), help="hold all to it (default: %(default)s)")
    add("--seconds", type=float, default=30, help="of decoding for each dtype (default: %(default)s)")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="for table and JSON (default: benchmarks/results)")
    return parser


def _measure(dtype: str, seconds: float, frozen: bool) -> dict[str, Any]:
    """Decode for some seconds in one dtype; "checkpoint" for that of the checkpoint."""
    import torch

    from exllama_ops.cli.output import say
    from exllama_ops.integrations.demo import demo_checkpoint

    path = demo_checkpoint(say)
    chosen = None if dtype == "checkpoint" else getattr(torch, dtype)
    generators = _frozen_and_not(path, chosen) if frozen else _ours_and_dense(path, chosen)
    ours, *others = generators
    name = str(generators[ours].model.dtype).removeprefix("torch.")
    for kind, generator in generators.items():
        say(f"{name}, {kind}: compiling (minutes, the first time)")
        generator.warm_up()
    turns: dict[str, list[float]] = {kind: [] for kind in generators}
    start = time.perf_counter()
    while not turns[ours] or time.perf_counter() - start < seconds:
        for kind, generator in generators.items():
            turns[kind].append(decode_ms(generator))
    return {
        "dtype": name,
        "turns": len(turns[ours]),
        "ms_per_token": {kind: _spread(times) for kind, times in turns.items()},
        "times_faster_than": {kind: _spread(_ratios(turns[ours], turns[kind])) for kind in others},
    }


def _ours_and_dense(path: Path, dtype: Any) -> dict[str, Any]:
    from exllama_ops import load_model
    from exllama_ops.integrations.generation import CompiledGenerator

    quantized = load_model(path, dtype)
    return {
        OURS: CompiledGenerator(quantized, backend="exllama"),
        INDUCTOR: CompiledGenerator(quantized),
        DENSE: CompiledGenerator(dense(load_model(path, dtype))),
    }


def _frozen_and_not(path: Path, dtype: Any) -> dict[str, Any]:
    import torch

    from exllama_ops import freeze, load_model
    from exllama_ops.integrations.generation import CompiledGenerator

    models = {kind: with_order(load_model(path, dtype)) for kind in (FROZEN, UNFROZEN)}
    ids = torch.arange(1, PROMPT_TOKENS + 1).unsqueeze(0)
    freeze(models[FROZEN], {"input_ids": ids, "use_cache": False})
    return {kind: CompiledGenerator(model, backend="exllama") for kind, model in models.items()}


def _ratios(ours: Sequence[float], other: Sequence[float]) -> list[float]:
    return [b / a for a, b in zip(ours, other, strict=True)]


def _spread(values: Sequence[float]) -> dict[str, float]:
    from benchmarks.timing import Spread

    spread = Spread.of(values)
    return {"median": spread.median, "iqr": spread.iqr}


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


def with_order(model: Any) -> Any:
    """The same model quantized anew with a random activation order, in place; layers beside each other share theirs."""
    import torch

    from exllama_ops import ExllamaLinear, quantize

    orders: dict[tuple[str, int], Any] = {}
    for name, layer in [item for item in model.named_modules() if isinstance(item[1], ExllamaLinear)]:
        K = layer.in_features
        generator = torch.Generator().manual_seed(len(orders))
        shared = (name.rpartition(".")[0], K)
        order = orders.setdefault(shared, (torch.arange(K) // layer.group_size)[torch.randperm(K, generator=generator)])
        weight = quantize(layer.dequantize().float(), layer.bits, layer.group_size, g_idx=order, bias=layer.bias)
        model.set_submodule(name, ExllamaLinear.from_weight(weight).eval())
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
    machine, first = result["machine"], result["models"][0]
    kinds, others = first["ms_per_token"], first["times_faster_than"]
    lines = [
        "# Decoding with the demo model",
        "",
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {machine['isa']}, commit "
        f"{machine['commit']}, torch {machine['packages']['torch']}; all models compiled, {TURN_TOKENS} tokens a "
        "turn; median ms of a token ± interquartile range.",
        "",
        f"```\n{result['command']}\n```",
        "",
        f"| dtype | {' | '.join(kinds)} | times faster than {' | than '.join(others)} |",
        f"| --- |{' ---: |' * (len(kinds) + len(others))}",
    ]
    for row in result["models"]:
        values = [*row["ms_per_token"].values(), *row["times_faster_than"].values()]
        cells = (f"{value['median']:.3g} ±{value['iqr']:.1g}" for value in values)
        lines.append(f"| {row['dtype']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
