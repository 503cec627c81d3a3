"""torch.vmap: samples become rows of one call, and what an op knows no batches of is called for each sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sample import op
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.weights import Case, build, build_experts, build_parts, experts_args, multi_args
from exllama_ops import ops

PARTS = build_parts(Case(4, 96, 64, 32, "perm"), (64, 32))
# name -> the arguments after the first, and the columns of the first
LINEAR: dict[str, tuple[tuple[Any, ...], int]] = {
    "gptq_gemm": (PARTS[0].args, 96),
    "gptq_gemm.no_autograd": (PARTS[0].args, 96),
    "gptq_gemm_dx": (PARTS[0].args, 64),
    "gptq_gemm_dx.no_autograd": (PARTS[0].args, 64),
    "gptq_gemm_multi": (multi_args(PARTS), 96),
    "gptq_gemm_multi.no_autograd": (multi_args(PARTS), 96),
}


@pytest.fixture(autouse=True)
def no_loop_of_torch() -> Iterator[None]:
    """It is right but slow, and warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop")
        yield


class Calls(TorchDispatchMode):
    """Counts the calls of our ops."""

    count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += op.namespace == "exllama"
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", LINEAR)
def test_a_batch_of_activations_is_one_call(name: str, dim: int) -> None:
    weight, columns = LINEAR[name]
    x = torch.randn(4, 3, columns)
    with Calls() as calls:
        out = torch.vmap(lambda x: op(name)(x, *weight), in_dims=dim)(x.movedim(0, dim).contiguous())
    assert calls.count == 1
    assert torch.equal(out, torch.stack([op(name)(sample, *weight) for sample in x]))


@pytest.mark.parametrize(("name", "columns"), [("gptq_moe_gemm", 96), ("gptq_moe_gemm_dx", 64)])
def test_rows_of_experts_are_a_call_for_each_sample(name: str, columns: int) -> None:
    """The offsets count the rows of one sample. They may differ from sample to sample."""
    experts = build_experts(Case(4, 96, 64, 32, "perm"), 2)
    *stacks, offsets, use_exllama, bit, v2, group_size = experts_args(experts, [0, 1, 3])
    x, others = torch.randn(4, 3, columns), torch.stack([offsets, offsets - offsets, offsets.clamp(max=2), offsets])
    for dim, of_sample in ((None, [offsets] * 4), (0, others)):
        given = offsets if dim is None else others
        out = torch.vmap(
            lambda x, offsets: op(name)(x, *stacks, offsets, use_exllama, bit, v2, group_size), in_dims=(0, dim)
        )(x, given)
        each = [
            op(name)(one, *stacks, own, use_exllama, bit, v2, group_size) for one, own in zip(x, of_sample, strict=True)
        ]
        assert torch.equal(out, torch.stack(each))


@pytest.mark.parametrize("name", ["gptq_gemm", "gptq_gemm_dx", "gptq_gemm_multi"])
def test_the_functions_take_batches_too(name: str) -> None:
    weight, columns = LINEAR[name]
    x = torch.randn(4, 3, columns)
    out = torch.vmap(lambda x: getattr(ops, name)(x, *weight))(x)
    assert torch.equal(out, op(name)(x.flatten(0, 1), *weight).unflatten(0, (4, 3)))


@pytest.mark.parametrize("name", LINEAR)
def test_a_batch_of_batches_is_one_call(name: str) -> None:
    weight, columns = LINEAR[name]
    x = torch.randn(4, 2, 3, columns)
    with Calls() as calls:
        out = torch.vmap(torch.vmap(lambda x: op(name)(x, *weight)), in_dims=1, out_dims=1)(x)
    assert calls.count == 1
    assert torch.equal(out, op(name)(x.flatten(0, 2), *weight).unflatten(0, (4, 2, 3)))


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize(("samples", "tokens"), [(0, 3), (2, 0), (0, 0)])
def test_batches_may_be_empty(samples: int, tokens: int, name: str) -> None:
    weight, columns = LINEAR[name]
    out = torch.vmap(lambda x: op(name)(x, *weight))(torch.randn(samples, tokens, columns))
    assert out.shape == (samples, tokens, op(name)(torch.randn(1, columns), *weight).shape[1])


