"""The gradient with respect to x, and that nothing else gets one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from conformance.bounds import assert_within_bound, gamma
from conformance.weights import DTYPES, Case, build, build_parts, multi_args
from exllama_ops import gptq_gemm

CASES = [
    Case(bits, 96, 64, 40, order, shuffled)
    for bits in (2, 3, 4, 8)
    for order, shuffled in [("sorted", True), ("perm", True), ("raw", False)]
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_of_x_is_grad_times_W_transposed(case: Case, dtype: torch.dtype) -> None:
    weight = build(case)
    x = torch.randn(5, case.K).to(dtype).requires_grad_()
    grad = torch.randn(5, case.N).to(dtype)
    torch.ops.exllama.gptq_gemm(x, *weight.args).backward(grad)
    assert x.grad is not None
    assert_within_bound(x.grad, grad, weight.dense.t(), gamma(grad.shape[1] + 3))


@pytest.mark.parametrize("expand", [lambda out: out.sum(), lambda out: (out.t() * torch.arange(5.0)).sum()])
def test_expanded_and_transposed_gradients_are_accepted(expand: object) -> None:
    weight = build(CASES[0])
    x = torch.randn(5, 96, requires_grad=True)
    expand(torch.ops.exllama.gptq_gemm(x, *weight.args)).backward()  # type: ignore[operator]
    expected = torch.randn(5, 96, requires_grad=True)
    expand(expected @ weight.dense.float()).backward()  # type: ignore[operator]
    torch.testing.assert_close(x.grad, expected.grad)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_of_multi_is_that_of_its_parts_added_up(case: Case) -> None:
    parts = build_parts(case, (64, 128, 32))
    x = torch.randn(5, case.K, requires_grad=True)
    grad = torch.randn(224, 5).t()
    torch.ops.exllama.gptq_gemm_multi(x, *multi_args(parts)).backward(grad)
    assert x.grad is not None
    dense = torch.cat([part.dense for part in parts], 1)
    # Each part's gradient is rounded to float32, and so are the two sums.
    assert_within_bound(x.grad, grad.contiguous(), dense.t(), gamma(128 + 3 + 3))


def test_multi_has_second_derivatives_and_tangents() -> None:
    parts = build_parts(CASES[1], (64, 32))
    dense = torch.cat([part.dense for part in parts], 1)
    x, tangent = torch.randn(3, 96, requires_grad=True), torch.randn(96, 3).t()
    out = torch.ops.exllama.gptq_gemm_multi(x, *multi_args(parts))
    grad = torch.randn(3, 96, requires_grad=True)
    (dx,) = torch.autograd.grad(out, x, grad, create_graph=True)
    (d_grad,) = torch.autograd.grad(dx, grad, tangent)
    assert_within_bound(d_grad, tangent.contiguous(), dense, gamma(96 + 3))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), tangent)
        result = torch.autograd.forward_ad.unpack_dual(torch.ops.exllama.gptq_gemm_multi(dual, *multi_args(parts)))
    assert result.tangent is not None
    assert_within_bound(result.tangent, tangent.contiguous(), dense, gamma(96 + 3))


def test_second_derivatives_exist() -> None:
    """gptq_gemm_dx is differentiable too: its adjoint is gptq_gemm."""
    weight = build(CASES[0])
    x = torch.randn(3, 96, requires_grad=True)
    out = torch.ops.exllama.gptq_gemm(x, *weight.args)
    grad = torch.randn(3, 64, requires_grad=True)
    (dx,) = torch.autograd.grad(out, x, grad, create_graph=True)
    direction = torch.randn(3, 96)
    (d_grad,) = torch.autograd.grad(dx, grad, direction)
    assert_within_bound(d_grad, direction, weight.dense, gamma(direction.shape[1] + 3))


FORMS = pytest.mark.parametrize("gemm", [torch.ops.exllama.gptq_gemm, gptq_gemm], ids=["op", "function"])


@FORMS
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_maps_a_tangent_of_x_by_the_same_product(gemm: Callable[..., torch.Tensor], grad: bool) -> None:
    weight = build(CASES[1])
    x, tangent = torch.randn(3, 96), torch.randn(96, 3).t()
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(grad):
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        out = gemm(dual, *weight.args)
        result = torch.autograd.forward_ad.unpack_dual(out).tangent
    assert result is not None
    assert_within_bound(result, tangent.contiguous(), weight.dense, gamma(tangent.shape[1] + 3))


@FORMS
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        # Inside of vmap, x does not say that it requires a gradient.
        lambda f, x: torch.func.grad(lambda x: torch.func.vmap(lambda row: f(row[None]))(x).sum())(x),
    ],
)
def test_gradient_transforms_are_refused_rather_than_wrong(
    transform: Callable[..., Any], gemm: Callable[..., torch.Tensor]
) -> None:
    weight = build(CASES[0])
    with pytest.raises(NotImplementedError, match=r"^gptq_gemm: the gradient transforms of torch.func"):
        transform(lambda x: gemm(x, *weight.args), torch.randn(3, 96))


@FORMS
def test_vmap_without_gradients_loops_over_the_op(gemm: Callable[..., torch.Tensor]) -> None:
    weight = build(CASES[0])
    x = torch.randn(2, 3, 96)
    out = torch.func.vmap(lambda x: gemm(x, *weight.args))(x)
    assert torch.equal(out[1], gemm(x[1], *weight.args))


def test_the_function_spares_itself_an_autograd_kernel_that_would_only_pass_the_call_on() -> None:
    args = build(CASES[0]).args
    x = torch.randn(3, 96, requires_grad=True)

    def called(x: torch.Tensor) -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out = gptq_gemm(x, *args)
        assert torch.equal(out, torch.ops.exllama.gptq_gemm(x, *args))
        assert out.requires_grad == (x.requires_grad and torch.is_grad_enabled())
        return {event.key for event in profile.key_averages() if event.key.startswith("exllama::")}

    assert called(x) == {"exllama::gptq_gemm", "exllama::_gptq_gemm"}
    assert called(x.detach()) == {"exllama::_gptq_gemm"}
    with torch.no_grad():
        assert called(x) == {"exllama::_gptq_gemm"}


def test_no_graph_is_built_where_none_is_asked_for() -> None:
    args = build(CASES[0]).args
    x = torch.randn(3, 96, requires_grad=True)
    assert torch.ops.exllama.gptq_gemm(x, *args).requires_grad
    assert not torch.ops.exllama.gptq_gemm(x.detach(), *args).requires_grad
    with torch.no_grad():
        assert not torch.ops.exllama.gptq_gemm(x, *args).requires_grad
    with torch.inference_mode():
        assert torch.ops.exllama.gptq_gemm(x, *args).is_inference()


def test_scales_get_no_gradient() -> None:
    qweight, qzeros, scales, rows, *options = build(CASES[0]).args
    scales.requires_grad_()
    assert not torch.ops.exllama.gptq_dequantize(qweight, qzeros, scales, rows, *options).requires_grad
    x = torch.randn(3, 96, requires_grad=True)
    torch.ops.exllama.gptq_gemm(x, qweight, qzeros, scales, rows, *options).sum().backward()
    assert scales.grad is None


def test_lora_over_a_frozen_base_learns() -> None:
    """The use of it: adapters before and after a quantized layer train through it."""
    torch.manual_seed(0)
    weight = build(CASES[0])
    target = torch.randn(16, 64)
    x = torch.randn(16, 96)
    down, up = torch.nn.Linear(96, 4, bias=False), torch.nn.Linear(4, 96, bias=False)
    optimizer = torch.optim.Adam([*down.parameters(), *up.parameters()], 0.02)
    losses = []
    for _ in range(40):
        out = torch.ops.exllama.gptq_gemm(x + up(down(x)), *weight.args)
        loss = (out - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_compiled_gradient_equals_eager_gradient() -> None:
    weight = build(CASES[1])
    eager = torch.randn(5, 96, requires_grad=True)
    compiled = eager.detach().clone().requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.exllama.gptq_gemm(x * 2, *weight.args).square().sum()

    loss(eager).backward()
    torch.compile(loss, fullgraph=True)(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_shuffle_bumps_the_version_whatever_its_kernel_does() -> None:
    """On the meta device no kernel writes: what counts there is the op's own bump."""
    qweight = torch.zeros(12, 64, dtype=torch.int32, device="meta")
    torch.ops.exllama.gptq_shuffle(qweight, torch.empty(0, dtype=torch.int32, device="meta"), 4)
    assert qweight._version == 1


def test_shuffle_counts_as_a_write() -> None:
    """Autograd refuses to use a saved weight that was shuffled in between."""
    weight = build(Case(4, 96, 64, 32, shuffled=False))
    x = torch.randn(3, 96, requires_grad=True)
    out = torch.ops.exllama.gptq_gemm(x, *weight.args)
    torch.ops.exllama.gptq_shuffle(weight.qweight, weight.rows, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
