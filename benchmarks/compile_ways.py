"""What it costs to compile a model whose layers repeat, in each way there is: ``python -m benchmarks.compile_ways``.

The model is that of `exllama-ops run`: all its layers, and its first 8. Each row has a process of its own, whose caches
are empty. The rows are measured one after the other, so only large differences mean something.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.by_layer import ByLayer
from benchmarks.demo import PROMPT_TOKENS, TURN_TOKENS, decode_ms
from benchmarks.files import OUT_HELP, folder_of, write_result
from benchmarks.machine import description
from benchmarks.timing import Spread
from exllama_ops import load_model
from exllama_ops.backends.cpu import BACKEND
from exllama_ops.cache import cache_folder
from exllama_ops.cli.output import emit, say
from exllama_ops.integrations.demo import demo_checkpoint
from exllama_ops.integrations.generation import CompiledGenerator
from exllama_ops.progress import Screen

WAYS = {
    "whole": 'the whole forward (mode "whole")',
    "nested": "the whole forward, layers marked by `nested_compile_region`",
    "regions": "accelerate's `compile_regions`",
    "no-guards": "`torch.compile` of a layer, all guards dropped",
    "aot-compile": "`aot_compile` of a layer, weights as inputs",
    "packages-plain": "AOTInductor packages, transformers' attention",
    "packages": 'AOTInductor packages (mode "layers")',
}
TURNS = 24
# The logits may differ so far from those of an eager forward in float16, by the largest. Two such forwards differ more
# after a prompt of rare tokens, so this one is spread over the vocabulary.
TOLERANCE = 0.01
PROMPT = [997 * index % 40000 + 100 for index in range(PROMPT_TOKENS)]
PREDICTION = (
    "Written before the first run: packages and layers without guards take a fifth of the CPU seconds of the whole "
    "forward at 30 layers, and the same at 8. The marked regions take half of it. Packages decode as fast as the "
    "whole forward, marked regions too. Layers that Dynamo looks up take 1.5 times as long a token with guards, and "
    "1.2 times without."
)
NAME = "compile-ways"
_CHILD = "import sys; from benchmarks.compile_ways import child; child(*sys.argv[1:])"
_LONGEST_REASON = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_ways", description="Compare ways to compile.")
    add = parser.add_argument
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what to measure (default: all)")
    add("--layers", nargs="+", type=int, default=[8, 30], help="of the model (default: 8 30)")
    add("--threads", nargs="+", type=int, default=[1, 2], help="of torch (default: 1 2)")
    add("--keep", action="store_true", help="keep the rows of the file that are not measured again")
    add("--out", type=Path, metavar="DIR", help=OUT_HELP)
    args = parser.parse_args(arguments)
    BACKEND.build()
    if BACKEND.library is None:
        say(f"error: the native CPU kernels are not in use: {'; '.join(BACKEND.failure)}")
        return 1
    with Screen() as screen:
        path = demo_checkpoint(screen)
    packages = ["accelerate", "exllama-ops", "torch", "transformers"]
    machine = description(max(args.threads), BACKEND.library.isa_in_use() or "", "native", packages)
    folder = args.out or folder_of(machine)
    file = folder / f"{NAME}.json"
    kept = json.loads(file.read_text())["rows"] if args.keep and file.exists() else []
    rows = {(row["threads"], row["layers"], list(WAYS).index(row["way"])): row for row in kept}
    for threads in args.threads:
        for layers in args.layers:
            for way in args.ways:
                say(f"{threads} threads, {layers} layers: {way}")
                rows[threads, layers, list(WAYS).index(way)] = _row(way, layers, threads, path)
                _write([rows[key] for key in sorted(rows)], machine, folder)
    emit(file.with_suffix(".md").read_text())
    return 0


def _write(rows: Sequence[dict[str, Any]], machine: dict[str, Any], folder: Path) -> None:
    result = {
        "command": "python -m benchmarks.compile_ways",
        "machine": machine,
        "prediction": PREDICTION,
        "rows": rows,
    }
    write_result(folder, NAME, result, _table(result))


def _row(way: str, layers: int, threads: int, path: Path) -> dict[str, Any]:
    """Measure one way in a process of its own, whose caches hold nothing but the kernels."""
    with tempfile.TemporaryDirectory() as caches:
        (Path(caches) / "native").symlink_to(cache_folder() / "native")
        environment = {
            **os.environ,
            "EXLLAMA_OPS_CACHE": caches,
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            # Without a pool of processes, whose seconds are counted when they end: that is too late.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        command = [sys.executable, "-c", _CHILD, way, str(layers), str(threads), str(path)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {"way": way, "layers": layers, "threads": threads, **json.loads(done.stdout.splitlines()[-1])}


def child(way: str, layers: str, threads: str, path: str) -> None:
    """Measure one way in this process, and print its row as JSON."""
    torch.set_num_threads(int(threads))
    model = load_model(path, progress=False)
    model.model.layers = model.model.layers[: int(layers)]
    model.config.num_hidden_layers = int(layers)
    expected = _second_step(CompiledGenerator(model, compile=False))
    wall, cpu = time.perf_counter(), _cpu_seconds()
    try:
        generator = _made(way, model)
        wrong = float((_second_step(generator) - expected).abs().max() / expected.abs().max())
        if not wrong < TOLERANCE:
            raise ValueError(f"its logits are wrong by {wrong:.3f} of the largest")
    except Exception as error:  # whatever torch has against this way is the result
        emit(json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:_LONGEST_REASON]}"}))
        return
    row = {"compile_cpu_s": _cpu_seconds() - cpu, "compile_s": time.perf_counter() - wall, "graphs": generator.graphs}
    spread = Spread.of([decode_ms(generator) for _ in range(TURNS)])
    emit(json.dumps({**row, "ms_per_token": {"median": spread.median, "iqr": spread.iqr}}))


def _second_step(generator: Any) -> Tensor:
    generator.prefill(PROMPT, TURN_TOKENS + 2)
    logits: Tensor = generator.decode(1).float()
    return logits


def _cpu_seconds() -> float:
    """CPU seconds that this process has used, and its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _made(way: str, model: Any) -> Any:
    """The model by one way, which its first steps compile. What is patched stays so: the process has one way."""
    if way == "nested":
        layer = type(model.model.layers[0])
        layer.forward = torch.compiler.nested_compile_region(layer.forward)
    if way == "packages-plain":
        mock.patch("exllama_ops.integrations.layered.fast_forms", return_value=nullcontext()).start()
    if way in ("whole", "nested", "packages-plain", "packages"):
        mode = "layers" if way.startswith("packages") else "whole"
        return CompiledGenerator(model, mode=mode, backend="exllama")
    return ByLayer(model, way)


def _table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        "# Ways to compile a model whose layers repeat",
        "",
        f"The demo model; {machine['cpu']}, {machine['cores']} cores, {machine['isa']}, commit {machine['commit']}, "
        f"torch {machine['packages']['torch']}; CPU seconds of compiling prefill and decode, in all processes; ms of a "
        f"token, median of {TURNS} turns of {TURN_TOKENS} ± interquartile range.",
        "",
        f"```\n{result['command']}\n```",
        "",
        result["prediction"],
        "",
        "| threads | layers | way | graphs | CPU seconds | ms of a token |",
        "| ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        cells = ["", "", row.get("error", "")]
        if "error" not in row:
            ms = row["ms_per_token"]
            cells = [f"{row['graphs']}", f"{row['compile_cpu_s']:.0f}", f"{ms['median']:.1f} ±{ms['iqr']:.1f}"]
        lines.append(f"| {' | '.join([str(row['threads']), str(row['layers']), WAYS[row['way']], *cells])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
