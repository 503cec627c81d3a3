"""`exllama-ops convert`: write a checkpoint of another format as GPTQ."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exllama_ops.checkpoint.convert import FORMATS, Conversion, convert_checkpoint
from exllama_ops.checkpoint.journal import check_free
from exllama_ops.checkpoint.opening import GGUF_SUFFIX
from exllama_ops.cli.model import add_model_arguments, open_model, quantization_config
from exllama_ops.cli.output import CliError, emit, expected_errors, say
from exllama_ops.progress import Screen


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "convert",
        help="write a checkpoint of another format as GPTQ",
        description="Write a checkpoint of AutoRound, AutoAWQ, compressed-tensors or GPTQ, or a GGUF file of Q4_0 and "
        "Q8_0, as a GPTQ checkpoint. Weights are exact. The same command goes on where one was stopped.",
    )
    add_model_arguments(parser, optional=False)
    parser.add_argument("destination", metavar="DST", help="a new or empty directory")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="how zero points are stored: as they are, or minus 1 for tools that know v1 alone; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the text")
    parser.set_defaults(command=convert)


def convert(args: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
        CliError: whatever a user can cause.
        KeyboardInterrupt: Ctrl-C came; the same command goes on.
    """
    with expected_errors(), Screen() as screen:
        try:
            conversion = _convert(args, screen)
        except KeyboardInterrupt:
            say(f"exllama-ops: stopped; the same command goes on from what is in {args.destination}")
            raise
    result = {"source": args.model, **asdict(conversion), "path": str(conversion.path)}
    if args.json:
        emit(json.dumps(result, ensure_ascii=False) + "\n")
        return
    emit(
        f"{conversion.path}: {conversion.checkpoint_format}, {conversion.modules} quantized modules and "
        f"{conversion.tensors} other tensors in {conversion.num_bytes / 1e6:.1f} MB\n"
    )


def _convert(args: argparse.Namespace, screen: Screen) -> Conversion:
    check_free(Path(args.destination))  # before anything is fetched
    if args.model.endswith(GGUF_SUFFIX):
        return _convert_gguf(args, screen)
    source = open_model(args, screen)
    return convert_checkpoint(source, args.destination, checkpoint_format=args.format, notify=screen)


def _convert_gguf(args: argparse.Namespace, screen: Screen) -> Conversion:
    if args.revision is not None or quantization_config(args) is not None:
        raise CliError(f"{args.model}: a GGUF file must be given without --revision and without what it says itself")
    screen(f"reading {args.model}")
    from exllama_ops.integrations.gguf import GgufCheckpoint

    source = GgufCheckpoint(Path(args.model))
    return convert_checkpoint(
        source,
        args.destination,
        checkpoint_format=args.format,
        config=source.model_config,
        write_others=source.write_others,
        notify=screen,
    )
