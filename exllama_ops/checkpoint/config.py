"""The quantization config of a checkpoint: ``quantization_config`` of config.json, or quantize_config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from exllama_ops.checkpoint.choice import MEANT_FIELDS
from exllama_ops.checkpoint.dynamic import first_matches
from exllama_ops.checkpoint.errors import CheckpointError, Reasons, shown
from exllama_ops.checkpoint.fields import (
    CONFIG_NAME,
    FLAGS,
    QUANTIZE_CONFIG_NAME,
    SYNONYMS,
    normalize,
    read_quantization,
)
from exllama_ops.checkpoint.shapes import what_to_say
from exllama_ops.layout import SUPPORTED_BITS

CHECKPOINT_FORMATS = ("gptq", "gptq_v2", "gptq_p")

_REQUIRED = ("bits", "group_size")


class IncompleteConfigError(CheckpointError):
    """A config that lacks a field which only a person can say."""


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
        try:
            matches = first_matches(self.dynamic, result)
        except CheckpointError as error:
            raise CheckpointError(f"dynamic {error}") from error
        for name, rule in matches.items():
            overrides = {key: value for key, value in (self.dynamic[rule] or {}).items() if key in base}
            result[name] = None if rule.startswith("-:") else ModuleConfig(**(base | overrides))
        return result


def read_config(directory: Path, said: Mapping[str, Any] | None = None, *, quiet: bool = False) -> GptqConfig:
    """`parse_config` of `fields.read_quantization`, with the arguments of the latter.

    Where a field is missing, the error says what the shapes of the files allow.
    """
    try:
        return parse_config(*read_quantization(directory, said, quiet=quiet))
    except IncompleteConfigError as error:
        meant = (said or {}).get(MEANT_FIELDS[0])
        raise CheckpointError(f"{error}; {what_to_say(directory, meant)}") from error


def parse_config(raw: Mapping[str, Any], source: str) -> GptqConfig:
    """Parse the contents of a quantization config.

    Args:
        raw: as in the JSON files. Missing ``quant_method`` and ``checkpoint_format`` mean "gptq", missing ``sym`` means
            True (as GPTQModel takes it), the other flags False. ``static_groups`` may also stand in ``meta``. Numbers
            and flags may stand in strings.
        source: what error messages call it.

    Returns:
        The parsed config.

    Raises:
        CheckpointError: a field is missing, contradicts another or is not supported; the text names it.
    """
    values = normalize(raw, source)
    method = values.pop("quant_method", "gptq")
    if method != "gptq":
        raise CheckpointError(f"{source}: quant_method must be 'gptq'; got {shown(method)}")
    if not raw:
        raise IncompleteConfigError(
            f"{source}: not a GPTQ checkpoint: {CONFIG_NAME} must have a quantization_config, or there must be a "
            f"{QUANTIZE_CONFIG_NAME}; found neither"
        )
    reasons = Reasons()
    with reasons:
        _check_pack_dtype(values.pop("pack_dtype", "int32"), source)
    checkpoint_format = values.setdefault("checkpoint_format", "gptq")
    with reasons:
        if checkpoint_format not in CHECKPOINT_FORMATS:
            raise CheckpointError(
                f"{source}: checkpoint_format must be one of {CHECKPOINT_FORMATS}; got {shown(checkpoint_format)}"
            )
    rules = values.pop("dynamic", {})
    dynamic: dict[str, dict[str, Any]] = {}
    with reasons:
        _check_fields(values, source)
    with reasons:
        dynamic = _parse_rules(rules, checkpoint_format, source)
    reasons.raise_all()
    for name in _REQUIRED:
        if name not in values:
            raise IncompleteConfigError(f"{source}: field {name} is missing")
    return GptqConfig(**values, dynamic=dynamic)


def _parse_rules(rules: object, checkpoint_format: str, source: str) -> dict[str, dict[str, Any]]:
    if not isinstance(rules, dict):
        raise CheckpointError(f"{source}: dynamic must be a JSON object of rules; got {shown(rules)}")
    try:
        first_matches(rules, ())
    except CheckpointError as error:
        raise CheckpointError(f"{source}: dynamic {error}") from error
    dynamic: dict[str, dict[str, Any]] = {}
    reasons = Reasons()
    for rule, overrides in rules.items():
        with reasons:
            dynamic[rule] = _overrides(rule, overrides, checkpoint_format, f"{source}: dynamic rule {shown(rule)}")
    reasons.raise_all()
    return dynamic


def _check_pack_dtype(pack_dtype: object, source: str) -> None:
    if str(pack_dtype).removeprefix("torch.") != "int32":
        raise CheckpointError(
            f"{source}: pack_dtype must be int32, the word that the kernels take; got {shown(pack_dtype)}"
        )


def _overrides(rule: str, overrides: object, checkpoint_format: str, source: str) -> dict[str, Any]:
    """What a rule changes, as a config has it."""
    if not isinstance(overrides, dict):
        if rule.startswith("-:") and overrides is None:
            return {}
        raise CheckpointError(f"{source}: must map to a JSON object; got {shown(overrides)}")
    values = normalize(overrides, source)
    if "pack_dtype" in values:
        _check_pack_dtype(values.pop("pack_dtype"), source)
    for name, common in (("quant_method", "gptq"), ("checkpoint_format", checkpoint_format)):
        if values.pop(name, common) != common:
            said = next(key for key in SYNONYMS[name] if overrides.get(key) is not None)
            raise CheckpointError(
                f"{source}: {said} must be the same for all modules, {common}; got {shown(overrides[said])}"
            )
    _check_fields(values, source)
    return values


def _check_fields(values: Mapping[str, Any], source: str) -> None:
    reasons = Reasons()
    for name, value in values.items():
        if name == "bits":
            valid = type(value) is int and value in SUPPORTED_BITS
            rule = f"one of {SUPPORTED_BITS}"
        elif name == "group_size":
            valid = type(value) is int and (1 <= value < 2**31 or value == -1)
            rule = "at least 1 and below 2**31, or -1 for one group of all rows"
        elif name in FLAGS:
            valid = isinstance(value, bool)
            rule = "true or false"
        else:
            continue
        with reasons:
            if not valid:
                raise CheckpointError(f"{source}: {name} must be {rule}; got {shown(value)}")
    reasons.raise_all()
