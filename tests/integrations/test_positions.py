"""What configs say of positions, by any of the names that they have."""

from __future__ import annotations

from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')

from exllama_ops.integrations.positions import (  # noqa: E402 (it needs transformers)
    largest_window,
    position_limit,
    turning_point,
)


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("Llama", {"max_position_embeddings": 77}, 77),
        ("GPT2", {"n_positions": 78}, 78),
        ("GPTJ", {"n_positions": 79}, 79),
        ("Mpt", {"max_seq_len": 80}, 80),
        ("PreTrained", {"n_ctx": 81}, 81),
        ("Bloom", {}, None),
        ("Mamba", {}, None),
        ("Gemma3", {"text_config": {"max_position_embeddings": 82}}, 82),
    ],
)
def test_the_position_limit_is_found_by_any_name(kind: str, fields: dict[str, Any], expected: int | None) -> None:
    assert position_limit(getattr(transformers, f"{kind}Config")(**fields)) == expected


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("GPTNeo", {"window_size": 300}, 300),
        ("Mistral", {"sliding_window": 301}, 301),
        ("Mistral", {"sliding_window": None}, 0),
        ("Llama4Text", {"attention_chunk_size": 302}, 302),
        ("ModernBertDecoder", {"local_attention": 303}, 303),
        ("Gemma3", {"text_config": {"sliding_window": 304}}, 304),
        ("Llama", {"attention": {"blocks": [{"window": 305}, {"window": 9}]}}, 0),
        ("Llama", {"attention": {"windows": [306, 9]}}, 306),
    ],
)
def test_windows_are_found_by_name_at_any_depth(kind: str, fields: dict[str, Any], expected: int) -> None:
    config = getattr(transformers, f"{kind}Config")(**fields)
    assert largest_window(config) == expected


def test_positions_turn_where_longrope_changes_its_factors() -> None:
    factors = {"long_factor": [4.0] * 48, "short_factor": [1.0] * 48}
    rotary = {"rope_type": "longrope", "rope_theta": 1e4, **factors, "original_max_position_embeddings": 16}
    config = transformers.Phi3Config(rope_parameters=rotary, original_max_position_embeddings=16)
    assert turning_point(config) == 16
    assert turning_point(transformers.LlamaConfig()) is None
