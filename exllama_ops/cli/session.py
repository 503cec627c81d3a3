"""What `run` and `chat` share: a model that is loaded and compiled step by step, and answers that stream."""

from __future__ import annotations

import argparse
import atexit
import gc
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from exllama_ops import backends
from exllama_ops.backends.native import NativeBackend
from exllama_ops.cli import interrupt
from exllama_ops.cli.clock import Clock
from exllama_ops.cli.model import add_model_arguments, add_trust_argument, open_model, quantization_config
from exllama_ops.cli.output import CliError, say
from exllama_ops.cli.text import TextStream, load_tokenizer
from exllama_ops.extras import collector_paused
from exllama_ops.progress import Screen

_BACKENDS = ("exllama", "inductor")
_DTYPES = {"auto": None, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SEEDS = 2**64


def add_arguments(parser: Any, *, max_new_tokens: int) -> None:
    """Add what a `Session` reads, with a default for the length of an answer."""
    add_model_arguments(parser, optional=True)
    add_trust_argument(parser)
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=max_new_tokens, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="above 0: draw tokens; default: the likeliest",
    )
    parser.add_argument(
        "--top-p", type=_top_p, metavar="P", help="draw from the likeliest tokens that have this probability together"
    )
    parser.add_argument("--seed", type=_seed, metavar="N", help="of what is drawn; default: another one each time")
    parser.add_argument(
        "--dtype", choices=sorted(_DTYPES), default="auto", help="of the activations; auto, the default: as config.json"
    )
    parser.add_argument(
        "--lm-head-bits", type=int, metavar="BITS", help="quantize a dense output head, 8 halves it; default: leave it"
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=_positive, metavar="N", help="of the CPU; default: PyTorch's choice")
    parser.add_argument(
        "--backend", choices=_BACKENDS, default=_BACKENDS[0], help="of torch.compile; default: %(default)s"
    )
    parser.add_argument(
        "--whole", action="store_true", help="compile the whole forward, not one layer for all: takes longer"
    )
    parser.add_argument("--no-compile", action="store_true", help="run eagerly")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be finite and at least 0; got {text}")
    return value


def _top_p(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1; got {text}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < _SEEDS:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**64); got {text}")
    return value


