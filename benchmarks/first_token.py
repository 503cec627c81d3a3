"""What the first token of a process costs: ``python -m benchmarks.first_token``; README.md has the commands.

Whole processes of `exllama-ops run` answer with one token: at first with empty caches, then with those that the first
process left. Compilation layer by layer and of the whole forward take turns, for the demo model and for its first
layers. The checkpoint and the native kernels are there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import isa
from benchmarks.files import OUT_HELP, write_result

LAYERS = (8, 30)
MODES: dict[str, tuple[str, ...]] = {"layers": (), "whole": ("--whole",)}
# The row of another checkout, which chooses its mode itself.
OTHER = "other checkout"
COLD, WARM = "cold", "warm"
# The phases of ``exllama-ops run --json``.
PHASES = ("start", "checkpoint", "build", "load", "compile", "prefill")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_token",
        description="Measure whole processes up to their first token, with empty caches and with full ones.",
    )
    add = parser.add_argument
    add("--threads", type=int, default=2, help="threads, and cores of the process (default: %(default)s)")
    add("--rounds", type=int, default=1, help="of all processes, in turns (default: %(default)s)")
    add("--layers", type=int, nargs="+", default=list(LAYERS), help="of the model (default: %(default)s)")
    add("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="default: %(default)s")
    add("--warm-rounds", type=int, default=3, help="warm processes for each cold one (default: %(default)s)")
    add("--other", type=Path, metavar="DIR", help="a checkout whose `exllama-ops run` is measured too")
    add("--out", type=Path, metavar="DIR", help=OUT_HELP)
    args = parser.parse_args(arguments)
    try:
        isa.hold_to_cores(args.threads)
    except isa.HoldError as error:
        parser.error(str(error))

    from benchmarks.machine import commit, description
    from exllama_ops.backends.cpu import BACKEND
    from exllama_ops.cli.output import emit, say
    from exllama_ops.integrations.demo import demo_checkpoint
    from exllama_ops.progress import Screen

    with Screen() as screen:
        path = demo_checkpoint(screen)
        BACKEND.build(screen)
    if BACKEND.library is None:
        say(f"error: the native CPU kernels are not in use: {'; '.join(BACKEND.failure)}")
        return 1
    given = sys.argv[1:] if arguments is None else arguments
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.first_token", *given]),
        "machine": description(
            args.threads, BACKEND.library.isa_in_use() or "", "native", ["exllama-ops", "torch", "transformers"]
        ),
    }
    kinds = [*args.modes, *([OTHER] if args.other else [])]
    runs: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {count: first_layers(path, count, Path(folder) / f"{count}-layers") for count in args.layers}
        for number in range(args.rounds):
            for count, checkpoint in checkpoints.items():
                # Another one is first each time.
                for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
                    checkout = args.other if kind == OTHER else Path(__file__).parents[1]
                    measured = processes(checkpoint, checkout, MODES.get(kind, ()), args.threads, args.warm_rounds)
                    for state, one in measured:
                        say(f"{count} layers, {kind}, {state}: {one['seconds']:.1f} s, {one['cpu_seconds']:.1f} CPU s")
                        runs.setdefault((count, kind, state), []).append(one)
    result["processes"] = [
        {"layers": count, "mode": kind, "caches": state, "runs": found} for (count, kind, state), found in runs.items()
    ]
    if args.other:
        result["other_commit"] = commit(args.other)
    emit(_table(result))
    variant = f"{'-'.join(map(str, args.layers))}layers{'-other' if args.other else ''}"
    name = f"first-token-{variant}-{args.threads}thread{'' if args.threads == 1 else 's'}"
    write_result(args.out, name, result, _table(result))
    return 0


def first_layers(checkpoint: Path, count: int, target: Path) -> Path:
    """A checkpoint of the first decoder layers of a model; the model itself if it has no more.

    Args:
        checkpoint: with config.json and model.safetensors.
        count: of layers.
        target: a folder to make.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads((checkpoint / "config.json").read_text())
    if count >= config["num_hidden_layers"]:
        return checkpoint
    target.mkdir()
    for file in checkpoint.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (target / file.name).symlink_to(file.resolve())
    config["num_hidden_layers"] = count
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:count]
    (target / "config.json").write_text(json.dumps(config))
    left_out = tuple(f"model.layers.{number}." for number in range(count, 10_000))
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(left_out)}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def processes(
    checkpoint: Path, checkout: Path, options: Sequence[str], threads: int, warm: int
) -> list[tuple[str, dict[str, Any]]]:
    """Run a process with empty caches, and others with what it left there.

    Args:
        checkpoint: of the model.
        checkout: the folder of the package that is run.
        options: of `exllama-ops run`.
        threads: of PyTorch and of our kernels.
        warm: how many others.
    """
    from exllama_ops.backends.native import cache

    python = [sys.executable, "-c", "import exllama_ops.cli as c; raise SystemExit(c.main())"]
    run_once([*python, "build", "--json"], checkout, {**os.environ, "PYTHONPATH": str(checkout.resolve())})
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "cache"
        kept.mkdir()
        if cache.root().is_dir():
            (kept / "native").symlink_to(cache.root().resolve())
        environment = {
            **os.environ,
            "PYTHONPATH": str(checkout.resolve()),
            "EXLLAMA_OPS_CACHE": str(kept),
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "OMP_NUM_THREADS": str(threads),
        }
        arguments = ["run", str(checkpoint), "--max-new-tokens", "1", "--json", *options]
        return [(state, run_once([*python, *arguments], checkout, environment)) for state in (COLD, *[WARM] * warm)]


