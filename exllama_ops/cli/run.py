"""`exllama-ops run`: load a GPTQ model, compile its whole forward, generate."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from exllama_ops import backends
from exllama_ops.cli.output import CliError, emit, say
from exllama_ops.progress import Screen

DEFAULT_PROMPT = "Why is the sky blue? Answer in two sentences."

_BACKENDS = ("inductor", "exllama")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "run",
        help="generate text with a GPTQ model",
        description="Load a GPTQ checkpoint, compile its whole forward with torch.compile and generate text.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a directory or hub id; default: a small demo model")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="default: %(default)r")
    parser.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), help="of the activations; default: that of the checkpoint")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--backend", choices=_BACKENDS, default=_BACKENDS[0], help="of torch.compile; default: %(default)s"
    )
    parser.add_argument("--no-compile", action="store_true", help="run eagerly")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the text")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
        CliError: whatever a user can cause.
    """
    device = _device(args.device)
    with _expected_errors():
        path = _checkpoint(args.model)
        model, load_seconds = _load(path, args.dtype, device)
        tokenizer = _tokenizer(path)
        prompt = _prompt_tokens(tokenizer, args.prompt)
        report = _generate(model, tokenizer, prompt, args)
    result = {
        "model": args.model or str(path),
        "prompt": args.prompt,
        **report,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
        "load_seconds": round(load_seconds, 3),
        "weight_bytes": _weight_bytes(model),
        "peak_memory_bytes": _peak_memory_bytes(device),
    }
    if args.json:
        emit(json.dumps(result, ensure_ascii=False) + "\n")
    _report(result)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


@contextmanager
def _expected_errors() -> Iterator[None]:
    """Errors that the library documents become one line; the rest keep their tracebacks."""
    try:
        yield
    except (CliError, ModuleNotFoundError):
        # A missing extra arrives as a plain ImportError whose text says what to install.
        raise
    except (ImportError, ValueError) as error:
        raise CliError(_one_line(error)) from error
    except RuntimeError as error:
        if type(error).__module__.partition(".")[0] != __name__.partition(".")[0]:
            raise
        raise CliError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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


def _checkpoint(model: str | None) -> Path:
    if model is not None:
        from exllama_ops.checkpoint import open_checkpoint

        return open_checkpoint(model).path
    from exllama_ops.integrations.demo import demo_checkpoint

    with Screen() as screen:
        return demo_checkpoint(screen)


def _load(path: Path, dtype: str | None, device: torch.device) -> tuple[Any, float]:
    from exllama_ops.integrations.transformers import load_model

    say(f"loading {path}")
    start = time.perf_counter()
    model = load_model(path, None if dtype is None else _DTYPES[dtype], device)
    return model, time.perf_counter() - start


def _tokenizer(path: Path) -> Any:
    from exllama_ops.checkpoint.disk import check_regular, file_type
    from exllama_ops.extras import require

    transformers = require("transformers")
    # It opens whatever is there, and waits for FIFOs.
    for file in sorted({*path.glob("*"), *path.glob("*/*")}):
        if not file.is_dir():
            check_regular(file, file_type(file))
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the tokenizers' errors share no base class
        raise CliError(f"{path}: must hold a tokenizer (tokenizer.json or its kin): {_one_line(error)}") from error


def _prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The template has written the special tokens already.
        tokens: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    else:
        tokens = tokenizer(prompt).input_ids
    if not tokens:
        raise CliError(f"--prompt: must have at least one token; {prompt!r} has none")
    return tokens


def _generate(model: Any, tokenizer: Any, prompt: list[int], args: argparse.Namespace) -> dict[str, Any]:
    from exllama_ops.integrations.generation import CompiledGenerator

    compile_seconds = 0.0
    generator = CompiledGenerator(model, compile=not args.no_compile, backend=args.backend)
    if not args.no_compile:
        say("compiling the forward: prefill and decode (the first time takes minutes, later ones use Inductor's cache)")
        start = time.perf_counter()
        generator.warm_up()
        compile_seconds = time.perf_counter() - start
    text = _TextStream(tokenizer)
    tokens: list[int] = []
    times = [time.perf_counter()]
    for token in generator.generate(prompt, args.max_new_tokens):
        times.append(time.perf_counter())
        tokens.append(token)
        piece = text.push(token)
        if not args.json:
            emit(piece)
    rest = text.finish()
    if not args.json:
        emit(rest + "\n")
    return {
        "text": text.text,
        "tokens": tokens,
        "prompt_tokens": len(prompt),
        "new_tokens": len(tokens),
        "compiled": not args.no_compile,
        "compile_seconds": round(compile_seconds, 3),
        "graphs": generator.graphs,
        "recompiles": generator.recompiles,
        "op_calls": generator.op_calls,
        "prefill_tokens_per_s": round(len(prompt) / (times[1] - times[0]), 2),
        "decode_tokens_per_s": round((len(tokens) - 1) / (times[-1] - times[1]), 2) if len(tokens) > 1 else None,
    }


class _TextStream:
    """Tokens in, text out, as soon as it cannot change: a character may take several tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        # Tokens [_start, _done) were written; they are decoded again with the next, since a space may depend on them.
        self._start = self._done = 0

    def push(self, token: int) -> str:
        self._tokens.append(token)
        return self._write(whole=False)

    def finish(self) -> str:
        return self._write(whole=True)

    def _write(self, whole: bool) -> str:
        written = self._decode(self._tokens[self._start : self._done])
        text = self._decode(self._tokens[self._start :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not whole:
            return ""
        piece = text[len(written) :]
        self._start, self._done = self._done, len(self._tokens)
        self.text += piece
        return piece

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


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


def _report(result: dict[str, Any]) -> None:
    calls = ", ".join(f"{name}: {count} exllama ops" for name, count in result["op_calls"].items())
    peak = result["peak_memory_bytes"]
    lines = {
        "graphs compiled": f"{result['graphs']} ({calls})" if calls else str(result["graphs"]),
        "recompiles": str(result["recompiles"]),
        "compile time": f"{result['compile_seconds']:.1f} s",
        "prefill": f"{result['prefill_tokens_per_s']:.1f} tokens/s ({result['prompt_tokens']} tokens)",
        "decode": f"{result['decode_tokens_per_s'] or 0:.1f} tokens/s ({result['new_tokens']} tokens)",
        "weights": f"{result['weight_bytes'] / 1e6:.1f} MB ({result['weight_bytes']} bytes)",
        "peak memory": "unknown" if peak is None else f"{peak / 1e6:.1f} MB",
    }
    for name, value in lines.items():
        say(f"{name + ':':17}{value}")
