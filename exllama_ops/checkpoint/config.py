"""The quantization config of a checkpoint: ``quantization_config`` of config.json, or quantize_config.json."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from exllama_ops.checkpoint.disk import list_directory, read_json
from exllama_ops.checkpoint.dynamic import first_matches
from exllama_ops.checkpoint.errors import CheckpointError, shown
from exllama_ops.layout import SUPPORTED_BITS

CONFIG_NAME = "config.json"
QUANTIZE_CONFIG_NAME = "quantize_config.json"

CHECKPOINT_FORMATS = ("gptq", "gptq_v2", "gptq_p")

# Names that tools give to one field; the first is ours, and two that contradict are an error.
_SYNONYMS = {
    "quant_method": ("quant_method", "method"),
    "checkpoint_format": ("checkpoint_format", "format"),
}
_FIELDS = (
    "quant_method",
    "checkpoint_format",
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "static_groups",
    "lm_head",
    "dynamic",
    "pack_dtype",
)
_REQUIRED = ("bits", "group_size")


@dataclass(frozen=True)
class ModuleConfig:
    """How one module is quantized.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: rows of a group as on disk: -1 stands for all rows.
        sym: whether every zero point is ``2**(bits - 1)``.
        desc_act: whether rows were quantized by activation order, so that groups are not runs of rows.
        static_groups: whether groups are runs of rows although ``desc_act`` is set.
    """

    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = False


@dataclass(frozen=True)
class GptqConfig(ModuleConfig):
    r"""The quantization config of a whole checkpoint.

    Args:
        bits: as in `ModuleConfig`, and so on: what holds for a module that ``dynamic`` says nothing of.
        checkpoint_format: "gptq" (zero points stored minus 1), "gptq_v2" (stored as they are) or "gptq_p" (planar; the
            same as gptq_v2 for 2, 4 and 8 bits).
        lm_head: whether the output head is quantized too.
        dynamic: exceptions by regular expression: ``"+:REGEX"`` or ``"REGEX"`` overrides fields of the modules whose
            full name the expression matches from its start, ``"-:REGEX"`` skips them. The first match decides.
            Expressions are those of `re`, of at most 1000 characters, matched against names of at most 1000. A match
            that takes more than a second is an error, and so are rules that take half a minute for all modules. A name
            alone, escaped as in ``^model\.layers\.0$``, is looked up: it has neither limit.
    """

    checkpoint_format: str = "gptq"
    lm_head: bool = False
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def zero_offset(self) -> int:
        """What is added to a stored zero point."""
        return 1 if self.checkpoint_format == "gptq" else 0

    def for_module(self, name: str) -> ModuleConfig | None:
        """The config of one module: None if ``dynamic`` says that it is not quantized.

        Args:
            name: the module's full name, such as ``model.layers.0.self_attn.q_proj``.

        Returns:
            The fields of this config with the overrides of the first ``dynamic`` rule that matches.

        Raises:
            CheckpointError: a rule is no regular expression, or exceeds a limit of ``dynamic``; the text names it.
            ImportError: the extra "hf" is not installed.

        Source: GPTQModel 7.7.0, ``QuantizeConfig.dynamic``.
        """
        return self.for_modules([name])[name]

    def for_modules(self, names: Iterable[str]) -> dict[str, ModuleConfig | None]:
        """The configs of all modules of a checkpoint, under one limit of time; otherwise as `for_module`."""
        base = {f.name: getattr(self, f.name) for f in fields(ModuleConfig)}
        result: dict[str, ModuleConfig | None] = dict.fromkeys(names, ModuleConfig(**base))
        for name, rule in first_matches(self.dynamic, result).items():
            overrides = {key: value for key, value in (self.dynamic[rule] or {}).items() if key in base}
            result[name] = None if rule.startswith("-:") else ModuleConfig(**(base | overrides))
        return result


def read_quantization(
    directory: Path, said: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> tuple[dict[str, Any], str]:
    """The quantization config of a directory as its files have it.

    config.json's ``quantization_config`` wins over quantize_config.json field by field. A field that it lacks comes
    from the other, since transformers drops ``checkpoint_format`` and ``dynamic`` when it saves a config.

    Args:
        directory: holds config.json, quantize_config.json or both.
        said: fields that win over those of the files, or stand for them where the files have none.
        quiet: whether to leave out the warning, where the config is read once more later.

    Returns:
        The fields, for `parse_config`, and what error messages call their source.

    Raises:
        CheckpointError: neither file has one and nothing is said, or one contradicts itself.

    Warns:
        UserWarning: what is said and the two files contradict each other.
    """
    config_path, quantize_path = directory / CONFIG_NAME, directory / QUANTIZE_CONFIG_NAME
    names = list_directory(directory)
    found: dict[str, object] = {}
    if said is not None:
        found["quantization_config, as given,"] = dict(said)
    if CONFIG_NAME in names:
        raw = read_json(config_path).get("quantization_config")
        if raw is not None:
            found[f"{config_path}: quantization_config"] = raw
    if QUANTIZE_CONFIG_NAME in names:
        found[str(quantize_path)] = read_json(quantize_path)
    if not found:
        raise CheckpointError(
            f"{directory}: not a GPTQ checkpoint: {CONFIG_NAME} must have a quantization_config, or there must be a "
            f"{QUANTIZE_CONFIG_NAME}; found neither"
        )
    merged: dict[str, Any] = {}
    for source, fields_found in found.items():
        parsed, known = _normalize(fields_found, source), _normalize(merged, source)
        differing = [name for name in parsed if name in known and known[name] != parsed[name]]
        if differing and not quiet:
            told = "; ".join(f"{name} is {shown(known[name])} and {shown(parsed[name])}" for name in differing)
            before = " and ".join(list(found)[: list(found).index(source)])
            warnings.warn(f"{before} and {source} contradict each other: {told}. The first is used.", stacklevel=4)
        decided = {synonym for name in known for synonym in _SYNONYMS.get(name, (name,))}
        merged |= {name: value for name, value in _object(fields_found, source).items() if name not in decided}
    return merged, next(iter(found))


def read_config(directory: Path, said: Mapping[str, Any] | None = None, *, quiet: bool = False) -> GptqConfig:
    """`parse_config` of `read_quantization`, with the arguments of the latter."""
    return parse_config(*read_quantization(directory, said, quiet=quiet))


def _object(raw: object, source: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise CheckpointError(f"{source}: must be a JSON object; got {type(raw).__name__}")
    return raw


def _normalize(raw: object, source: str) -> dict[str, Any]:
    """The fields that matter here, under our names, without those that are null."""
    values = dict(_object(raw, source))
    meta = values.get("meta")
    if isinstance(meta, dict):
        values.setdefault("static_groups", meta.get("static_groups"))
    if values.get("is_marlin_format"):
        values.setdefault("checkpoint_format", "marlin")
    for name, synonyms in _SYNONYMS.items():
        said = {synonym: values[synonym] for synonym in synonyms if values.get(synonym) is not None}
        if len({str(value).lower() for value in said.values()}) > 1:
            told = ", ".join(f"{synonym}={shown(value)}" for synonym, value in said.items())
            raise CheckpointError(f"{source}: {' and '.join(synonyms)} must agree; got {told}")
        values[name] = str(next(iter(said.values()))).lower() if said else None
    return {name: values[name] for name in _FIELDS if values.get(name) is not None}


def parse_config(raw: Mapping[str, Any], source: str) -> GptqConfig:
    """Parse the contents of a quantization config.

    Args:
        raw: as in the JSON file. Missing ``quant_method`` and ``checkpoint_format`` mean "gptq", missing ``sym`` means
            True (as GPTQModel takes it), the other flags False. ``static_groups`` may also stand in ``meta``.
        source: what error messages call it.

    Returns:
        The parsed config.

    Raises:
        CheckpointError: a field is missing, contradicts another or is not supported; the text names it.
    """
    values = _normalize(raw, source)
    method = values.pop("quant_method", "gptq")
    if method != "gptq":
        raise CheckpointError(f"{source}: quant_method must be 'gptq'; got {shown(method)}")
    _check_pack_dtype(values.pop("pack_dtype", "int32"), source)
    checkpoint_format = values.setdefault("checkpoint_format", "gptq")
    if checkpoint_format not in CHECKPOINT_FORMATS:
        raise CheckpointError(
            f"{source}: checkpoint_format must be one of {CHECKPOINT_FORMATS}; got {shown(checkpoint_format)}"
        )
    for name in _REQUIRED:
        if name not in values:
            raise CheckpointError(f"{source}: field {name} is missing")
    dynamic = values.setdefault("dynamic", {})
    _check_fields(values, source)
    try:
        first_matches(dynamic, ())
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    for rule, overrides in dynamic.items():
        _check_overrides(rule, overrides, f"{source}: dynamic rule {shown(rule)}")
    return GptqConfig(**values)


def _check_pack_dtype(pack_dtype: object, source: str) -> None:
    if str(pack_dtype).removeprefix("torch.") != "int32":
        raise CheckpointError(
            f"{source}: pack_dtype must be int32, the word that the kernels take; got {shown(pack_dtype)}"
        )


def _check_overrides(rule: str, overrides: object, source: str) -> None:
    if not isinstance(overrides, dict):
        if rule.startswith("-:") and overrides is None:
            return
        raise CheckpointError(f"{source}: must map to a JSON object; got {shown(overrides)}")
    if "pack_dtype" in overrides:
        _check_pack_dtype(overrides["pack_dtype"], source)
    for name in ("quant_method", "method", "checkpoint_format", "format"):
        if name in overrides:
            raise CheckpointError(f"{source}: {name} must be the same for all modules; got {shown(overrides[name])}")
    _check_fields(overrides, source)


def _check_fields(values: Mapping[str, Any], source: str) -> None:
    for name, value in values.items():
        if name == "bits":
            valid = type(value) is int and value in SUPPORTED_BITS
            rule = f"one of {SUPPORTED_BITS}"
        elif name == "group_size":
            valid = type(value) is int and (1 <= value < 2**31 or value == -1)
            rule = "at least 1 and below 2**31, or -1 for one group of all rows"
        elif name in ("sym", "desc_act", "static_groups", "lm_head"):
            valid = isinstance(value, bool)
            rule = "true or false"
        elif name == "dynamic":
            valid = isinstance(value, dict)
            rule = "a JSON object of rules"
        else:
            continue
        if not valid:
            raise CheckpointError(f"{source}: {name} must be {rule}; got {shown(value)}")
