"""Weights that are made when they are asked for."""

from __future__ import annotations

import pytest
import torch

from exllama_ops.layout.lazy import LazyWeights
from exllama_ops.layout.weight import GptqWeight
from exllama_ops.nn import quantize


def test_weights_are_made_on_each_access_and_of_known_names_alone() -> None:
    made: list[str] = []

    def make(name: str) -> GptqWeight:
        made.append(name)
        return quantize(torch.zeros(32, 32), 4, 32)

    weights = LazyWeights(iter(["b", "a", "b"]), make)
    assert (list(weights), len(weights), "a" in weights, "c" in weights) == (["b", "a"], 2, True, False)
    assert made == []
    assert weights["a"] is not weights["a"]
    assert dict(weights.items()).keys() == {"a", "b"}
    assert made == ["a", "a", "b", "a"]
    with pytest.raises(KeyError, match="c"):
        weights["c"]
