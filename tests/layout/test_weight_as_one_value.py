"""`Weight` and `Parts`: to an op's arguments and back, and what they say of a weight."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
import torch

from conformance.weights import Case, build, build_parts, multi_args
from exllama_ops import prepare, quantize, reference
from exllama_ops.layout.weight import Parts, Weight, from_op_arguments

K, N, GROUP = 96, 64, 32


def arguments(**changes: Any) -> dict[str, Any]:
    names = inspect.signature(Weight.of).parameters
    return {**dict(zip(names, build(Case(4, K, N, GROUP, "perm")).args, strict=True)), **changes}


def none() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int32)


@pytest.mark.parametrize("use_v2_format", [False, True])
@pytest.mark.parametrize("use_exllama", [False, True])
def test_arguments_are_the_inverse_of_of(use_exllama: bool, use_v2_format: bool) -> None:
    given = arguments(use_exllama=use_exllama, use_v2_format=use_v2_format)
    weight = Weight.of(**given)
    assert weight.zero_offset == (0 if use_v2_format else 1)
    assert len(weight.arguments) == len(given)
    for value, expected in zip(weight.arguments, given.values(), strict=True):
        assert value is expected


def test_the_tensors_of_a_weight_are_the_tensors_of_the_schema_in_their_order() -> None:
    schema = torch.ops.exllama.gptq_dequantize.default._schema.arguments
    tensors = [argument.name for argument in schema if "Tensor" in str(argument.type)]
    assert ["g_idx" if name == "row_order" else name for name in Weight.TENSORS] == tensors
    assert tensors == [argument.name for argument in schema][: len(tensors)]


def test_sizes_and_order_of_a_shuffled_weight() -> None:
    weight = Weight.of(**arguments())
    assert (weight.K, weight.N, weight.G, weight.rows_per_group) == (K, N, K // GROUP, GROUP)
    assert weight.perm is weight.row_order
    assert weight.g_idx is None
    assert weight.row_groups().tolist() == [k // GROUP for k in range(K)]
    assert Weight.of(**arguments(g_idx=none())).perm is None


def test_sizes_and_order_of_a_weight_with_a_raw_g_idx() -> None:
    groups = torch.randint(3, (K,), dtype=torch.int32)
    weight = Weight.of(**arguments(use_exllama=False, g_idx=groups))
    assert weight.perm is None
    assert weight.g_idx is groups
    assert weight.row_groups() is groups
    assert Weight.of(**arguments(use_exllama=False, g_idx=none())).g_idx is None


@pytest.mark.parametrize(("group_size", "rows"), [(0, 32), (32, 32), (40, 40), (10**9, K)])
def test_rows_per_group_are_at_most_those_of_the_weight(group_size: int, rows: int) -> None:
    assert Weight.of(**arguments(group_size=group_size)).rows_per_group == rows


def test_rows_per_group_are_at_least_one_where_a_raw_g_idx_has_more_groups_than_rows() -> None:
    scales = torch.ones(2 * K, N)
    assert Weight.of(**arguments(use_exllama=False, scales=scales, group_size=0)).rows_per_group == 1


def test_a_function_of_a_weight_is_called_as_an_op_is() -> None:
    given, x = arguments(), torch.ones(1, K)

    @from_op_arguments(Weight)
    def seen(x: torch.Tensor, weight: Weight) -> tuple[Any, ...]:
        return (x, *weight.arguments)

    positional = seen(x, *given.values())
    for result in (seen(x=x, **given), seen(x, **given), seen(**{**dict(reversed(given.items())), "x": x})):
        assert all(a is b for a, b in zip(result, positional, strict=True))
    assert seen(x, *list(given.values())[:6])[-2:] == (False, 0)
    with pytest.raises(TypeError, match="missing a required argument: 'bit'"):
        seen(x=x, **{name: value for name, value in given.items() if name != "bit"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'bits'"):
        seen(x, *given.values(), bits=4)
    assert list(inspect.signature(seen).parameters) == ["x", *given]


def test_parts_are_the_weights_of_a_gptq_gemm_multi() -> None:
    built = build_parts(Case(4, K, N, GROUP, "perm"), (64, 32))
    parts = Parts.of(*multi_args(built))
    assert parts.lengths == (2, 2, 2)
    for weight, part in zip(parts.weights, built, strict=True):
        assert all(a is b for a, b in zip(weight.arguments, (*part.args[:3], built[0].row_order), strict=False))
        assert weight.options == Weight.of(*part.args).options


@pytest.mark.parametrize("g_idx", [None, torch.arange(K, dtype=torch.int32) % 3])
def test_a_packed_weight_and_a_checkpoint_s_are_weights_of_ops(g_idx: torch.Tensor | None) -> None:
    checkpoint = quantize(torch.randn(N, K), 4, GROUP, g_idx=g_idx)
    W = reference.gptq_dequantize(*checkpoint.weight.arguments)
    assert torch.equal(reference.gptq_dequantize(*prepare(checkpoint).weight.arguments), W)


def test_a_weight_can_be_mapped_and_pickled() -> None:
    weight = Weight.of(**arguments())
    assert [tensor.device.type for tensor in weight.map(lambda tensor: tensor.to("meta")).tensors] == ["meta"] * 4
    loaded = pickle.loads(pickle.dumps(weight))
    assert all(torch.equal(a, b) for a, b in zip(loaded.tensors, weight.tensors, strict=True))
    assert loaded.options == weight.options
