"""Another checkout of the package as a peer of the demo: it decodes in a process of its own, a turn when it is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

# It uses only what all versions have, and waits for its turn without a thread that spins.
_WORKER = """
import sys, time
import torch
from exllama_ops import load_model
from exllama_ops.integrations.generation import CompiledGenerator
path, dtype, prompt_tokens, tokens, threads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(threads)
generator = CompiledGenerator(load_model(path, getattr(torch, dtype), progress=False), backend="exllama")
generator.warm_up()
print("ready", flush=True)
for line in sys.stdin:
    generator.prefill(list(range(1, prompt_tokens + 1)), tokens + 2)
    token = generator.decode(1).argmax()
    start = time.perf_counter()
    for _ in range(tokens):
        token = generator.decode(token).argmax()
    print(1e3 * (time.perf_counter() - start) / tokens, flush=True)
"""


def turns(
    stack: ExitStack, checkout: Path, checkpoint: Path, dtype: str, prompt_tokens: int, tokens: int, threads: int
) -> Callable[[], float]:
    """Load the model there; the result decodes a turn and returns milliseconds per token.

    Args:
        stack: ends the process.
        checkout: the folder with the package.
        checkpoint: of the model.
        dtype: of the activations.
        prompt_tokens: of each turn.
        tokens: that are timed in a turn.
        threads: of the process.

    Raises:
        RuntimeError: the process ended.
    """
    arguments = [str(checkpoint.resolve()), dtype, *map(str, (prompt_tokens, tokens, threads))]
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, *arguments],
            cwd=checkout,  # where Python looks first
            env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, replies = process.stdin, process.stdout

    def reply() -> str:
        line = replies.readline()
        if not line:
            raise RuntimeError(f"the process of {checkout} ended with status {process.wait()}")
        return line

    def turn() -> float:
        requests.write("turn\n")
        requests.flush()
        return float(reply())

    reply()
    return turn
