"""`exllama-ops inspect`: what a checkpoint holds and what speaks against it, from its configs and headers alone."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exllama_ops.cli.model import add_model_arguments, open_model
from exllama_ops.cli.output import CliError, emit, expected_errors
from exllama_ops.cli.remote_code import own_code
from exllama_ops.cli.table import lines_of, pattern_of, told
from exllama_ops.extras import collector_paused, require
from exllama_ops.progress import Screen

if TYPE_CHECKING:
    from exllama_ops.checkpoint import Checkpoint, ModuleSummary

# Any of them makes a tokenizer.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "inspect",
        help="say what a checkpoint holds, without loading it",
        description="Read the configs and the headers of a checkpoint, and say its bits, groups, order, zero points, "
        "sizes and layers, who wrote it, and what speaks against loading it. The exit code is 2 if something does.",
    )
    add_model_arguments(parser, optional=True)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the text")
    parser.set_defaults(command=inspect)


def inspect(args: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
        CliError: the checkpoint is not there, or would be refused.
    """
    with expected_errors():
        result = _result(args)
    if args.json:
        emit(json.dumps(result, ensure_ascii=False) + "\n")
    else:
        emit("\n".join(_lines(result)) + "\n")
    if result["refused"]:
        raise CliError(f"{result['path']}: would be refused: {result['refused'][0]}")


def _result(args: argparse.Namespace) -> dict[str, Any]:
    from exllama_ops.checkpoint import CheckpointError
    from exllama_ops.checkpoint.files import is_hub_id
    from exllama_ops.checkpoint.hub import fetch_headers

    name = args.model
    with tempfile.TemporaryDirectory() as folder, Screen() as screen:
        if name is not None and is_hub_id(name):
            screen(f"fetching the headers of {name} from the hub")
            place = fetch_headers(name, args.revision, Path(folder))
            args = argparse.Namespace(**{**vars(args), "model": str(place), "revision": None})
        try:
            result = _described(open_model(args, screen))
        except CheckpointError as error:
            if args.model is None or not os.path.exists(args.model):
                raise
            result = {"path": args.model, "refused": list(error.reasons)}
    if args.model == folder:
        result["path"] = name
        result["refused"] = [reason.replace(folder, name) for reason in result["refused"]]
    return result


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    from exllama_ops.checkpoint.disk import list_directory, read_json

    model = read_json(checkpoint.path / "config.json") if "config.json" in list_directory(checkpoint.path) else {}
    summaries = {name: checkpoint.summary(name) for name in checkpoint.quantized}
    quantized_bytes = sum(summary.num_bytes for summary in summaries.values())
    values = sum(summary.in_features * summary.out_features for summary in summaries.values())
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "written_by": _written_by(checkpoint.quantization),
        "model_type": model.get("model_type"),
        "architectures": model.get("architectures"),
        "bits": sorted({summary.bits for summary in summaries.values()}),
        "quantized_modules": len(summaries),
        "quantized_bytes": quantized_bytes,
        "bits_per_weight": round(quantized_bytes * 8 / values, 3),
        "dense_tensors": len(checkpoint.dense),
        "dense_bytes": checkpoint.weight_bytes - quantized_bytes,
        "weight_bytes": checkpoint.weight_bytes,
        "layers": _layers(summaries),
        "dense": _dense(checkpoint),
        "quantization": dict(checkpoint.quantization),
        "refused": _reasons_against(checkpoint.path, model),
    }


def _written_by(quantization: Mapping[str, Any]) -> str | None:
    """The tool that made the files, as far as they say so."""
    meta = quantization.get("meta")
    said = (meta if isinstance(meta, dict) else quantization).get("quantizer")
    if said:
        return ", ".join(map(str, said)) if isinstance(said, list) else str(said)
    for tool, field in (("auto-round", "autoround_version"), ("compressed-tensors", "version")):
        if quantization.get("quant_method") == tool and quantization.get(field):
            return f"{tool}:{quantization[field]}"
    return None


def _layers(summaries: Mapping[str, ModuleSummary]) -> list[dict[str, Any]]:
    """The modules that are alike but for a number in their names, as one entry each."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, summary in summaries.items():
        alike.setdefault((pattern_of(name), astuple(summary)), []).append(name)
    entries = []
    for names in alike.values():
        entry = asdict(summaries[names[0]])
        entry["num_bytes"] *= len(names)
        entries.append({"modules": told(names), "count": len(names), **entry})
    return entries


def _dense(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name in checkpoint.dense:
        dtype = str(checkpoint.tensor_dtype(name)).removeprefix("torch.")
        alike.setdefault((pattern_of(name), checkpoint.tensor_shape(name), dtype), []).append(name)
    return [
        {"tensors": told(names), "count": len(names), "shape": list(shape), "dtype": dtype}
        for (_, shape, dtype), names in alike.items()
    ]


def _reasons_against(path: Path, model: Mapping[str, Any]) -> list[str]:
    """What `run` would refuse of a checkpoint whose weights can be read."""
    from exllama_ops.checkpoint.disk import list_directory

    reasons = []
    names = list_directory(path)
    if "config.json" not in names:
        reasons.append("there is no config.json, which describes the model")
    elif not isinstance(model.get("model_type"), str):
        reasons.append("config.json has no model_type, which names the family")
    elif reason := _reason_against_family(path, model["model_type"]):
        reasons.append(reason)
    if not set(names) & set(_TOKENIZERS):
        reasons.append("there is no tokenizer (tokenizer.json or its kin), which run and chat need")
    return reasons


def _reason_against_family(path: Path, model_type: str) -> str:
    """Why transformers makes no model of this type, by its name alone; empty if it does."""
    with collector_paused():
        transformers = require("transformers")
    if model_type in transformers.CONFIG_MAPPING:
        return ""
    if code := own_code(path):
        return f"it needs code of its own repository ({code}), which --trust-remote-code allows"
    return f"transformers {transformers.__version__} knows no model_type {model_type!r}; a later one may"


def _lines(result: Mapping[str, Any]) -> list[str]:
    """The description for people."""
    if "layers" not in result:
        return [f"path:      {result['path']}", *(f"refused:   {reason}" for reason in result["refused"])]
    family = ", ".join(result["architectures"] or [str(result["model_type"])])
    layers = [
        {
            "quantized": entry["modules"],
            "count": entry["count"],
            "in": entry["in_features"],
            "out": entry["out_features"],
            "bits": entry["bits"],
            "group": entry["group_size"],
            "sym": entry["sym"],
            "order": entry["act_order"],
            "zeros": entry["zero_format"],
            "bias": entry["bias"],
            "MB": entry["num_bytes"] / 1e6,
        }
        for entry in result["layers"]
    ]
    facts = {
        "path": result["path"],
        "model": family,
        "format": f"{result['format']}, written by {result['written_by'] or 'a tool that does not say'}",
        "quantized": f"{result['quantized_modules']} modules, {_told_size(result['quantized_bytes'])}, "
        f"{result['bits_per_weight']} bits a weight",
        "dense": f"{result['dense_tensors']} tensors, {_told_size(result['dense_bytes'])}",
        "all": _told_size(result["weight_bytes"]),
        "refused": "; ".join(result["refused"]) or "nothing",
    }
    told_facts = [f"{name + ':':11}{value}" for name, value in facts.items()]
    return [*told_facts, "", *lines_of(layers), "", *lines_of(result["dense"])]


def _told_size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
