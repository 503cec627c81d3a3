"""The gradient with respect to x, and that nothing else gets one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from conformance.weights import DTYPES, Case, build, build_experts, build_parts, experts_args, multi_args
from exllama_ops import gptq_gemm
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.testing.bounds import assert_within_bound, gamma

CASES = [
    Case(bits, 96, 64, 40, order, shuffled)
    for bits in SUPPORTED_BITS
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


# Gradients of shape (rows, columns) as autograd and its users make them.
GRADIENTS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "expanded": lambda rows, columns: torch.randn(1, 1).expand(rows, columns),
    "transposed": lambda rows, columns: torch.randn(columns, rows).t(),
    "every other column": lambda rows, columns: torch.randn(rows, 2 * columns)[:, ::2],
    "negative": lambda rows, columns: torch.randn(rows, columns, dtype=torch.complex64).conj().imag,
    "sparse": lambda rows, columns: torch.randn(rows, columns).to_sparse(),
    "zeros without memory": lambda rows, columns: torch._efficientzerotensor((rows, columns)),
    "transposed zeros without memory": lambda rows, columns: torch._efficientzerotensor((columns, rows)).t(),
}


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in memory of its own, dense and contiguous."""
    return torch.zeros(tensor.shape) + tensor


def linear_ops() -> dict[str, tuple[Callable[..., torch.Tensor], tuple[Any, ...], int, int]]:
    """Each op that is linear in its first argument, with the others; columns of the argument and of the result."""
    parts = build_parts(CASES[1], (64, 32))
    one, many = parts[0].args, multi_args(parts)
    experts = experts_args(build_experts(CASES[1], 2), [0, 2, 5])
    exllama = torch.ops.exllama
    return {
        "gptq_gemm": (exllama.gptq_gemm, one, 96, 64),
        "gptq_gemm_dx": (exllama.gptq_gemm_dx, one, 64, 96),
        "gptq_gemm_multi": (exllama.gptq_gemm_multi, many, 96, 96),
        "gptq_moe_gemm": (exllama.gptq_moe_gemm, experts, 96, 64),
        "gptq_moe_gemm_dx": (exllama.gptq_moe_gemm_dx, experts, 64, 96),
        "the function": (gptq_gemm, one, 96, 64),
    }


LINEAR = pytest.mark.parametrize("name", linear_ops())


@LINEAR
@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_of_any_form_have_the_results_of_plain_ones(kind: str, name: str) -> None:
    op, weight, K, N = linear_ops()[name]
    x, grad = torch.randn(5, K, requires_grad=True), GRADIENTS[kind](5, N)
    (dx,) = torch.autograd.grad(op(x, *weight), x, grad)
    (expected,) = torch.autograd.grad(op(x, *weight), x, plain(grad))
    assert torch.equal(dx, expected)


@LINEAR
def test_activations_may_be_zeros_without_memory(name: str) -> None:
    op, weight, K, N = linear_ops()[name]
    x = torch._efficientzerotensor((5, K))
    assert torch.equal(op(x, *weight), torch.zeros(5, N))
    assert op(x.requires_grad_(), *weight).requires_grad
    with torch.inference_mode():
        assert torch.equal(op(torch._efficientzerotensor((5, K)), *weight), torch.zeros(5, N))
    with pytest.raises(ValueError, match="must have shape"):
        op(torch._efficientzerotensor((5, K + 32)), *weight)


@LINEAR
def test_zeros_without_memory_pass_second_derivatives_and_compiled_gradients(name: str) -> None:
    op, weight, K, N = linear_ops()[name]
    x, zeros = torch.randn(5, K, requires_grad=True), torch._efficientzerotensor((5, N)).requires_grad_()
    (dx,) = torch.autograd.grad(op(x, *weight), x, zeros, create_graph=True)
    (d_zeros,) = torch.autograd.grad(dx, zeros, torch._efficientzerotensor((5, K)))
    assert torch.equal(d_zeros, torch.zeros(5, N))
    out = torch.compile(lambda x: op(x, *weight), backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(torch.autograd.grad(out, x, zeros)[0], torch.zeros(5, K))


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


def test_the_gradient_of_experts_is_that_of_each_ones_rows() -> None:
    experts = build_experts(CASES[1], 3)
    offsets = [1, 3, 3, 6]
    x, grad = torch.randn(7, 96, requires_grad=True), torch.randn(7, 64)
    torch.ops.exllama.gptq_moe_gemm(x, *experts_args(experts, offsets)).backward(grad)
    assert x.grad is not None
    assert not x.grad[[0, 6]].any()
    for expert, start, stop in zip(experts, offsets, offsets[1:], strict=False):
        assert_within_bound(x.grad[start:stop], grad[start:stop], expert.dense.t(), gamma(64 + 3))


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


def hessian_times(op: Callable[..., torch.Tensor], t: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor:
    """The Hessian of the sum of the squares of op(x), times t."""
    return torch.ops.exllama.gptq_gemm_dx(2 * op(t, *args), *args)


@FORMS
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "jvp", "jacfwd", "grad of grad", "jvp of grad"])
def test_gradient_transforms_call_the_ops_that_autograd_calls(
    transform: str, backend: str | None, gemm: Callable[..., torch.Tensor]
) -> None:
    args = build(CASES[1]).args
    x, t = torch.randn(3, 96), torch.randn(3, 96)
    dx = torch.ops.exllama.gptq_gemm_dx

    def f(x: torch.Tensor) -> torch.Tensor:
        return gemm(x, *args)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return f(x).square().sum()

    func = torch.func
    forms: dict[str, Callable[[torch.Tensor], Any]] = {
        "grad": func.grad(loss),
        "vjp": lambda x: func.vjp(f, x)[1](f(t))[0],
        "jacrev": func.jacrev(lambda x: f(x).sum(0)),
        "jvp": lambda x: func.jvp(f, (x,), (t,))[1],
        "jacfwd": lambda x: func.jacfwd(lambda s: f(s * t))(x[0, 0]),
        "grad of grad": func.grad(lambda x: (func.grad(loss)(x) * t).sum()),
        "jvp of grad": lambda x: func.jvp(func.grad(loss), (x,), (t,))[1],
    }
    identity = dx(torch.eye(64), *args)
    expected = {
        "grad": dx(2 * f(x), *args),
        "vjp": dx(f(t), *args),
        "jacrev": identity[:, None].expand(64, 3, 96),
        "jvp": f(t),
        "jacfwd": f(t),
        "grad of grad": hessian_times(gemm, t, args),
        "jvp of grad": hessian_times(gemm, t, args),
    }
    function = forms[transform]
    if backend:
        torch._dynamo.reset()
        function = torch.compile(function, backend=backend, fullgraph=True)
    assert torch.equal(function(x), expected[transform])


