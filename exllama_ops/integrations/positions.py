"""What a transformers config says of positions: how many there are, and the windows of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# What configs call the number of positions. Models that learn none have no such field, or no limit.
_LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "n_ctx",
    "max_sequence_length",
    "max_target_positions",
    "model_max_length",
)
# Parts of the names of how many positions a layer sees.
_WINDOWS = ("window", "chunk", "local")


def position_limit(config: Any) -> int | None:
    """The most positions that a config allows, by any of the names that configs have; None if it names none.

    Args:
        config: of transformers. Its attributes have the names of `attribute_map` too, which `to_dict` lacks.
    """
    for part in (config.get_text_config(decoder=True), config):
        for name in _LIMITS:
            limit = getattr(part, name, None)
            if isinstance(limit, int) and limit > 0:
                return limit
    return None


def largest_window(config: Any) -> int:
    """The largest number of positions that a config names as a window or chunk of some layer; 0 if it names none."""
    numbers = named_numbers(config.get_text_config(decoder=True).to_dict())
    return max((number for name, number in numbers if any(part in name for part in _WINDOWS)), default=0)


def turning_point(config: Any) -> int | None:
    """The most tokens before all positions are encoded anew, as "longrope" does it; None if that never happens.

    Keys that were cached before then belong to the encoding of short texts.
    """
    text = config.get_text_config(decoder=True)
    rotary = getattr(text, "rope_parameters", None) or {}
    by_layer = [value for value in rotary.values() if isinstance(value, Mapping)] or [rotary]
    lengths = [part.get("original_max_position_embeddings") for part in by_layer if part.get("rope_type") == "longrope"]
    return min((length for length in lengths if isinstance(length, int)), default=None)


def named_numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The whole numbers in a dictionary, and in those within it, each by the name of its field."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from named_numbers(value)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, int):
                yield str(name), number
