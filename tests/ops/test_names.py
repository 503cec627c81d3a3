"""What errors, modes and selective checkpointing call an op by: the name that its user called."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sample import SAMPLES, op
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from conformance.weights import Case, build_parts, multi_args
from exllama_ops import OPS_TO_SAVE, ExllamaLinear, gptq_gemm, ops, quantize
from exllama_ops.ops import _library

CASE = Case(4, 96, 64, 32, "perm")
PUBLIC = [name for name in SAMPLES if name == _library.op_of(name)]


def test_an_op_has_one_overload_for_its_users() -> None:
    assert {name: op(name).overloads() for name in PUBLIC} == {name: ["default"] for name in PUBLIC}


@pytest.mark.parametrize("position", [0, 6])
def test_an_argument_of_a_wrong_type_is_refused_once(position: int) -> None:
    """torch lists every overload that it tries, with all that is wrong with it."""
    args = list(SAMPLES["gptq_gemm"](CASE, torch.float32))
    args[position] = "no such value"
    name = ("x", "bit")[position > 0]
    rule = rf"^exllama::gptq_gemm\(\) Expected a value of type '\w+' for argument '{name}' but instead found type 'str'"
    for gemm in (torch.ops.exllama.gptq_gemm, gptq_gemm):
        with pytest.raises(RuntimeError, match=rule) as error:
            gemm(*args)
        assert str(error.value).count("Declaration") == 1


# What torch has beside dense tensors -> the text of the refusal.
OTHER_LAYOUTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "COO": (lambda tensor: tensor.to_sparse(), "layout torch.sparse_coo"),
    "CSR": (lambda tensor: tensor.to_sparse_csr(), "layout torch.sparse_csr"),
    "CSC": (lambda tensor: tensor.to_sparse_csc(), "layout torch.sparse_csc"),
    "BSR": (lambda tensor: tensor.to_sparse_bsr((1, 1)), "layout torch.sparse_bsr"),
    "mkldnn": (lambda tensor: tensor.float().to_mkldnn(), "layout torch._mkldnn"),
    "quantized": (lambda tensor: torch.quantize_per_tensor(tensor.float(), 1, 0, torch.qint8), "dtype torch.qint8"),
    "nested": (lambda tensor: torch.nested.nested_tensor([tensor, tensor]), "a nested one"),
    "jagged": (lambda tensor: torch.nested.nested_tensor([tensor] * 2, layout=torch.jagged), "layout torch.jagged"),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
@pytest.mark.parametrize("name", PUBLIC)
def test_tensors_that_are_not_dense_are_refused_by_name(name: str, layout: str) -> None:
    args = list(SAMPLES[name](CASE, torch.float32))
    parameters = [argument.name for argument in op(name).default._schema.arguments]
    convert, got = OTHER_LAYOUTS[layout]
    position = 2 if name.startswith("gptq_gemm") else 0
    if isinstance(args[position], list):
        args[position][1] = convert(args[position][1])
        parameters[position] += "[1]"
    else:
        args[position] = convert(args[position])
    message = f"{name}: {parameters[position]} must be a dense tensor; got {got}"
    for call in (op(name), getattr(ops, name)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call(*args)
    if layout != "jagged":  # which come to torch's own refusal there; it names the op alone
        with torch.inference_mode(), pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            op(name)(*args)


@pytest.mark.parametrize("grad", [False, True])
def test_first_arguments_that_are_not_dense_are_refused_by_name(grad: bool) -> None:
    x, *weight = SAMPLES["gptq_gemm"](CASE, torch.float32)
    x.requires_grad_(grad)
    for gemm in (torch.ops.exllama.gptq_gemm, gptq_gemm):
        with pytest.raises(ValueError, match=r"^gptq_gemm: x must be a dense tensor; got layout torch.sparse_coo$"):
            gemm(x.to_sparse(), *weight)


def test_the_fake_refuses_sparse_tensors_with_the_same_text() -> None:
    x, *weight = SAMPLES["gptq_gemm"](CASE, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x.to_sparse())
        with pytest.raises(ValueError, match=r"^gptq_gemm: x must be a dense tensor; got layout torch.sparse_coo$"):
            torch.ops.exllama.gptq_gemm(fake, *weight)


class Seen(TorchDispatchMode):
    """The ops of ours that a mode is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "exllama":
            self.ops.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", PUBLIC)
