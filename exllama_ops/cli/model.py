"""What names a model on the command line: a directory or hub id, and what its files do not say of themselves."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from exllama_ops.cli.output import CliError
from exllama_ops.progress import Screen

if TYPE_CHECKING:
    from exllama_ops.checkpoint import Checkpoint

# By the fields of a quantization config; a flag that was not given is None.
_FIELDS = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")


def add_model_arguments(parser: Any, *, optional: bool) -> None:
    """Add the model, its revision, and what a quantization config says.

    Args:
        parser: to add to.
        optional: whether the demo model stands for none.
    """
    what = "a directory, its .safetensors file, or a hub id"
    if optional:
        parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{what}; default: a small demo model")
    else:
        parser.add_argument("model", metavar="MODEL", help=what)
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    group = parser.add_argument_group("what the files do not say of themselves, or say wrongly")
    group.add_argument("--bits", type=int, metavar="N", help="of a quantized value: 2, 3, 4 or 8")
    group.add_argument("--group-size", type=int, metavar="N", help="rows that share a scale; -1 for all rows")
    group.add_argument("--sym", action="store_true", default=None, help="every zero point is the middle value")
    group.add_argument("--asym", dest="sym", action="store_false", help="zero points are what they are")
    group.add_argument("--desc-act", action="store_true", default=None, help="rows have an activation order")
    group.add_argument(
        "--checkpoint-format", metavar="NAME", help="gptq: zero points stored minus 1; gptq_v2: as they are"
    )


def add_trust_argument(parser: Any) -> None:
    """Add the flag without which nothing of a repository runs."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code of the model's repository, if it has any"
    )


def quantization_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the flags say, as `exllama_ops.open_checkpoint` takes it; None if they say nothing."""
    said = {name: getattr(args, name) for name in _FIELDS if getattr(args, name) is not None}
    return said or None


def open_model(args: argparse.Namespace, screen: Screen) -> Checkpoint:
    """Open the checkpoint that the arguments name.

    Raises:
        CheckpointError: as in `exllama_ops.open_checkpoint`.
        CliError: a flag is given that the demo model has no use for.
    """
    from exllama_ops.checkpoint import open_checkpoint
    from exllama_ops.checkpoint.files import is_hub_id

    said = quantization_config(args)
    if args.model is None:
        from exllama_ops.integrations.demo import demo_checkpoint

        if args.revision is not None or said is not None:
            raise CliError("MODEL: must be given with --revision and with what its files do not say; got none")
        return open_checkpoint(demo_checkpoint(screen))
    if is_hub_id(args.model):
        screen(f"fetching {args.model} from the hub")  # which shows bars of its own
    return open_checkpoint(args.model, revision=args.revision, quantization_config=said)
