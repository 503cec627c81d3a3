"""`exllama-ops run`: load a GPTQ model, compile it, answer prompts."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from exllama_ops.cli.output import CliError, emit, expected_errors, say
from exllama_ops.cli.session import Answer, Session, add_arguments, report_answer, report_session
from exllama_ops.cli.text import prompt_tokens
from exllama_ops.progress import Screen

DEFAULT_PROMPT = "Why is the sky blue? Answer in two sentences."

_STDIN = "-"


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "run",
        help="answer prompts with a GPTQ model",
        description="Load a GPTQ checkpoint, compile the model with torch.compile and answer prompts.",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help=f"given several times, each is answered in turn; {_STDIN} is all of stdin; default: {DEFAULT_PROMPT!r}",
    )
    parser.add_argument("--json", action="store_true", help="a JSON object for each prompt on stdout instead of text")
    add_arguments(parser, max_new_tokens=64)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
        CliError: whatever a user can cause.
        KeyboardInterrupt: Ctrl-C came, perhaps in an answer that was written all the same.
    """
    with expected_errors(), Screen() as screen:
        texts = _texts(args.prompt or [DEFAULT_PROMPT])
        session = Session(args, screen)
        prompts = [prompt_tokens(session.tokenizer, text) for text in texts]
        session.load()
        for prompt in prompts:
            if reason := session.reasons_against(prompt):
                raise CliError(reason)
        session.compile()
        for number, (text, prompt) in enumerate(zip(texts, prompts, strict=True), 1):
            if len(texts) > 1:
                say(f"prompt {number} of {len(texts)}: {' '.join(text.split())}")
            answer = session.answer(prompt, _ignore if args.json else emit)
            emit(json.dumps(_result(session, text, answer), ensure_ascii=False) + "\n" if args.json else "\n")
            report_answer(answer)
            if answer.interrupted:
                break
        report_session(session)
    if answer.interrupted:
        raise KeyboardInterrupt


def _texts(prompts: list[str]) -> list[str]:
    """The prompts, that of stdin read."""
    if prompts.count(_STDIN) > 1:
        raise CliError(f"--prompt {_STDIN}: stdin can be read once; it was asked for {prompts.count(_STDIN)} times")
    return [sys.stdin.read().removesuffix("\n") if prompt == _STDIN else prompt for prompt in prompts]


def _ignore(piece: str) -> None:
    pass


def _result(session: Session, prompt: str, answer: Answer) -> dict[str, Any]:
    args = session.args
    return {
        "model": args.model or str(session.path),
        "prompt": prompt,
        "text": answer.text,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.tokens),
        "interrupted": answer.interrupted,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "prefill_tokens_per_s": answer.prefill_tokens_per_s,
        "decode_tokens_per_s": answer.decode_tokens_per_s,
        **session.figures(),
    }