def test_a_batch_may_come_in_chunks() -> None:
    weight, columns = LINEAR["gptq_gemm"]
    x = torch.randn(5, 3, columns)
    with Calls() as calls:
        out = torch.vmap(lambda x: op("gptq_gemm")(x, *weight), chunk_size=2)(x)
    assert calls.count == 3
    assert torch.equal(out, op("gptq_gemm")(x.flatten(0, 1), *weight).unflatten(0, (5, 3)))


def test_a_sample_is_refused_for_what_it_is() -> None:
    weight, columns = LINEAR["gptq_gemm"]
    product = torch.vmap(lambda x: op("gptq_gemm")(x, *weight))
    for rows in (0, 4):
        with pytest.raises(ValueError, match=r"^gptq_gemm: x must have 2 dimensions; got 1$"):
            product(torch.randn(rows, columns))
    with pytest.raises(ValueError, match=r"^gptq_gemm: qweight must have shape"):
        product(torch.randn(4, 3, columns + 32))


def test_a_batch_has_gradients() -> None:
    weight, columns = LINEAR["gptq_gemm"]
    x, grad = torch.randn(4, 3, columns, requires_grad=True), torch.randn(4, 3, 64)
    out = torch.vmap(lambda x: op("gptq_gemm")(x, *weight))(x)
    (dx,) = torch.autograd.grad(out, x, grad)
    expected = op("gptq_gemm_dx")(grad.flatten(0, 1), *weight).view(4, 3, columns)
    assert torch.equal(dx, expected)
    each = torch.vmap(torch.func.grad(lambda x, grad: (op("gptq_gemm")(x, *weight) * grad).sum()))
    assert torch.equal(each(x.detach(), grad), expected)
    together = torch.func.grad(lambda x: (torch.vmap(lambda x: op("gptq_gemm")(x, *weight))(x) * grad).sum())
    assert torch.equal(together(x.detach()), expected)


# Weights of three models, stacked; and the options that they share.
MODELS = [build(Case(4, 96, 64, 32, "perm", seed=seed)) for seed in range(3)]
STACKED = [torch.stack([model.args[i] for model in MODELS]) for i in range(4)]
OPTIONS = MODELS[0].args[4:]


@pytest.mark.parametrize("dims", [(0, 0, 0, 0, 0), (1, 2, 1, 1, 1), (None, 0, 0, 0, 0), (0, None, 0, None, None)])
def test_a_batch_of_weights_is_a_call_for_each(dims: tuple[int | None, ...]) -> None:
    stacked = [torch.randn(3, 5, 96), *STACKED]
    args = [tensor[0] if dim is None else tensor.movedim(0, dim) for tensor, dim in zip(stacked, dims, strict=True)]
    out = torch.vmap(lambda *args: op("gptq_gemm")(*args, *OPTIONS), in_dims=dims)(*args)
    for i in range(3):
        sample = [tensor[0 if dim is None else i] for tensor, dim in zip(stacked, dims, strict=True)]
        assert torch.equal(out[i], op("gptq_gemm")(*sample, *OPTIONS))


def test_a_batch_of_no_weights_has_a_shape() -> None:
    args = [tensor[:0] for tensor in (torch.randn(3, 5, 96), *STACKED)]
    assert torch.vmap(lambda *args: op("gptq_gemm")(*args, *OPTIONS))(*args).shape == (0, 5, 64)


def test_parts_may_be_batched() -> None:
    x = torch.randn(5, 96)

    def product(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return op("gptq_gemm_multi")(x, [qweight] * 2, [qzeros] * 2, [scales] * 2, rows, *OPTIONS)

    out = torch.vmap(product)(*STACKED)
    assert torch.equal(out, torch.stack([product(*model.args[:4]) for model in MODELS]))


@pytest.mark.parametrize(
    ("name", "tensors", "options"),
    [("gptq_dequantize", STACKED, OPTIONS), ("gptq_unshuffle", [STACKED[0], STACKED[3]], (4,))],
)
def test_the_other_ops_are_called_for_each_sample(
    name: str, tensors: list[torch.Tensor], options: tuple[Any, ...]
) -> None:
    call: Callable[..., torch.Tensor] = lambda *tensors: op(name)(*tensors, *options)  # noqa: E731
    out = torch.vmap(call)(*tensors)
    assert torch.equal(out, torch.stack([call(*(tensor[i] for tensor in tensors)) for i in range(3)]))


def test_shuffling_a_batch_in_place_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"exllama::gptq_shuffle"):
        torch.vmap(lambda words, rows: op("gptq_shuffle")(words, rows, 4))(STACKED[0].clone(), STACKED[3])
