"""The fields of a quantization config as files have them: where they stand, their synonyms, how values are spelt."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exllama_ops.checkpoint.disk import list_directory, read_json
from exllama_ops.checkpoint.errors import CheckpointError, shown

CONFIG_NAME = "config.json"
QUANTIZE_CONFIG_NAME = "quantize_config.json"
# Of config.json; the second is what old files of compressed-tensors have.
CONFIG_FIELDS = ("quantization_config", "compression_config")

# Names that tools give to one field; the first is ours, and two that contradict are an error.
SYNONYMS = {
    "quant_method": ("quant_method", "method"),
    "checkpoint_format": ("checkpoint_format", "format"),
    "bits": ("bits", "wbits", "w_bit"),
    "group_size": ("group_size", "groupsize", "q_group_size"),
    "desc_act": ("desc_act", "act_order"),
}
NUMBERS = ("bits", "group_size")
FLAGS = ("sym", "desc_act", "static_groups", "lm_head")
_FIELDS = ("quant_method", "checkpoint_format", *NUMBERS, *FLAGS, "dynamic", "pack_dtype")

_WHOLE = re.compile(r"([+-]?[0-9]{1,12})(\.0*)?")


def read_quantization(
    directory: Path, said: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> tuple[dict[str, Any], str]:
    """The quantization config of a directory as its files have it.

    config.json's ``quantization_config`` wins over quantize_config.json field by field. A field that it lacks comes
    from the other, since transformers drops ``checkpoint_format`` and ``dynamic`` when it saves a config.

    Args:
        directory: holds config.json, quantize_config.json, both or none.
        said: fields that win over those of the files, or stand for them where the files have none.
        quiet: whether to leave out the warning, where the config is read once more later.

    Returns:
        The fields, for `parse_config`, and what error messages call their source. No fields if there is no config.

    Raises:
        CheckpointError: a file is broken, or contradicts itself.

    Warns:
        UserWarning: what is said and the two files contradict each other.
    """
    names = list_directory(directory)
    found: dict[str, dict[str, Any]] = {}
    if said is not None:
        found["quantization_config, as given,"] = dict(said)
    if CONFIG_NAME in names:
        raw = read_json(directory / CONFIG_NAME)
        field = next((name for name in CONFIG_FIELDS if raw.get(name) is not None), None)
        if field is not None:
            source = f"{directory / CONFIG_NAME}: {field}"
            found[source] = _object(raw[field], source)
    if QUANTIZE_CONFIG_NAME in names:
        found[str(directory / QUANTIZE_CONFIG_NAME)] = read_json(directory / QUANTIZE_CONFIG_NAME)
    merged: dict[str, Any] = {}
    sources: list[str] = []
    for source, raw in found.items():
        told, known = normalize(raw, source), normalize(merged, source)
        differing = [name for name in told if name in known and known[name] != told[name]]
        if differing and not quiet:
            both = "; ".join(f"{name} is {shown(known[name])} and {shown(told[name])}" for name in differing)
            warnings.warn(
                f"{' and '.join([*sources, source])} contradict each other: {both}. The first is used.", stacklevel=4
            )
        decided = {synonym for name in known for synonym in SYNONYMS.get(name, (name,))}
        merged |= {name: value for name, value in raw.items() if name not in decided}
        sources.append(source)
    return merged, sources[0] if sources else str(directory)


def read_method(directory: Path, methods: Sequence[str], *, quiet: bool = False) -> tuple[dict[str, Any], str]:
    """`read_quantization` of a directory whose config must name one of some methods; the first is what errors name.

    Raises:
        CheckpointError: it names another one, or as in `read_quantization`.
    """
    raw, source = read_quantization(directory, quiet=quiet)
    if raw.get("quant_method") not in methods:
        raise CheckpointError(f"{source}: quant_method must be {methods[0]!r}; got {shown(raw.get('quant_method'))}")
    return raw, source


def normalize(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields that matter here, under our names, as what they say, without those that are null.

    A number may stand in a string or be a whole float, and a flag may stand in a string, as some tools write them.

    Raises:
        CheckpointError: synonyms contradict each other.
    """
    values = dict(raw)
    meta = values.get("meta")
    if isinstance(meta, dict):
        values.setdefault("static_groups", meta.get("static_groups"))
    if values.get("is_marlin_format"):
        values.setdefault("checkpoint_format", "marlin")
    for name, synonyms in SYNONYMS.items():
        said = {key: _as_said(name, values[key]) for key in synonyms if values.get(key) is not None}
        if len(said) > 1 and any(value != next(iter(said.values())) for value in said.values()):
            told = ", ".join(f"{synonym}={shown(values[synonym])}" for synonym in said)
            raise CheckpointError(f"{source}: {' and '.join(said)} must agree; got {told}")
        values[name] = next(iter(said.values()), None)
    return {name: _as_said(name, values[name]) for name in _FIELDS if values.get(name) is not None}


def _as_said(name: str, value: Any) -> Any:
    """A value of a field as what it says, or unchanged if it says nothing that such a field can hold."""
    if name in ("quant_method", "checkpoint_format"):
        return str(value).lower()
    text = value.strip().lower() if isinstance(value, str) else ""
    if name in FLAGS:
        return {"true": True, "false": False}.get(text, value)
    if name in NUMBERS:
        whole = _WHOLE.fullmatch(text)
        if whole:
            return int(whole[1])
        if isinstance(value, float) and value.is_integer():
            return int(value)
    return value


def _object(raw: object, source: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise CheckpointError(f"{source}: must be a JSON object; got {type(raw).__name__}")
    return raw
