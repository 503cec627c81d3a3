"""The choice of a backend, and the warning of the one of last resort."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from exllama_ops import backends
from exllama_ops.backends import reference
from exllama_ops.backends._types import NextBest


class Picky:
    name = "picky"

    def reasons_against(self, op: str, dispatch_key: str) -> list[str]:
        return ["no compiler", "no device"]

    def detail(self, dispatch_key: str) -> str:
        return ""

    def kernel(
        self, op: str, dispatch_key: str, passed_over: Mapping[str, Sequence[str]], next_best: NextBest
    ) -> Callable[..., Any]:
        raise AssertionError("not to be asked")


def test_the_first_backend_without_reasons_against_is_chosen_and_the_others_reported() -> None:
    choice = backends._choose("gptq_gemm", "CPU", (Picky(), reference.BACKEND))
    assert choice.backend is reference.BACKEND
    assert str(choice) == "CPU gptq_gemm: reference (not picky: no compiler, no device)"


def test_no_backend_at_all_is_an_error_with_every_reason() -> None:
    with pytest.raises(RuntimeError, match=r"no backend serves exllama::gptq_gemm on CPU: .*no compiler.*no device"):
        backends._choose("gptq_gemm", "CPU", (Picky(),))


def test_the_reference_warns_once_and_says_where_to_look() -> None:
    code = """
import torch, exllama_ops
none = torch.empty(0, dtype=torch.int32)
for _ in range(3):
    torch.ops.exllama.gptq_unshuffle(torch.zeros(4, 8, dtype=torch.int32), none, 4)
"""
    environment = {**os.environ, "EXLLAMA_OPS_BACKEND": "reference"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stderr.count("ReferenceBackendWarning: exllama_ops runs its PyTorch reference for CPU tensors") == 1
    assert "exllama_ops.backends.report()" in result.stderr


def test_a_backend_that_does_not_exist_is_refused() -> None:
    environment = {**os.environ, "EXLLAMA_OPS_BACKEND": "refrence"}
    result = subprocess.run(
        [sys.executable, "-c", "import exllama_ops"], capture_output=True, text=True, env=environment
    )
    assert result.returncode
    assert (
        "EXLLAMA_OPS_BACKEND must be one of cpu, cuda, reference, triton, or not set; got 'refrence'" in result.stderr
    )


class Serves(Picky):
    """A backend whose ops are named; it is settled, unless told otherwise."""

    def __init__(self, name: str, ops: tuple[str, ...], *, settled: bool = True) -> None:
        self.name = name
        self.ops = ops
        self.settled = settled

    def reasons_against(self, op: str, dispatch_key: str) -> list[str]:
        return [] if op in self.ops else [f"its library has no {op}"]

    def is_settled(self) -> bool:
        return self.settled

    def detail(self, dispatch_key: str) -> str:
        return f"a library for {dispatch_key}"


OPS = (
    "gptq_dequantize",
    "gptq_gemm",
    "gptq_gemm_dx",
    "gptq_gemm_multi",
    "gptq_moe_gemm",
    "gptq_moe_gemm_dx",
    "gptq_shuffle",
    "gptq_unshuffle",
)


def test_the_report_is_a_table_with_a_row_for_a_device_and_one_for_each_op_where_they_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = {
        "CPU": (Serves("cpu", OPS[:-1]), reference.BACKEND),
        "CUDA": (Serves("cuda", OPS, settled=False), Picky(), reference.BACKEND),
    }
    monkeypatch.setattr(backends, "PRIORITY", order)
    monkeypatch.setattr(backends, "_ONLY", None)
    report = backends.report()
    header, *rows = str(report).splitlines()
    assert header.split() == ["device", "op", "backend", "why"]
    assert [row.split(maxsplit=3) for row in rows[:-1]] == [
        *(["CPU", op, "cpu", "a library for CPU"] for op in sorted(OPS[:-1])),
        ["CPU", "gptq_unshuffle", "reference", "not cpu: its library has no gptq_unshuffle"],
    ]
    assert rows[-1].replace("every op", "every-op").split(maxsplit=3) == [
        *("CUDA", "every-op", "cuda"),
        "a library for CUDA; not picky: no compiler, no device; else reference",
    ]
    # Its columns begin where those of the header do.
    for row in rows:
        for title in ("op", "backend", "why"):
            assert row[header.index(f" {title}")] == " " != row[header.index(f" {title}") + 1]
    assert repr(report) == str(report)


def test_a_report_is_the_choices_and_shows_no_addresses_of_objects() -> None:
    report = backends.report()
    assert {choice.op for choice in report} == set(OPS)
    assert len(report) == len(OPS) * len(backends.PRIORITY)
    for text in (str(report), repr(report), repr(list(report)), str(report[0]), repr(report[0])):
        assert " object at 0x" not in text
