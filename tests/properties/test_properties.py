"""Random calls of the ops: each is computed as the reference computes it, or refused as the reference refuses it.

A long run, whose figures are printed at its end, one of another size from other seeds, and one of another backend:

    python -m pytest -n 2 --slow tests/properties
    python -m pytest -n 2 tests/properties --cases 20000 --first-seed 1000
    EXLLAMA_OPS_BACKEND=triton TRITON_INTERPRET=1 python -m pytest -n 2 --slow tests/properties

A test runs the cases of a seed, the same ones every time. One that fails is shrunk, and printed as a program to be run
with PYTHONPATH=tests:tools.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from torch import Tensor

from exllama_ops import backends
from properties.arguments import bits_of
from properties.calls import Call, calls
from properties.conftest import FIGURES
from properties.laws import check
from properties.subjects import Subject, emulated_cuda, registered
from ptx_emulator.emulator import reasons_against

# By the backend that serves CPU tensors: the cases of one seed, of a plain run and of one with --slow.
CASES = {"cpu": (250, 1000, 100_000), "reference": (250, 1000, 10_000), "triton": (25, 25, 500)}

PROGRAM = """
import torch
from properties.calls import Call, Fault
from properties.laws import check
from properties.subjects import emulated_cuda, registered

torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)
check(CALL, SUBJECT())
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" not in metafunc.fixturenames:
        return
    of_a_seed, quick, slow = CASES[backends.serving("gptq_gemm", "CPU").name]
    config = metafunc.config
    asked = config.getoption("cases")
    cases = asked or (slow if config.getoption("slow") else quick)
    sets = []
    for begin in range(0, cases, of_a_seed):
        seed = config.getoption("first_seed") + begin // of_a_seed
        marks = [] if asked or begin < quick else [pytest.mark.slow]
        sets.append(pytest.param(seed, min(of_a_seed, cases - begin), id=f"seed-{seed}", marks=marks))
    metafunc.parametrize(("seed", "cases"), sets)


def check_calls(
    make_subject: Callable[[], Subject], seed: int, cases: int, record_property: Callable[[str, object], None]
) -> None:
    """Check random calls of a subject, and shrink one that breaks a law."""
    subject = make_subject()
    program = PROGRAM.replace("SUBJECT", make_subject.__name__)
    checked = draw_calls(subject, seed, cases, [Phase.generate, Phase.shrink], program)
    (backend,) = subject.backend.served_by
    counts = [[backend, isa, op, outcome, count] for (op, isa, outcome), count in subject.counts.items()]
    record_property(FIGURES, {"cases": checked, "counts": counts})


def draw_calls(subject: Subject, seed: int, cases: int, phases: list[Phase], program: str = "") -> int:
    """Check so many calls; how many they were."""
    checked = 0

    @hypothesis.seed(seed)
    @settings(
        max_examples=cases,
        phases=phases,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(call=calls(**subject.options))
    def holds(call: Call) -> None:
        nonlocal checked
        checked += 1
        note(program.replace("CALL", repr(call)))
        check(call, subject)

    holds()
    return checked


def test_random_calls_are_computed_or_refused_as_by_the_reference(
    seed: int, cases: int, record_property: Callable[[str, object], None]
) -> None:
    check_calls(registered, seed, cases, record_property)


@pytest.mark.slow
@pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")
def test_random_calls_on_an_emulated_gpu(record_property: Callable[[str, object], None]) -> None:
    check_calls(emulated_cuda, 0, 100, record_property)


def is_order(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dim() == 1


def flip_last_bits(op: Any, *args: Any, if_so: Callable[[Tensor], bool]) -> Any:
    """This holds for products in float32, whose bounds have room for it."""
    result = op(*args)
    if args[0].is_floating_point() and result.dtype == torch.float32 and if_so(result):
        bits_of(result).bitwise_xor_(result.isfinite().int())
    return result


def in_another_order(op: Any, *args: Any) -> Any:
    return op(*(argument.flip(0) if is_order(argument) else argument for argument in args))


def with_the_other_zero_points(op: Any, *args: Any) -> Any:
    return op(*args[:-2], not args[-2], args[-1]) if len(args) > 3 else op(*args)


def changing_an_argument(op: Any, *args: Any) -> Any:
    result = op(*args)
    for order in filter(is_order, args):
        order += 1
    return result


def with_other_strides(op: Any, *args: Any) -> Any:
    result = op(*args)
    return None if result is None else result.t().contiguous().t()


def without_nan(op: Any, *args: Any) -> Any:
    result = op(*args)
    return result if result is None or not result.is_floating_point() else result.nan_to_num(0.0)


def with_another_text(op: Any, *args: Any) -> Any:
    try:
        return op(*args)
    except ValueError as error:
        raise ValueError(f"{error}.") from None


def without_errors(op: Any, *args: Any) -> Any:
    try:
        return op(*args)
    except ValueError:
        return None


def with_bits_of_an_isa(op: Any, *args: Any) -> Any:
    return flip_last_bits(op, *args, if_so=lambda _: backends.cpu.BACKEND.library.isa_in_use() == "scalar")


def with_bits_of_the_threads(op: Any, *args: Any) -> Any:
    return flip_last_bits(op, *args, if_so=lambda _: torch.get_num_threads() == 2)


def with_bits_of_the_tokens(op: Any, *args: Any) -> Any:
    return flip_last_bits(op, *args, if_so=lambda result: len(result) > 8)


# A fault of the ops, and how the law begins that it breaks.
PLANTED = [
    (in_another_order, ".*beyond the bound|.*op and reference differ|the op"),
    (with_the_other_zero_points, ".*beyond the bound|op and reference differ"),
    (changing_an_argument, "the op changed its arguments"),
    (with_other_strides, "op and reference: strides"),
    (without_nan, "NaN in other places|op and reference differ"),
    (with_another_text, "the op: ValueError: "),
    (without_errors, "the op: nothing"),
    (with_bits_of_an_isa, "scalar and .* differ"),
    (with_bits_of_the_threads, "two calls differ"),
    (with_bits_of_the_tokens, "slice.* alone differ"),
]


@dataclass(frozen=True)
class Planted:
    """The ops with a fault in them."""

    fault: Callable[..., Any]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(self.fault, getattr(torch.ops.exllama, name))


@pytest.mark.skipif(backends.serving("gptq_gemm", "CPU") is not backends.cpu.BACKEND, reason="is of the native library")
@pytest.mark.parametrize(("fault", "law"), PLANTED)
def test_a_planted_fault_breaks_its_law(fault: Callable[..., Any], law: str) -> None:
    subject = registered()
    subject.backend = replace(subject.backend, ops=Planted(fault))
    subject.options = {"contexts": ("plain",), "x_values": ("normal", "not finite"), "scale_values": ("small",)}
    with pytest.raises(AssertionError, match=f"^(?:{law})"):
        draw_calls(subject, 0, 500, [Phase.generate])
