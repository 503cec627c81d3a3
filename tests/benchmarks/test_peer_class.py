"""Peers whose names say one thing and whose products another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case, Weight
from benchmarks.devices.cpu import Cpu
from benchmarks.peer_class import class_of, probe
from benchmarks.peers.peer import Layer, Peer, Unsupported
from benchmarks.plan import Budget, Plan

CASE = Case(256, 128)
LIMITS = {"dram": 1e10, "float": 1e11, "int16": 1e11, "int8": 1e11}


def rounded(x: Tensor, size: int) -> Tensor:
    """Activations as bytes, with a scale for each group of so many."""
    groups = x.float().unflatten(1, (-1, size))
    scales = groups.abs().amax(2, keepdim=True) / 127
    return ((groups / scales).round() * scales).flatten(1)


@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_known_in_every_dtype(M: int, dtype: torch.dtype) -> None:
    x, dense = probe(M, CASE.K), Weight(CASE).dense
    assert class_of(x.to(dtype) @ dense.to(dtype), x, dense) == "float"


@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("size", [32, 128, 256])
def test_bytes_are_known_in_groups_of_any_size(M: int, size: int) -> None:
    x, dense = probe(M, CASE.K), Weight(CASE).dense
    assert class_of((rounded(x, size) @ dense).half(), x, dense) == "int8"


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_the_product_of_another_weight_has_no_class(factor: float) -> None:
    x, dense = probe(4, CASE.K), Weight(CASE).dense
    with pytest.raises(Unsupported, match="something else"):
        class_of(x.float() @ (factor * dense), x, dense)


def test_a_peer_has_the_class_that_it_computes_for_each_number_of_tokens() -> None:
    def prepare(weight: Weight, threads: int) -> Layer:
        def run(x: Tensor) -> Tensor:
            return (x if x.shape[0] == 1 else rounded(x, 64)) @ weight.dense

        return Layer(take=Tensor.float, run=run, give=lambda out: out, nbytes=weight.dense.nbytes)

    plan = Plan(CASE, (1, 4), [Peer("labelled int8", prepare)], device=Cpu(1), say=lambda line: None)
    found = [m.find("labelled int8") for m in plan.measurements(lambda: LIMITS, Budget(0.0, 1))]
    assert [kernel.kind for kernel in found if kernel is not None] == ["float", "int8"]