@FORMS
def test_tangents_of_tangents_are_kept(gemm: Callable[..., torch.Tensor]) -> None:
    args = build(CASES[1]).args
    x, t = torch.randn(3, 96), torch.randn(3, 96)

    def tangent(f: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: torch.func.jvp(f, (x,), (t,))[1]

    second = tangent(tangent(lambda x: gemm(x, *args).square()))(x)
    assert torch.equal(second, 2 * gemm(t, *args).square())


@FORMS
def test_gradient_transforms_obey_no_grad(gemm: Callable[..., torch.Tensor]) -> None:
    args = build(CASES[1]).args
    x = torch.randn(3, 96)
    inside = torch.func.grad(lambda x: (gemm(x, *args) * torch.no_grad()(gemm)(x, *args)).sum())
    assert torch.equal(inside(x), torch.ops.exllama.gptq_gemm_dx(gemm(x, *args), *args))
    with torch.no_grad():
        assert torch.func.grad(lambda x: gemm(x, *args).sum())(x).abs().sum() > 0


@FORMS
def test_a_tangent_may_have_a_gradient_itself(gemm: Callable[..., torch.Tensor]) -> None:
    args = build(CASES[1]).args
    tangent, grad = torch.randn(3, 96, requires_grad=True), torch.randn(3, 64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(3, 96), tangent)
        result = torch.autograd.forward_ad.unpack_dual(gemm(dual, *args)).tangent
    assert result is not None
    (d_tangent,) = torch.autograd.grad(result, tangent, grad)
    assert torch.equal(d_tangent, torch.ops.exllama.gptq_gemm_dx(grad, *args))


@FORMS
def test_compiled_forward_mode_keeps_the_tangent(gemm: Callable[..., torch.Tensor]) -> None:
    """Compiled code enters the level past Python, whose counter stays as it was."""
    args = build(CASES[1]).args
    forward_ad = torch.autograd.forward_ad

    def tangent_of(x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(gemm(forward_ad.make_dual(x, tangent), *args)).tangent

    x, tangent = torch.randn(3, 96), torch.randn(3, 96)
    result = torch.compile(tangent_of, backend="aot_eager")(x, tangent)
    assert result is not None
    assert torch.equal(result, gemm(tangent, *args))


def test_profiles_name_the_op_and_the_function_spares_it_an_autograd_kernel_that_would_do_nothing() -> None:
    args = build(CASES[0]).args
    x = torch.randn(3, 96, requires_grad=True)

    def called(x: torch.Tensor) -> list[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out = gptq_gemm(x, *args)
        assert torch.equal(out, torch.ops.exllama.gptq_gemm(x, *args))
        assert out.requires_grad == (x.requires_grad and torch.is_grad_enabled())
        return [event.name for event in profile.events() if "gptq" in event.name]

    assert called(x) == ["exllama::gptq_gemm"] * 2
    assert called(x.detach()) == ["exllama::gptq_gemm"]
    with torch.no_grad():
        assert called(x) == ["exllama::gptq_gemm"]


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


@LINEAR
def test_compiled_autograd_calls_what_autograd_calls(name: str) -> None:
    op, weight, K, N = linear_ops()[name]
    x, grad = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    (expected,) = torch.autograd.grad(op(x, *weight), x, grad)
    out = op(x, *weight)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        out.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


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
    torch.ops.exllama.gptq_shuffle(weight.qweight, weight.row_order, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
