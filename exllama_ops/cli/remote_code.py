"""Code of a model's repository, which runs only where --trust-remote-code is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def own_code(path: Path) -> str:
    """Where the configs of a directory name classes of its own, and which; empty if nowhere."""
    from exllama_ops.checkpoint.disk import list_directory, read_json

    named = []
    for name in list_directory(path):
        auto_map = read_json(path / name).get("auto_map") if name in _CONFIGS else None
        if isinstance(auto_map, (dict, list)) and auto_map:
            named.append(f"auto_map of {name}: {', '.join(_classes(auto_map))}")
    return "; ".join(named)


def _classes(auto_map: dict[str, Any] | list[Any]) -> list[str]:
    values = auto_map.values() if isinstance(auto_map, dict) else auto_map
    return [str(name) for value in values for name in (value if isinstance(value, list) else [value]) if name]
