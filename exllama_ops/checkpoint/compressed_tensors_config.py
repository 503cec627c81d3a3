"""The quantization config of compressed-tensors: which modules are quantized, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from exllama_ops.checkpoint.config import ModuleConfig
from exllama_ops.checkpoint.dynamic import exact_rule, first_matches
from exllama_ops.checkpoint.errors import CheckpointError, shown
from exllama_ops.layout import SUPPORTED_BITS

FORMAT = "pack-quantized"

_EXPRESSION = "re:"
# The class that every module in this format is of, or is derived from.
_LINEAR = "Linear"
_ACTIVATIONS = ("input_activations", "output_activations")
_ORDERED = ("group", "dynamic")
_UNORDERED = ("weight", "static")


@dataclass(frozen=True)
class CompressedTensorsConfig:
    """The quantization config of a checkpoint of compressed-tensors.

    Args:
        targets: what a module is called -> how it is quantized; None if it is not. A target is the name of a module, a
            regular expression after "re:", or the name of a class.
        ignore: modules that are not quantized, in the same way.
    """

    targets: Mapping[str, ModuleConfig | None]
    ignore: tuple[str, ...]

    def for_modules(self, names: Iterable[str]) -> dict[str, ModuleConfig | None]:
        """How each of the modules of a checkpoint is quantized: None if it is not.

        Names decide before expressions, which decide before the class "Linear". Files do not say other classes.

        Raises:
            CheckpointError: no target fits a module, or an expression is none or exceeds the limits of `GptqConfig`.
        """
        names = list(names)
        ignored = first_matches(map(_rule, self.ignore), names)
        # The order of compressed-tensors 0.20.1, ``match_targets``.
        ordered = sorted(self.targets, key=lambda target: (_EXPRESSION in target, target))
        rules = {_rule(target): target for target in ordered}
        matched = first_matches(rules, names)
        result: dict[str, ModuleConfig | None] = {}
        for name in names:
            target = rules[matched[name]] if name in matched else _LINEAR
            if name not in ignored and target not in self.targets:
                raise CheckpointError(
                    f"config_groups: module {shown(name)} must have a target: its name, an expression that matches it, "
                    f"or {_LINEAR}; got {', '.join(map(shown, self.targets))}"
                )
            result[name] = None if name in ignored else self.targets[target]
        return result


def _rule(target: str) -> str:
    return f"+:{target.removeprefix(_EXPRESSION)}" if target.startswith(_EXPRESSION) else f"+:{exact_rule(target)}"


def parse_compressed_tensors(raw: Mapping[str, Any], source: str) -> CompressedTensorsConfig:
    """Parse the quantization config of compressed-tensors.

    Args:
        raw: as in the JSON file.
        source: what error messages call it.

    Returns:
        The parsed config.

    Raises:
        CheckpointError: a field is missing or not supported; the text names it.
    """
    for name in ("sparsity_config", "transform_config"):
        value = raw.get(name)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise CheckpointError(f"{source}: {name} must be absent, as GPTQ has no such thing; got {shown(value)}")
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{source}: config_groups must be a JSON object of groups; got {shown(groups)}")
    targets: dict[str, ModuleConfig | None] = {}
    for name, group in groups.items():
        where = f"{source}: config_groups of {shown(name)}"
        if not isinstance(group, dict):
            raise CheckpointError(f"{where}: must be a JSON object; got {shown(group)}")
        kind = _parse_group(group, raw.get("format"), where)
        targets |= dict.fromkeys(_names(group.get("targets"), f"{where}: targets"), kind)
    config = CompressedTensorsConfig(targets, tuple(_names(raw.get("ignore") or [], f"{source}: ignore")))
    try:
        config.for_modules(())
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return config


def _names(value: object, source: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{source} must be a JSON array of names; got {shown(value)}")
    return value


def _parse_group(group: Mapping[str, Any], format_of_all: object, source: str) -> ModuleConfig | None:
    """How the modules of a group are quantized."""
    for name in _ACTIVATIONS:
        if group.get(name) is not None:
            raise CheckpointError(f"{source}: {name} must be null, activations as they are; got {shown(group[name])}")
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, dict):
        raise CheckpointError(f"{source}: weights must be a JSON object or null; got {shown(weights)}")
    found = group.get("format") or format_of_all
    if found != FORMAT:
        raise CheckpointError(
            f"{source}: format must be {FORMAT!r}, integers of 2, 3, 4 or 8 bits in 32-bit words; got {shown(found)}"
        )
    bits = weights.get("num_bits", 8)
    if type(bits) is not int or bits not in SUPPORTED_BITS:
        raise CheckpointError(f"{source}: num_bits must be one of {SUPPORTED_BITS}; got {shown(bits)}")
    kind = weights.get("type", "int")
    if kind != "int":
        raise CheckpointError(f"{source}: type must be 'int'; got {shown(kind)}")
    if weights.get("dynamic"):
        raise CheckpointError(f"{source}: dynamic must be false; got {shown(weights['dynamic'])}")
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise CheckpointError(f"{source}: symmetric must be true or false; got {shown(symmetric)}")
    order = weights.get("actorder") or None
    if order not in (None, True, *_ORDERED, *_UNORDERED):
        raise CheckpointError(
            f"{source}: actorder must be null or one of {(*_ORDERED, *_UNORDERED)}; got {shown(order)}"
        )
    ordered = order is True or order in _ORDERED
    return ModuleConfig(bits, _group_size(weights, source), sym=symmetric, desc_act=ordered)


def _group_size(weights: Mapping[str, Any], source: str) -> int:
    """Rows of a group, or -1 for all of them."""
    size = weights.get("group_size")
    strategy = weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "channel":
        return -1
    if strategy != "group":
        raise CheckpointError(
            f"{source}: strategy must be 'group' or 'channel', a scale for each column of a run of rows; got "
            f"{shown(strategy)}"
        )
    if type(size) is not int or not 1 <= size < 2**31:
        raise CheckpointError(f"{source}: group_size must be at least 1 and below 2**31; got {shown(size)}")
    return size