@dataclass
class Answer:
    """What a model has answered, and how long it took."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    interrupted: bool
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_tokens_per_s(self) -> float:
        return round(self.prompt_tokens / self.prefill_seconds, 2)

    @property
    def decode_tokens_per_s(self) -> float | None:
        steps = len(self.tokens) - 1
        return round(steps / self.decode_seconds, 2) if steps else None


class Session:
    """A model that answers. Making one opens the checkpoint and its tokenizer; `load` and `compile` do the rest.

    Args:
        args: of a parser that went through `add_arguments`.
        screen: shows the steps.

    Raises:
        CliError: whatever a user can cause; so do the methods.
    """

    def __init__(self, args: argparse.Namespace, screen: Screen) -> None:
        self.args = args
        self.clock = Clock()
        self.load_seconds = self.compile_seconds = 0.0
        self.model: Any = None
        self.generator: Any = None
        self.stops: frozenset[int] = frozenset()
        self._first_token: tuple[dict[str, float], dict[str, float]] | None = None
        self._screen = screen
        if not args.temperature and (args.top_p is not None or args.seed is not None):
            option = "--top-p" if args.top_p is not None else "--seed"
            raise CliError(f"{option}: is for tokens that are drawn, which needs a --temperature above 0")
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        self.device = _device(args.device)
        self.path = open_model(args, screen).path
        # What was downloaded is not asked for again; a path may name one file of its directory.
        self._place = args.model if args.model is not None and os.path.exists(args.model) else self.path
        self.clock.lap("checkpoint")
        screen(f"loading {self.path}")
        with collector_paused():
            self.tokenizer = load_tokenizer(self.path, trust_remote_code=args.trust_remote_code)
        self.clock.lap("load")

    def load(self) -> None:
        """Build the kernels if they are not there, load the model."""
        # They would be built by the first call, within another step.
        backend = backends.serving("gptq_gemm", self.device.type.upper())
        if isinstance(backend, NativeBackend):
            backend.build(self._screen)
        self.clock.lap("build")
        self._screen(f"loading {self.path}")
        with collector_paused():
            from exllama_ops.integrations.generation import CompiledGenerator
            from exllama_ops.integrations.stops import stop_tokens
            from exllama_ops.integrations.transformers import load_model

        start = time.perf_counter()
        self.model = load_model(
            self._place,
            _DTYPES[self.args.dtype],
            self.device,
            progress=False,
            notify=self._screen,
            lm_head_bits=self.args.lm_head_bits,
            quantization_config=quantization_config(self.args),
            trust_remote_code=self.args.trust_remote_code,
        )
        self.load_seconds = time.perf_counter() - start
        self.generator = CompiledGenerator(
            self.model,
            not self.args.no_compile,
            mode="whole" if self.args.whole else None,
            backend=self.args.backend,
            notify=self._screen,
        )
        self.stops = stop_tokens(self.model, self.tokenizer)
        self.clock.lap("load")

    def compile(self) -> None:
        """Compile the model, unless that is not wanted."""
        if not self.args.no_compile:
            start = time.perf_counter()
            self.generator.warm_up()
            self.compile_seconds = time.perf_counter() - start
        # What was imported and compiled stays until the end. Collections between two tokens need not look at it.
        gc.freeze()
        atexit.register(gc.unfreeze)  # for extensions that look at exit whether all of theirs is gone
        self.clock.lap("compile")
        self._screen.end()

    def reasons_against(self, prompt: list[int]) -> str:
        """Why a prompt cannot be answered, if it cannot."""
        longest, new = self.generator.max_length, self.args.max_new_tokens
        if longest is None or len(prompt) + new <= longest:
            return ""
        return (
            f"prompt and --max-new-tokens must fit the model's {longest} positions; got {len(prompt)} tokens and {new}"
        )

    def answer(self, prompt: list[int], write: Callable[[str], None]) -> Answer:
        """Answer a prompt. Ctrl-C ends the answer once it has begun.

        Args:
            prompt: its tokens.
            write: takes the pieces of the text as they come.

        Raises:
            KeyboardInterrupt: there is no token yet.
        """
        text = TextStream(self.tokenizer)
        tokens: list[int] = []
        interrupted = False
        self.clock.begin("prefill")
        self._screen(f"prefill of {len(prompt)} tokens")
        times = [time.perf_counter()]
        try:
            for token in self._generate(prompt):
                times.append(time.perf_counter())
                if not tokens:
                    self.clock.lap("prefill")
                    self._first_token = self._first_token or (self.clock.seconds(), self.clock.cpu_seconds())
                    self._screen.end()
                tokens.append(token)
                write(text.push(token))
        except KeyboardInterrupt:
            if not tokens:
                raise
            interrupt.handled()
            interrupted = True
        write(text.finish())
        prefill, decode = times[1] - times[0], times[-1] - times[1]
        return Answer(text.text, tokens, len(prompt), interrupted, prefill, decode)

    def _generate(self, prompt: list[int]) -> Any:
        args = self.args
        if not args.temperature:
            return self.generator.generate(prompt, args.max_new_tokens, stop=self.stops)
        from exllama_ops.integrations.sampling import Sampler

        sampler = Sampler(args.temperature, 1.0 if args.top_p is None else args.top_p, args.seed)
        return self.generator.generate(prompt, args.max_new_tokens, stop=self.stops, sampler=sampler)

    def figures(self) -> dict[str, Any]:
        """What is known of the model and its graphs, for the JSON object and the report."""
        return {
            "compiled": self.generator.mode is not None,
            "mode": self.generator.mode,
            "compile_seconds": round(self.compile_seconds, 3),
            "graphs": self.generator.graphs,
            "recompiles": self.generator.recompiles,
            "op_calls": self.generator.op_calls,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "load_seconds": round(self.load_seconds, 3),
            "weight_bytes": _weight_bytes(self.model),
            "peak_memory_bytes": _peak_memory_bytes(self.device),
            "seconds": self.clock.seconds(),
            "cpu_seconds": self.clock.cpu_seconds(),
        }

    def first_token(self) -> str:
        """Where the time until the first token of the first answer went."""
        if self._first_token is None:
            return "none"
        seconds, cpu_seconds = self._first_token
        phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items() if phase != "first_token")
        return f"{seconds['first_token']:.1f} s ({phases}); {cpu_seconds['first_token']:.1f} CPU s"


def report_answer(answer: Answer) -> None:
    """Say how fast an answer came."""
    _say_all(
        {
            "prefill": f"{answer.prefill_tokens_per_s:.1f} tokens/s ({answer.prompt_tokens} tokens)",
            "decode": f"{answer.decode_tokens_per_s or 0:.1f} tokens/s ({len(answer.tokens)} tokens"
            f"{', interrupted' if answer.interrupted else ''})",
        }
    )


def report_session(session: Session) -> None:
    """Say where the time until the first token went, and what the model takes."""
    figures = session.figures()
    calls = ", ".join(f"{name}: {count} exllama ops" for name, count in figures["op_calls"].items())
    peak = figures["peak_memory_bytes"]
    _say_all(
        {
            "first token": session.first_token(),
            "graphs": f"{figures['graphs']} ({figures['mode']}; {calls})" if calls else str(figures["graphs"]),
            "recompiles": str(figures["recompiles"]),
            "compile time": f"{figures['compile_seconds']:.1f} s",
            "weights": f"{figures['weight_bytes'] / 1e6:.1f} MB ({figures['weight_bytes']} bytes)",
            "peak memory": "unknown" if peak is None else f"{peak / 1e6:.1f} MB",
        }
    )


def _say_all(lines: dict[str, str]) -> None:
    for name, value in lines.items():
        say(f"{name + ':':17}{value}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, dtype=torch.float32, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise CliError(f"--device {name}: must be a device that this PyTorch can use: {reason}") from error
    if device.type.upper() not in backends.PRIORITY:
        known = ", ".join(key.lower() for key in backends.PRIORITY)
        raise CliError(f"--device {name}: must be one of the devices that the ops have kernels for: {known}")
    return device


def _weight_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _peak_memory_bytes(device: torch.device) -> int | None:
    """The most the device's allocator held; on the CPU the largest resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