def run_once(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a process that writes a JSON object.

    Args:
        command: program and arguments.
        folder: where it runs.
        environment: of the process.

    Returns:
        Its "seconds" and "cpu_seconds", those of what it started included; and what it says of its own "phases", with
        their "cpu_phases".

    Raises:
        RuntimeError: it fails.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        actions = [(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, err.fileno(), 2)]
        shell = ("/bin/sh", "-c", 'cd "$0" && exec "$@"', str(folder), *command)
        start = time.perf_counter()
        pid = os.posix_spawn(shell[0], shell, environment, file_actions=actions)
        # The usage of a child has that of the children it waited for.
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        if status:
            raise RuntimeError(f"{' '.join(command)}: status {status}: {err.read().decode(errors='replace')}")
        said = json.loads(out.read())
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "phases": said.get("seconds", {}),
        "cpu_phases": said.get("cpu_seconds", {}),
    }


def _median(runs: Sequence[Mapping[str, Any]], *keys: str) -> float | None:
    values = []
    for run in runs:
        value: Any = run
        for key in keys:
            value = value.get(key, None) if isinstance(value, dict) else None
        if value is not None:
            values.append(value)
    return statistics.median(values) if values else None


def _table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        "# The first token of a process",
        "",
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {machine['isa']}, commit "
        f"{machine['commit']}, torch {machine['packages']['torch']}; medians over the processes. The process is all of "
        "`exllama-ops run --max-new-tokens 1` with its children. The other columns are what it says of itself.",
        "",
        f"```\n{result['command']}\n```",
        "",
        *([f"The other checkout is commit {result['other_commit']}.", ""] if "other_commit" in result else []),
        f"| layers | mode | caches | processes | process, s | CPU s | first token, s | CPU s | {' | '.join(PHASES)} |",
        f"| ---: | --- | --- |{' ---: |' * (5 + len(PHASES))}",
    ]
    for row in result["processes"]:
        runs = row["runs"]
        columns = [("seconds",), ("cpu_seconds",), ("phases", "first_token"), ("cpu_phases", "first_token")]
        columns += [("cpu_phases", phase) for phase in PHASES]
        values = (_median(runs, *keys) for keys in columns)
        cells = ["" if value is None else f"{value:.1f}" for value in values]
        lines.append(f"| {row['layers']} | {row['mode']} | {row['caches']} | {len(runs)} | {' | '.join(cells)} |")
    lines += ["", "The phases are in CPU seconds.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
