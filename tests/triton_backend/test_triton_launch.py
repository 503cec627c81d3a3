"""What a launch takes for compiled, and what Triton compiles: the same, since a capture must not compile."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs Triton's compiler, and TRITON_INTERPRET=1 replaces it", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

from conformance.weights import Case, build
from exllama_ops.backends.triton import launch, ops
from ptx_emulator.emulator import reasons_against
from triton_backend.compiling import arguments_of, targeting, variants
from triton_backend.emulated import EmulatedDriver

TARGETS = {"cuda": GPUTarget("cuda", 80, 32), "hip": GPUTarget("hip", "gfx942", 64)}
BEYOND_INT32 = 2**31
BASE = next(variant for variant in variants("sm80", 4) if variant.name == "dot-16-fp16-128-3parts")


def tensor(dtype: torch.dtype, offset: int = 0, storage: int = 64) -> Tensor:
    """Few elements, at an address that 16 divides unless they begin at an ``offset``."""
    return torch.empty(storage, dtype=torch.int8)[:48].view(dtype)[offset : offset + 1]


def launches() -> list[dict[str, Any]]:
    """Arguments of one kernel, each time with others changed."""
    words, scales = torch.int32, torch.float16
    changes: list[dict[str, Any]] = [
        {},
        {"M": 7, "G": 16, "group_size": 48, "steps_0": 1, "steps_1": 32},
        {"K": 8192, "N": (32, 4096, 64)},
        {"K": 4104},
        {"N": (4096, 4096, 4104)},
        {"N": (4104, 4096, 4096)},
        {"M": BEYOND_INT32},
        {"x_ptr": tensor(torch.float16, offset=1)},
        {"x_ptr": tensor(torch.bfloat16)},
        {"qweight_ptrs": (tensor(words), tensor(words, offset=1), tensor(words))},
        {"scales_ptrs": (tensor(scales), tensor(scales), tensor(torch.float32))},
        {"row_order_ptr": tensor(words, offset=3)},
        {"x_ptr": tensor(torch.float16, storage=BEYOND_INT32)},
    ]
    return [{**arguments_of(BASE), **change} for change in changes]


@pytest.mark.parametrize("backend", TARGETS)
def test_a_launch_is_new_where_triton_would_compile(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled here: Triton asks a hook first, by the key of what it would compile."""
    tritons: list[str] = []

    def skip(*, key: str, **described: Any) -> bool:
        tritons.append(key)
        return True

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", skip)
    monkeypatch.setattr(torch.version, "hip", "7" if backend == "hip" else None)
    ours: list[set[Any]] = []
    with targeting(TARGETS[backend]):
        for arguments in launches():
            is_size = {name: isinstance(_first(value), int) for name, value in arguments.items()}
            tensors = {name: value for name, value in arguments.items() if not is_size[name]}
            sizes = {name: value for name, value in arguments.items() if is_size[name]}
            launched: set[Any] = set()
            monkeypatch.setattr(launch, "_launched", launched)
            launch.launch(BASE.kernel, (1,), tensors, sizes, BASE.constants)
            ours.append(launched)
    assert len(tritons) == len(ours)
    for i, key in enumerate(tritons):
        assert [other == key for other in tritons] == [other == ours[i] for other in ours], f"launch {i}"


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")
def test_nothing_is_compiled_in_a_capture(device: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = build(Case(4, 552, 72, 128, "perm"))
    x = torch.randn(1, 552).half()
    result = ops.gptq_gemm(x, *weight.args)
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **of: compiled.append(of["repr"]))
    monkeypatch.setattr(launch, "is_capturing", lambda device: True)
    assert torch.equal(ops.gptq_gemm(x, *weight.args), result)
    at_an_odd_address = torch.empty(553, dtype=torch.float16)[1:].view(1, 552)
    with pytest.raises(
        RuntimeError, match=r"gemv_kernel for .* is not compiled yet, and a CUDA graph is being captured"
    ):
        ops.gptq_gemm(at_an_odd_address, *weight.args)
    with pytest.raises(RuntimeError, match="not compiled yet"):
        ops.gptq_gemm(x.bfloat16(), *weight.args)
    assert not compiled
