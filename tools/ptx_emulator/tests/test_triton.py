"""Fragment layouts against a source that is not ours: products that Triton compiled for sm_80, executed from its PTX.

Triton lays out its operands for ldmatrix, cp.async and mma.sync by its own reading of the PTX ISA; if ours differed,
the products would be wrong.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptx_emulator.emulator import EmulationError, Emulator, build

BLOCK = 32
SIGNATURES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int8": "i8"}
KERNEL = """
import json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def product(a, b, c, N, K, BLOCK: tl.constexpr, OUT: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offs_k = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), OUT)
    for k in range(0, K, BLOCK):
        x = tl.load(a + offs_m[:, None] * K + (k + offs_k)[None, :])
        y = tl.load(b + (k + offs_k)[:, None] * N + offs_n[None, :])
        total = tl.dot(x, y, total, input_precision="tf32", out_dtype=OUT)
    tl.store(c + offs_m[:, None] * N + offs_n[None, :], total)

kind, out, path = sys.argv[1:]
divisible = [["tt.divisibility", 16]]
source = ASTSource(
    product,
    signature={
        "a": f"*{kind}", "b": f"*{kind}", "c": f"*{out}", "N": "i32", "K": "i32",
        "BLOCK": "constexpr", "OUT": "constexpr",
    },
    constexprs={(5,): BLOCK_VALUE, (6,): tl.float32 if out == "fp32" else tl.int32},
    attrs={(i,): divisible for i in range(5)},
)
compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4, "num_stages": 3})
open(path, "w").write(compiled.asm["ptx"])
print(json.dumps({"shared": compiled.metadata.shared, "name": compiled.metadata.name}))
""".replace("BLOCK_VALUE", str(BLOCK))


def compiled(dtype: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The PTX of the product, and its name and shared bytes; compiled in a process of its own, which needs no GPU."""
    pytest.importorskip("triton", reason="no Triton, whose PTX is the independent source of fragment layouts")
    script, path = folder / "product.py", folder / "product.ptx"
    script.write_text(KERNEL)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    out = "i32" if dtype == "int8" else "fp32"
    result = subprocess.run(
        [sys.executable, str(script), SIGNATURES[dtype], out, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return path, json.loads(result.stdout)


def operands(dtype: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)))
    return (values * 30).to(torch.int8) if dtype == "int8" else values.to(getattr(torch, dtype))


INSTRUCTIONS = {
    "float16": "m16n8k16.row.col.f32.f16", "bfloat16": "m16n8k16.row.col.f32.bf16",
    "float32": "m16n8k8.row.col.f32.tf32", "int8": "m16n8k32.row.col.satfinite.s32.s8",
}  # fmt: skip


@pytest.mark.parametrize("dtype", SIGNATURES)
def test_product_compiled_by_triton_is_right(dtype: str, tmp_path: Path) -> None:
    path, metadata = compiled(dtype, tmp_path)
    assert INSTRUCTIONS[dtype] in path.read_text()
    emulator = Emulator(build(ptx_files=[path]))
    m, n, k = 2 * BLOCK, 3 * BLOCK, 3 * BLOCK
    a, b = operands(dtype, m, k, 1), operands(dtype, k, n, 2)
    exact = a.double() @ b.double()
    magnitude = a.double().abs() @ b.double().abs()
    # float32 is cut to tf32's 10 bits of fraction, by the tensor core itself
    operand_error = 2 * 2.0**-10 if dtype == "float32" else 0.0
    for truncates in (False, True):
        emulator.set_mma(truncates=truncates)
        c = torch.full((m, n), -1, dtype=torch.int32) if dtype == "int8" else torch.full((m, n), float("nan"))
        arguments = [a.data_ptr(), b.data_ptr(), c.data_ptr(), ctypes.c_int32(n), ctypes.c_int32(k), 0, 0]
        ranges = [(t.data_ptr(), t.numel() * t.element_size()) for t in (a, b, c)]
        with emulator.only(ranges):
            emulator.launch(metadata["name"], [m // BLOCK, n // BLOCK], [128], arguments, metadata["shared"])
        steps = k / 4 if truncates else k
        bound = (operand_error + steps * (6 * 2.0**-22 if truncates else 2.0**-24)) * magnitude
        assert ((c.double() - exact).abs() <= (0 if dtype == "int8" else bound)).all()


def test_a_row_beyond_the_operand_is_caught(tmp_path: Path) -> None:
    path, metadata = compiled("float16", tmp_path)
    emulator = Emulator(build(ptx_files=[path]))
    a = operands("float16", BLOCK, BLOCK, 1)
    c = torch.zeros(BLOCK, BLOCK)
    arguments = [a.data_ptr(), a.data_ptr(), c.data_ptr(), ctypes.c_int32(BLOCK), ctypes.c_int32(2 * BLOCK), 0, 0]
    ranges = [(t.data_ptr(), t.numel() * t.element_size()) for t in (a, c)]
    with emulator.only(ranges), pytest.raises(EmulationError, match="outside of all registered memory"):
        emulator.launch(metadata["name"], [1, 1], [128], arguments, metadata["shared"])
