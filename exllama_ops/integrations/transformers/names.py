"""Where the quantized modules of a checkpoint lie in a model: names of files, renamed by transformers' own tables."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from transformers import conversion_mapping, core_model_loading

from exllama_ops.checkpoint.errors import listed

# What files call the projections of an expert, and the merged parameter and part that each of them is. None: all of it.
_PROJECTIONS: dict[str, tuple[str, int | None]] = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
}
# Likewise for files that have the number of the expert behind the projection, as GPTQModel writes GPT-OSS.
_NUMBERED_PROJECTIONS: dict[str, tuple[str, int | None]] = {
    "gate_up": ("gate_up_proj", None),
    "gate_up_proj": ("gate_up_proj", None),
    "gate_up_projs": ("gate_up_proj", None),
    "down": ("down_proj", 0),
    "down_proj": ("down_proj", 0),
    "down_projs": ("down_proj", 0),
}


@dataclass(frozen=True)
class ExpertPlace:
    """One projection of one expert, which files have on its own and transformers merges into a parameter of all.

    Args:
        experts: name of the module of all experts.
        index: of the expert.
        projection: what the files call it, such as "gate_proj" or "w1".
        parameter: of the module of all experts, such as "gate_up_proj".
        part: which of the merged projections it is: 0 for gate and 1 for up in "gate_up_proj", None for both in one.
    """

    experts: str
    index: int
    projection: str
    parameter: str
    part: int | None


@dataclass
class Places:
    """Where the modules of a checkpoint belong.

    Args:
        layers: name in the files -> name of the model's module.
        experts: name in the files -> place among the experts.
        left_out: names in the files that this class leaves out, such as layers for speculative decoding.
        problems: what has no place, a sentence each.
    """

    layers: dict[str, str] = field(default_factory=dict)
    experts: dict[str, ExpertPlace] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def places(model: Any, names: Iterable[str]) -> Places:
    """Find the place of each quantized module.

    Args:
        model: a transformers model whose layers are still the dense ones.
        names: of the quantized modules in the files.
    """
    found = Places()
    tables = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [table for table in tables if isinstance(table, core_model_loading.WeightRenaming)]
    converters = [table for table in tables if isinstance(table, core_model_loading.WeightConverter)]
    converter_of = {pattern: table for table in converters for pattern in table.source_patterns}
    known = model.state_dict()
    ignored = _pattern(model._keys_to_ignore_on_load_unexpected)
    unknown: list[str] = []
    for name in names:
        key = f"{name}.weight"
        renamed, pattern = core_model_loading.rename_source_key(
            key, renamings, converters, model.base_model_prefix, known
        )
        if renamed not in known and key in known:
            renamed, pattern = key, None
        if pattern is not None:
            place = _expert_place(core_model_loading.apply_renamings(key, renamings), renamed, converter_of[pattern])
            if isinstance(place, str):
                found.problems.append(f"{name}: {place}")
            else:
                found.experts[name] = place
        elif renamed in known:
            found.layers[name] = renamed.removesuffix(".weight")
        elif (known_expert := _expert_by_name(renamed, known)) is not None:
            found.experts[name] = known_expert
        elif ignored is not None and ignored.search(renamed):
            found.left_out.append(name)
        else:
            unknown.append(name)
    if unknown:
        found.problems.append(_unknown(model, unknown))
    return found


def _pattern(expressions: Iterable[str] | None) -> re.Pattern[str] | None:
    alternatives = "|".join(f"(?:{expression})" for expression in expressions or ())
    return re.compile(alternatives) if alternatives else None


def _expert_place(key: str, renamed: str, converter: Any) -> ExpertPlace | str:
    """The place of ``key``, which a converter merges into ``renamed``; or the reason why it has none here."""
    kinds = [type(operation).__name__ for operation in converter.operations]
    merges_experts = kinds[:1] == ["MergeModulelist"] and kinds[1:] in ([], ["Concatenate"])
    if not merges_experts:
        return f"transformers makes {renamed} of it by {', '.join(kinds)}, which packed weights cannot follow"
    for part, pattern in enumerate(converter.source_patterns):
        head, star, tail = pattern.rpartition("*")
        matched = star and re.search(f"{head}([0-9]+){tail}$", key)
        if matched:
            experts, _, parameter = renamed.rpartition(".")
            projection = key[matched.end(1) + 1 :].removesuffix(".weight")
            return ExpertPlace(experts, int(matched[1]), projection, parameter, part)
    return f"its number among the experts of {renamed} is not to be found in its name"


def _expert_by_name(key: str, known: Container[str]) -> ExpertPlace | None:
    """The place of an expert that transformers' table does not know: tools name them as their own models do."""
    for pattern, projections in (
        (r"(?P<experts>.+)\.(?P<index>[0-9]+)\.(?P<name>\w+)\.weight", _PROJECTIONS),
        (r"(?P<experts>.+)\.(?P<name>\w+)\.(?P<index>[0-9]+)\.weight", _NUMBERED_PROJECTIONS),
    ):
        matched = re.fullmatch(pattern, key)
        if matched is None or matched["name"] not in projections:
            continue
        experts, index, name = matched["experts"], int(matched["index"]), matched["name"]
        parameter, part = projections[name]
        if f"{experts}.{parameter}" in known:
            return ExpertPlace(experts, index, name, parameter, part)
        if part == 1 and f"{experts}.{name}" in known:  # experts without a gate
            return ExpertPlace(experts, index, name, name, 0)
    return None


def _unknown(model: Any, names: Sequence[str]) -> str:
    """Names that the model lacks, beside the names of its own that are nearest."""
    own = [name for name, _ in model.named_modules()]
    nearest = get_close_matches(names[0], own, 1, 0.0)
    beside = f"; the nearest module to {names[0]} is {nearest[0]}" if nearest else ""
    return f"{type(model).__name__} has no module for {listed(names)}{beside}"
