"""Filled weights in the contracts: shapes without data, values that are refused, gradients, transforms, graphs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from conformance.weights import Case, build
from exllama_ops import reference
from exllama_ops.compile.decompositions import decompositions
from exllama_ops.testing.bounds import gamma, sum_bound
from ops.sample import SAMPLES, op
from ops.test_errors import run_meta, run_op, run_reference

CASE = Case(4, 40, 32, 16, "filled")
ROWS = build(CASE).rows
OF_WEIGHTS = sorted(name for name in SAMPLES if "shuffle" not in name and "." not in name)


def order_of(name: str, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, str]:
    """The two lists of a filled weight, or of the first of several experts, and what errors call them."""
    g_idx = arguments[3 if name == "gptq_dequantize" else 4]
    return (g_idx[0], "g_idx[0]") if g_idx.dim() == 2 else (g_idx, "g_idx")


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_opcheck(name: str) -> None:
    arguments = SAMPLES[name](CASE, torch.float32)
    if name != "gptq_dequantize":
        arguments[0].requires_grad_()
    torch.library.opcheck(op(name).default, arguments)


@pytest.mark.parametrize("run", [run_reference, run_op])
@pytest.mark.parametrize("name", OF_WEIGHTS)
@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, 40, f"have values in [-1, 40) for the {ROWS} rows of qweight; got 40 at index 0"),
        (3, -2, f"have values in [-1, 40) for the {ROWS} rows of qweight; got -2 at index 3"),
        (ROWS + 7, ROWS, f"say at index {ROWS + 7} where 7 stands among its first {ROWS} values; got {ROWS}"),
        (ROWS, -1, f"say at index {ROWS} where 0 stands among its first {ROWS} values; got -1"),
    ],
)
def test_values_that_lead_outside_are_refused_on_the_cpu(
    run: Callable[..., None], name: str, at: int, value: int, text: str
) -> None:
    arguments = SAMPLES[name](CASE, torch.float32)
    order, argument = order_of(name, arguments)
    order[at] = value
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}: {argument} must {text}')}$"):
        run(name, *arguments)


@pytest.mark.parametrize("run", [run_reference, run_op])
@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_lists_that_do_not_agree_are_refused_on_the_cpu(run: Callable[..., None], name: str) -> None:
    arguments = SAMPLES[name](CASE, torch.float32)
    order, argument = order_of(name, arguments)
    fill, place = int((order[:ROWS] == -1).nonzero()[0]), int(order[ROWS + 5])
    order[fill] = 5
    message = f"{name}: {argument} must name a row of W once; got 5 at index {place} and at index {fill}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run(name, *arguments)
    order[place] = -1
    message = (
        f"{name}: {argument} must say at index {ROWS + 5} where 5 stands among its first {ROWS} values; got {place}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run(name, *arguments)


def test_the_sizes_of_results_need_no_data() -> None:
    for name, shape in (("gptq_gemm", (3, 32)), ("gptq_gemm_dx", (3, 40)), ("gptq_dequantize", (40, 32))):
        arguments = SAMPLES[name](CASE, torch.float32)
        run_meta(name, *arguments)
        on_meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in arguments]
        assert op(name)(*on_meta).shape == shape


def test_the_gradient_is_grad_times_the_transposed_weight() -> None:
    x, *weight = SAMPLES["gptq_gemm"](CASE, torch.float32)
    x.requires_grad_()
    grad = torch.randn(3, 32)
    dx = torch.autograd.grad(torch.ops.exllama.gptq_gemm(x, *weight), x, grad, create_graph=True)[0]
    W = build(CASE).dense
    bound = sum_bound(grad.double(), W.t(), gamma(32 + 2))  # sums of 32 products, whose weights round once
    assert ((dx.double() - grad.double() @ W.t()).abs() <= bound).all()


def test_vmap_and_decompositions_give_the_same() -> None:
    x, *weight = SAMPLES["gptq_gemm"](CASE, torch.float32)
    batched = torch.func.vmap(lambda rows: torch.ops.exllama.gptq_gemm(rows, *weight))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(batched[1], torch.ops.exllama.gptq_gemm(2 * x, *weight))

    class Product(torch.nn.Module):
        def forward(self, x: torch.Tensor, *weight: Any) -> Any:
            options = (True, CASE.bits, CASE.v2, CASE.group_size)
            return (
                torch.ops.exllama.gptq_gemm(x, *weight, *options),
                torch.ops.exllama.gptq_dequantize(*weight, *options),
            )

    program = torch.export.export(Product(), (x, *weight[:4])).run_decompositions(decompositions())
    product, W = program.module()(x, *weight[:4])
    torch.testing.assert_close(product, reference.gptq_gemm(x, *weight))
    assert torch.equal(W, torch.ops.exllama.gptq_dequantize(*weight))


def test_a_compiled_product_is_the_eager_one() -> None:
    x, *weight = SAMPLES["gptq_gemm"](CASE, torch.float32)

    def product(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.exllama.gptq_gemm(x, *weight)

    compiled = torch.compile(product, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (3, 5):
        x = torch.randn(M, 40)
        assert torch.equal(compiled(x), product(x))
