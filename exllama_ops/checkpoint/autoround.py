"""The format of AutoRound's exports: tensors in the layout of GPTQ or AutoAWQ under a config of its own."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from exllama_ops.checkpoint.awq import AwqCheckpoint
from exllama_ops.checkpoint.config import GptqConfig, parse_config
from exllama_ops.checkpoint.dynamic import exact_rule, first_matches
from exllama_ops.checkpoint.errors import CheckpointError, shown
from exllama_ops.checkpoint.fields import normalize, read_method
from exllama_ops.checkpoint.files import TensorFiles
from exllama_ops.checkpoint.from_files import FileCheckpoint
from exllama_ops.checkpoint.gptq import GptqCheckpoint

NAME = "auto-round"
METHODS: tuple[str, ...] = ("auto-round", "auto_round", "intel/auto-round")

# packing_format -> the layout of the tensors, as in ``auto_round/inference/convert_model.py`` of AutoRound 0.16.1. Its
# qlinear_torch_zp.py takes 1 from zero points, and its qlinear_torch.py does not.
LAYOUTS = {
    "auto": "gptq",
    "auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_gptq": "gptq",
    "auto_round:auto_gptq:exllamav2": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_awq": "awq",
    "auto_round:awq": "awq",
    "auto_round:auto_awq": "awq",
}

# What a module's config may override, and from how many bits on a module is not quantized.
_OVERRIDES = ("bits", "group_size", "sym")
_UNQUANTIZED_BITS = 9


def parse_autoround(raw: Mapping[str, Any], source: str, modules: Container[str] = ()) -> tuple[GptqConfig, str]:
    """Parse the quantization config of an export.

    Args:
        raw: as in the JSON file. ``extra_config`` has the settings of single modules, by their name or by a regular
            expression that is found anywhere in it. A name decides before an expression.
        source: what error messages call it.
        modules: names of the modules of the files.

    Returns:
        The same as a GPTQ config, and the layout of the tensors: "gptq", "gptq_v2" or "awq".

    Raises:
        CheckpointError: a field is missing or not supported; the text names it.
    """
    packing = raw.get("packing_format") or "auto_round:auto_gptq"
    if packing not in LAYOUTS:
        raise CheckpointError(
            f"{source}: packing_format must be one of {', '.join(LAYOUTS)}; got {shown(packing)}. Export the model "
            "from AutoRound again, in the format auto_round, auto_gptq or auto_awq"
        )
    layout = LAYOUTS[packing]
    extra = raw.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise CheckpointError(f"{source}: extra_config must be a JSON object; got {shown(extra)}")
    _check_integers(raw, source)
    named: dict[str, Any] = {}
    searched: dict[str, Any] = {}
    for key, values in extra.items():
        where = f"{source}: extra_config of {shown(key)}"
        if not isinstance(values, dict):
            raise CheckpointError(f"{where}: must be a JSON object; got {shown(values)}")
        _check_integers(values, where)
        said = _overrides(values, where)
        if not said:
            continue
        bits = said.get("bits", 0)
        quantized = not isinstance(bits, int) or bits < _UNQUANTIZED_BITS
        sign, overrides = ("+:", said) if quantized else ("-:", {})
        if key in modules:
            named[sign + exact_rule(key)] = overrides
        else:
            searched[sign + _search_rule(key)] = overrides
    try:
        first_matches(searched, ())
    except CheckpointError as error:
        raise CheckpointError(f"{source}: extra_config: {error}") from error
    checkpoint_format = "gptq" if layout == "gptq" else "gptq_v2"
    return parse_config(
        _overrides(raw, source) | {"checkpoint_format": checkpoint_format, "dynamic": named | searched}, source
    ), layout


def _overrides(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {name: value for name, value in normalize(values, source).items() if name in _OVERRIDES}


def _search_rule(expression: str) -> str:
    """The rule that matches from a name's start what the expression finds anywhere in it."""
    if "|" in expression:
        return f".*(?:{expression})"
    return expression if expression.startswith(".*") else f".*{expression}"


def _check_integers(values: Mapping[str, Any], source: str) -> None:
    """Check that weights are plain integers and activations are not quantized."""
    data_type = values.get("data_type") or "int"
    if not isinstance(data_type, str) or data_type.split("_")[0] != "int":
        raise CheckpointError(f"{source}: data_type must be int, the numbers that GPTQ has; got {shown(data_type)}")
    act_bits = values.get("act_bits") or 16
    if not isinstance(act_bits, int) or act_bits < _UNQUANTIZED_BITS:
        raise CheckpointError(f"{source}: act_bits must be 16, activations as they are; got {shown(act_bits)}")
    for name in ("super_bits", "rotation_config"):
        if values.get(name):
            raise CheckpointError(
                f"{source}: {name} must be absent, as GPTQ has no such thing; got {shown(values[name])}"
            )


def reasons_against(directory: Path) -> list[str]:
    """Every reason why a directory holds no export of AutoRound that is read here, by its configs alone."""
    try:
        _parse(directory, quiet=True)
    except CheckpointError as error:
        return list(error.reasons)
    return []


def open_directory(directory: Path) -> FileCheckpoint:
    """Open a local directory.

    Raises:
        CheckpointError: as in `parse_autoround`, `GptqCheckpoint` and `AwqCheckpoint`.
    """
    raw, source = _parse(directory)
    files = TensorFiles(directory)
    modules = {tensor.rpartition(".")[0] for tensor in files.tensors}
    config, layout = parse_autoround(raw, source, modules)
    kind = AwqCheckpoint if layout == "awq" else GptqCheckpoint
    return kind(directory, config, files, raw, format=NAME)


def _parse(directory: Path, *, quiet: bool = False) -> tuple[dict[str, Any], str]:
    """The config of a directory, which was parsed without an error."""
    raw, source = read_method(directory, METHODS, quiet=quiet)
    parse_autoround(raw, source)
    return raw, source
