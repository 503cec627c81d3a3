"""Launches that overlap with the kernel before: which do, with the same bits, and that none touches memory too early.

The emulator has every thread wait before its first access to global memory. The machine code is held to the same.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from conformance.weights import build
from cuda import emulated
from cuda.plain import PlainOps
from cuda.test_convergence import COMPILER, NVDISASM, machine_code
from cuda.test_plain import M, case_of, described, device, inputs
from exllama_ops.backends.native.compile import CUDA
from ptx_emulator.emulator import DEVICES, Emulator, reasons_against

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow
emulation = pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")
disassembly = pytest.mark.skipif(COMPILER is None or NVDISASM is None, reason="needs nvcc and nvdisasm")


@pytest.fixture
def overlapping() -> Iterator[Emulator]:
    """An emulated sm_90 whose launches overlap where they can."""
    emulator = device(90)
    emulator.library.plain_set_launches_overlap(ctypes.c_bool(True))
    yield emulator
    emulator.library.plain_set_launches_overlap(ctypes.c_bool(False))


@emulation
@pytest.mark.parametrize(
    ("algorithm", "order", "bits"),
    [
        ("scalar", "perm", 4),
        ("scalar", "raw", 4),
        ("mma", "perm", 4),
        *(pytest.param(algorithm, "perm", bits, marks=SLOW) for algorithm in ("scalar", "mma") for bits in (2, 3, 8)),
    ],
)
def test_launches_that_overlap_give_the_same_bits(overlapping: Emulator, algorithm: str, order: str, bits: int) -> None:
    weight = build(case_of(bits, order))
    x = inputs(weight.case)["x float16"]
    ops = PlainOps(overlapping, [described(weight)])
    for rows, splits in ((1, 1), (1, 2), (M, 1)):
        results = []
        for overlaps in (False, True):
            overlapping.library.plain_set_launches_overlap(ctypes.c_bool(overlaps))
            with overlapping.record() as recording:
                results.append(ops.gemm(x[:rows], algorithm, splits=splits))
            *before, product = recording.calls
            assert product["overlaps"] == overlaps
            assert not any(call["overlaps"] for call in before)  # the gather of x
        assert np.array_equal(*results)


@emulation
def test_code_that_does_not_wait_does_not_overlap() -> None:
    """Code of compute_80 runs on 9.0 too, and begins without a wait."""
    emulator = Emulator(emulated.plain_library(80), DEVICES[90])
    emulator.library.plain_set_launches_overlap(ctypes.c_bool(True))
    weight = build(case_of(4))
    with emulator.record() as recording:
        PlainOps(emulator, [described(weight)]).gemm(inputs(weight.case)["x float16"][:1], "scalar")
    emulator.library.plain_set_launches_overlap(ctypes.c_bool(False))
    assert [call["overlaps"] for call in recording.calls] == [False]


@emulation
@pytest.mark.parametrize(("value", "overlaps"), [(None, False), ("0", False), ("1", True)])
def test_a_variable_has_launches_overlap(monkeypatch: pytest.MonkeyPatch, value: str | None, overlaps: bool) -> None:
    if value is None:
        monkeypatch.delenv("EXLLAMA_OPS_CUDA_OVERLAP", raising=False)
    else:
        monkeypatch.setenv("EXLLAMA_OPS_CUDA_OVERLAP", value)
    weight, ops = build(case_of(4)), emulated.ops(90)
    ops.gptq_gemm(torch.randn(1, weight.case.K).half(), *weight.args)
    assert [call["overlaps"] for call in ops.calls] == [overlaps]
    monkeypatch.delenv("EXLLAMA_OPS_CUDA_OVERLAP", raising=False)
    ops.read_environment()


# Every access to global memory, and to one that may be global.
_ACCESS = re.compile(r"\b(?:LD|ST|LDG|STG|LDGSTS|ATOM|ATOMG|RED|REDG|UBLKCP|CCTL)\b[.\w]*")
_READ_ONLY = re.compile(r"\bLDG\b[.\w]*\.CONSTANT\b")
_WAIT = re.compile(r"\bACQBULK\b")
_BRANCH = re.compile(r"\b(?:BRA|BRX|EXIT|RET|CALL)\b")
FEW = """
#include "cuda/gemm_mma.cuh"
#include "cuda/gemm_scalar.cuh"
namespace exllama::cuda {
template __global__ void gemm_scalar<4, true, 1>(Parts, const void*, DType, int64_t, int64_t, Splits, void*);
template __global__ void gemm_mma<4, __half, 1, 128>(Parts, const __half*, int64_t, MmaCut, Splits, __half*);
}
"""


def waits_first(text: str) -> bool:
    """Whether all threads of a kernel's machine code wait before any access and any branch."""
    wait, *others = (pattern.search(text) for pattern in (_WAIT, _ACCESS, _BRANCH))
    return wait is not None and all(found is not None and wait.start() < found.start() for found in others)


def products_in(source: Path, code: str, folder: Path) -> dict[str, str]:
    """The machine code of the kernels that multiply."""
    texts = machine_code(source, "compute_90", code, folder)
    return {name: text for name, text in texts.items() if "gemm_" in name}


@disassembly
@pytest.mark.parametrize("code", [pytest.param(code, marks=[] if code == "sm_90" else SLOW) for code in
                                  CUDA.device_code["compute_90"] if code.startswith("sm_")])  # fmt: skip
def test_the_machine_code_waits_before_it_loads(code: str, tmp_path: Path) -> None:
    source = tmp_path / "few.cu"
    source.write_text(FEW)
    texts = products_in(source, code, tmp_path)
    assert len(texts) == 2
    for text in texts.values():
        assert waits_first(text)
        assert not _READ_ONLY.search(text), "of memory that the kernel before may write"
        assert not waits_first(_WAIT.sub("NOP", text))


@SLOW
@disassembly
@pytest.mark.parametrize("name", ["gemm_scalar", "gemm_mma"])
def test_the_machine_code_of_every_kernel_waits_before_it_loads(name: str, tmp_path: Path) -> None:
    texts = products_in(ROOT / "csrc" / "cuda" / f"{name}.cu", "sm_90", tmp_path)
    assert [kernel for kernel, text in texts.items() if not waits_first(text)] == []