def test_a_mode_sees_each_call_once_by_its_name(name: str, grad: bool) -> None:
    args = SAMPLES[name](CASE, torch.float32)
    if grad and name.startswith("gptq_gemm"):
        args[0].requires_grad_()
    for call in (op(name), getattr(ops, name)):
        with Seen() as seen:
            call(*args)
        assert seen.ops == [f"exllama.{name}.default"]


def save_products(context: Any, target: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if target in OPS_TO_SAVE else CheckpointPolicy.PREFER_RECOMPUTE


POLICIES: dict[str, Any] = {
    "OPS_TO_SAVE": [*OPS_TO_SAVE],
    "a policy": save_products,
    "the names": [torch.ops.exllama.gptq_gemm.default, torch.ops.exllama.gptq_gemm_multi.default],
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_selective_checkpointing_computes_no_saved_product_again(policy: str, compiled: bool, grad: bool) -> None:
    layer = ExllamaLinear.from_weight(quantize(torch.randn(96, 96), 4, 32))
    many, scale = multi_args(build_parts(CASE, (64, 32))), torch.ones(1, requires_grad=True)

    def region(x: torch.Tensor) -> torch.Tensor:
        return ops.gptq_gemm_multi((layer(x) * scale).tanh(), *many).tanh()

    def run(x: torch.Tensor) -> torch.Tensor:
        context_fn = functools.partial(create_selective_checkpoint_contexts, POLICIES[policy])
        return checkpoint(region, x, use_reentrant=False, context_fn=context_fn)

    x, expected = (torch.ones(3, 96, requires_grad=grad) for _ in range(2))
    if compiled:
        torch._dynamo.reset()
        backend = AotEagerAndRecordGraphs()
        torch.compile(run, backend=backend, fullgraph=True)(x).sum().backward()
        graphs = (*backend.fw_graphs, *backend.bw_graphs)
        computed = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    else:
        with Seen() as seen:
            run(x).sum().backward()
        computed = seen.ops
    products = [name.split(".")[1] for name in computed if name.startswith("exllama.")]
    assert products == ["gptq_gemm", "gptq_gemm_multi", *["gptq_gemm_dx"] * (2 + grad)]
    gradient, scale.grad = scale.grad, None
    region(expected).sum().backward()
    torch.testing.assert_close(gradient, scale.grad)
    if grad:
        torch.testing.assert_close(x.grad, expected.grad)


def test_the_former_name_of_an_op_without_autograd_is_the_op() -> None:
    for name in ("gptq_gemm", "gptq_gemm_dx", "gptq_gemm_multi"):
        assert getattr(torch.ops.exllama, f"_{name}") is getattr(torch.ops.exllama, name)


def test_the_ops_to_save_are_the_products_with_and_without_autograd() -> None:
    assert {str(overload) for overload in OPS_TO_SAVE} == {
        f"exllama.{name}.{overload}"
        for name in ("gptq_gemm", "gptq_gemm_dx", "gptq_gemm_multi", "gptq_moe_gemm", "gptq_moe_gemm_dx")
        for overload in ("default", "no_autograd")
    }


@pytest.mark.parametrize(
    "context",
    [
        contextlib.nullcontext,
        torch.inference_mode,
        torch.autograd.forward_ad.dual_level,
        lambda: FakeTensorMode(allow_non_fake_inputs=True),
    ],
    ids=["no context", "inference_mode", "dual_level", "FakeTensorMode"],
)
@pytest.mark.parametrize("form", [op, functools.partial(getattr, ops)], ids=["op", "function"])
@pytest.mark.parametrize("name", ["gptq_gemm", "gptq_gemm_dx", "gptq_gemm_multi"])
def test_none_comes_to_the_checks_whoever_asks_it_for_its_gradient(
    name: str, form: Callable[[str], Any], context: Callable[[], Any]
) -> None:
    first, *rest = SAMPLES[name](CASE, torch.float32)
    parameter = op(name).default._schema.arguments[0].name
    with pytest.raises(ValueError, match=rf"^{name}: {parameter} must be a tensor; got None$"), context():
        form(name)(None, *rest)
    rest[3] = None
    rule = rf"^{name}: g_idx must be a tensor; got None; an empty int32 tensor means none$"
    for grad in (False, True):
        with pytest.raises(ValueError, match=rule), context():
            form(name)(first.clone().requires_grad_(grad), *rest)
