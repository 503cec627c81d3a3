"""What must hold of every call, whatever it is given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import exllama_ops
from conformance.backends import BackendUnderTest
from conformance.weights import Case, Weight
from exllama_ops import reference
from exllama_ops.layout.pack import unpack_rows, unpack_zeros
from exllama_ops.testing.bounds import assert_within_bound
from properties.arguments import Arguments, bits_of
from properties.calls import FAULTS_OF_FORM, Call
from properties.faults import arguments
from properties.subjects import Subject

_FAKE = FakeTensorMode()


@dataclass(frozen=True)
class Outcome:
    """What a call came to."""

    result: Tensor | None
    error: tuple[type[BaseException], str] | None

    @classmethod
    def of(cls, function: Callable[..., Any], values: Sequence[Any]) -> Outcome:
        try:
            return cls(function(*values), None)
        except Exception as error:
            return cls(None, (type(error), str(error)))

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.error[0].__name__}: {self.error[1]}"
        return "nothing" if self.result is None else f"{self.result.dtype} {tuple(self.result.shape)}"


def check(call: Call, subject: Subject) -> None:
    """Every law for one call.

    Raises:
        AssertionError: the call breaks one.
    """
    subject = replace(subject, backend=subject.backend_for(call))
    given = arguments(call)
    expected = Outcome.of(getattr(reference, call.op), given.values)
    check_reference(call, given, expected)
    check_fake(call, given, expected)
    first: Outcome | None = None
    for isa in subject.isas:
        subject.use_isa(isa)
        outcome = check_op(call, subject, given, expected)
        if first is None:
            first = outcome
            if outcome.error is None:
                check_result(call, subject, outcome.result, expected.result)
                check_other_calls(call, subject, outcome.result)
        elif outcome.result is not None:
            assert_same_bits(outcome.result, first.result, f"{isa} and {subject.isas[0]}")
        subject.counts[call.op, isa, "refused" if expected.error else "computed"] += 1


def check_reference(call: Call, given: Arguments, expected: Outcome) -> None:
    """The reference takes what is right, refuses what is wrong, and says so by a ValueError that names the op."""
    if not call.faults:
        assert expected.error is None, f"the reference refuses: {expected}"
    if given.must_be_refused and len(call.faults) == 1:
        assert expected.error is not None, "the reference computes"
    if expected.error is not None:
        assert expected.error[0] is ValueError, f"the reference: {expected}"
        assert expected.error[1].startswith(f"{call.op}: "), f"the reference: {expected}"
    if expected.error is not None or call.op != "gptq_shuffle":
        assert not given.changed(), "the reference changed its arguments"


def check_fake(call: Call, given: Arguments, expected: Outcome) -> None:
    """Fake arguments give a fake of the form of the result, or are refused with the same text."""

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    with _FAKE:
        values = tree_map_only(Tensor, fake, given.values)
        outcome = Outcome.of(getattr(torch.ops.exllama, call.op), values)
    if expected.error is None:
        assert outcome.error is None, f"the fake refuses: {outcome}"
        assert_same_form(outcome.result, expected.result, "fake and reference")
    elif all(fault.kind in FAULTS_OF_FORM for fault in call.faults) and not is_of_values(expected.error[1]):
        assert outcome.error == expected.error, f"the fake: {outcome}\nthe reference: {expected}"
    else:  # no fake can see what is wrong with memory or values
        assert outcome.error is None or outcome.error[0] is ValueError, f"the fake: {outcome}"


def is_of_values(text: str) -> bool:
    """Whether an error is of the values of an index, which two faults of form can make wrong too."""
    return "must have values in" in text or "must be a permutation" in text


def check_op(call: Call, subject: Subject, seen: Arguments, expected: Outcome) -> Outcome:
    """One call of the op. Of its arguments it leaves what the reference left of ``seen``."""
    given = arguments(call) if call.op == "gptq_shuffle" else seen
    outcome = Outcome.of(lambda *values: called(call, subject, values), given.values)
    assert outcome.error == expected.error, f"the op: {outcome}\nthe reference: {expected}"
    if outcome.error is not None or call.op != "gptq_shuffle":
        assert not given.changed(), "the op changed its arguments"
    else:
        for memory, want in zip(given.memory, seen.memory, strict=True):
            assert torch.equal(bits_of(memory), bits_of(want)), "the op wrote other words than the reference"
        assert_same_bits(given.values[0], seen.values[0], "qweight of op and reference")
    return outcome


def called(call: Call, subject: Subject, values: Sequence[Any]) -> Any:
    """The op, in the context and with the threads that were drawn."""
    op = getattr(exllama_ops if call.context == "function" else subject.backend.ops, call.op)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(call.threads)
        if call.context == "no_grad":
            stack.enter_context(torch.no_grad())
        if call.context == "inference_mode":
            stack.enter_context(torch.inference_mode())
        if call.context == "requires_grad" and isinstance(values[0], Tensor) and values[0].is_floating_point():
            values = (values[0].detach().requires_grad_(), *values[1:])
        return op(*values)


def check_result(call: Call, subject: Subject, result: Tensor | None, expected: Tensor | None) -> None:
    """The result is the reference's: its words and its dense weight exactly, products within the backend's bound."""
    assert_same_form(result, expected, "op and reference")
    if result is None:
        return
    given, result = arguments(call), result.detach()
    if call.op in ("gptq_unshuffle", "gptq_dequantize"):
        assert_same_bits(result, expected, "op and reference", zeros_have_signs=False)
        return
    first, qweight, qzeros, scales, *options = given.values
    parts = [(qweight, qzeros, scales, result)]
    if call.op == "gptq_gemm_multi":
        columns = [part.contiguous() for part in result.split([part.shape[1] for part in qweight], 1)]
        parts = list(zip(qweight, qzeros, scales, columns, strict=True))
    for *tensors, part in parts:
        check_product(call, subject.backend, first, stored_weight(*tensors, *options), part)


def stored_weight(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    row_order: Tensor,
    shuffled: bool,
    bits: int,
    v2: bool,
    group_size: int,
) -> Weight:
    """A weight in the rows in which it is stored: where there is a permutation, it is x or dx that is gathered."""
    K, N, G = qweight.shape[0] * 32 // bits, scales.shape[1], scales.shape[0]
    size = group_size or -(-K // G)
    is_raw = not shuffled and row_order.numel() > 0
    rows = torch.arange(K)
    if shuffled and row_order.numel() > K:  # those that are rows of W
        rows = rows[row_order[:K] >= 0]
    return Weight(
        case=Case(bits, K, N, size, "raw" if is_raw else "sorted", shuffled, v2, scales.dtype),
        qweight=qweight,
        qzeros=qzeros,
        scales=scales,
        row_order=row_order,
        q=unpack_rows(qweight, bits, "shuffled" if shuffled else "checkpoint")[rows],
        z=unpack_zeros(qzeros, bits, use_v2_format=v2),
        groups=row_order.long() if is_raw else rows // size,
    )


def check_product(call: Call, backend: BackendUnderTest, first: Tensor, weight: Weight, result: Tensor) -> None:
    """Each element lies where its bound allows, and is inf or NaN where the exact one is."""
    first, W = first.detach(), weight.dense
    perm = None
    if weight.case.shuffled and weight.row_order.numel():
        perm = weight.row_order[: weight.rows].long()
        perm = perm[perm >= 0]
    if call.op == "gptq_gemm_dx":
        W = W.t()
        error = backend.dx_error(W.shape[0])
        result = result if perm is None else result[:, perm]
    else:
        first = first if perm is None else first[:, perm]
        error = backend.gemm_error(first, weight)
    exact = first.double() @ W
    finite = exact.isfinite()
    assert_within_bound(result, first, W, *error, where=finite)
    assert torch.equal(result.isnan(), exact.isnan()), "NaN in other places than the exact one"
    infinite = exact.isinf()
    assert torch.equal(result[infinite].double(), exact[infinite]), "not inf where the exact one is"


def check_other_calls(call: Call, subject: Subject, result: Tensor | None) -> None:
    """Laws between calls: of one op with fewer rows or other threads, and of one op with another."""
    ops, values = subject.backend.ops, arguments(call).values
    if call.op == "gptq_shuffle":
        if not call.shared and not call.faults:
            before = values[0].clone()
            ops.gptq_shuffle(*values)
            assert torch.equal(ops.gptq_unshuffle(*values), before), "unshuffle(shuffle(w)) is not w"
        return
    assert result is not None
    again = called(replace(call, threads=3 - min(call.threads, 2), context="plain"), subject, values)
    assert_same_bits(again, result, "two calls")
    if call.op == "gptq_unshuffle":
        return
    if call.op == "gptq_dequantize":
        check_one_hot(call, ops, values, result)
        return
    first, *weight = values
    M = first.shape[0]
    if subject.is_native_cpu and M:
        begin = call.seed % M
        rows = slice(begin, begin + 1 + call.seed // M % (M - begin))
        assert_same_bits(getattr(ops, call.op)(first[rows].clone(), *weight), result[rows], f"{rows} alone")
    if call.op == "gptq_gemm_multi":
        if subject.backend.parts_have_the_bits_of_gemm:
            parts = zip(*weight[:3], strict=True)
            alone = torch.cat([ops.gptq_gemm(first, *tensors, *weight[3:]) for tensors in parts], 1)
            assert_same_bits(alone, result, "gptq_gemm of the parts and gptq_gemm_multi")
    elif result.requires_grad:
        check_gradient(call, ops, first, weight)


def check_one_hot(call: Call, ops: Any, values: Sequence[Any], W: Tensor) -> None:
    """One-hot activations give rows of the dense weight, one-hot gradients its columns."""
    if not W.isfinite().all():
        return
    for op, size, dense in (("gptq_gemm", W.shape[0], W), ("gptq_gemm_dx", W.shape[1], W.t())):
        hot = torch.tensor([0, call.seed % size, size - 1])
        one_hot = torch.zeros(len(hot), size, dtype=W.dtype)
        one_hot[torch.arange(len(hot)), hot] = 1
        assert torch.equal(getattr(ops, op)(one_hot, *values), dense[hot]), f"{op} of one-hot rows is not W"


def check_gradient(call: Call, ops: Any, first: Tensor, weight: Sequence[Any]) -> None:
    """The gradient is the adjoint op's result, or its error."""
    first = first.detach().requires_grad_()
    result = getattr(ops, call.op)(first, *weight)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(call.seed)).to(result.dtype)
    adjoint = ops.gptq_gemm if call.op == "gptq_gemm_dx" else ops.gptq_gemm_dx
    expected = Outcome.of(adjoint, (grad, *weight))
    gradient = Outcome.of(lambda: torch.autograd.grad(result, first, grad)[0], ())
    assert gradient.error == expected.error, f"the gradient: {gradient}\nthe adjoint: {expected}"
    if expected.error is None:
        assert_same_bits(gradient.result, expected.result, "the gradient and the adjoint")


def assert_same_form(one: Tensor | None, other: Tensor | None, what: str) -> None:
    if one is None or other is None:
        assert one is other, what
        return
    for of in ("dtype", "device", "shape"):
        assert getattr(one, of) == getattr(other, of), f"{what}: {of} {getattr(one, of)}, {getattr(other, of)}"
    assert one.stride() == other.stride(), f"{what}: strides {one.stride()}, {other.stride()}"


def assert_same_bits(one: Tensor, other: Tensor | None, what: str, *, zeros_have_signs: bool = True) -> None:
    """Equal bits, except that any NaN equals any other."""
    assert other is not None
    one, other = one.detach(), other.detach()
    assert_same_form(one, other, what)
    if one.is_meta:  # as all arguments of two may be
        return
    equal = bits_of(one) == bits_of(other)
    if one.is_floating_point():
        equal |= one.isnan() & other.isnan()
        if not zeros_have_signs:
            equal |= one == other
    if not equal.all():
        at = tuple((~equal).nonzero()[0].tolist())
        raise AssertionError(f"{what} differ first at {at}: {one[at].item()!r}, {other[at].item()!r}")
