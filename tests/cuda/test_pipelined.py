"""gemm_pipelined on memory of which every byte is known: each width, tile and kind of unit, and x that begins anywhere.

The emulator writes what a thread copies when the thread waits for it, and poisons the place until then.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.weights import Case, build
from cuda import bounds
from cuda.plain import PlainOps
from cuda.test_plain import as_array, as_tensor, described, device, moved
from exllama_ops.testing.bounds import assert_within_bound
from ptx_emulator.emulator import reasons_against

pytestmark = pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")

# More stages than shared memory holds, and rows, columns and tokens that fill no stage, unit or tile.
SHAPES = {2: (848, 144), 3: (800, 160), 4: (808, 136), 8: (804, 132)}
TOKENS = {32: 27, 64: 75}  # by the tokens of a tile
FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16


def on(bits: int, group_size: int, tokens: int, dtype: torch.dtype, *, quick: bool = False) -> Any:
    name = f"{bits}b-g{group_size}-{tokens}-{str(dtype).removeprefix('torch.')}"
    return pytest.param(bits, group_size, tokens, dtype, id=name, marks=[] if quick else [pytest.mark.slow])


QUICK = {(4, 128, 64, FLOAT16), (4, 32, 64, FLOAT16), (4, 128, 32, BFLOAT16), (3, 128, 64, FLOAT16),
         (2, 128, 64, FLOAT16), (8, 32, 64, FLOAT16), (8, 128, 64, BFLOAT16)}  # fmt: skip
EVERY_KERNEL = [
    on(bits, group_size, tokens, dtype, quick=(bits, group_size, tokens, dtype) in QUICK)
    for bits in SHAPES
    for group_size in (128, 32)
    for tokens in TOKENS
    for dtype in (FLOAT16, BFLOAT16)
    if (bits, group_size) != (3, 32)
]


@pytest.mark.parametrize(("bits", "group_size", "tokens", "dtype"), EVERY_KERNEL)
@pytest.mark.parametrize("order", ["ascending", "random"])
def test_every_kernel_is_within_the_bound(
    bits: int, group_size: int, tokens: int, dtype: torch.dtype, order: str
) -> None:
    """In one split and as the model divides K; with x at any address; the same bits whatever thread comes first."""
    emulator, weight = device(80), build(Case(bits, *SHAPES[bits], group_size))
    x = torch.randn(TOKENS[tokens], weight.case.K, generator=torch.Generator().manual_seed(bits)).to(dtype)
    error = bounds.gemm_error("pipelined", weight, dtype)
    ops = PlainOps(emulator, [described(weight)])
    emulator.set_order(order, seed=bits)
    emulator.set_mma(truncates=order == "random")
    try:
        with emulator.record() as recording:
            once, split = (ops.gemm(as_array(x), "pipelined", splits=splits, rows=tokens) for splits in (1, None))
            anywhere = ops.gemm(moved(as_array(x), 2), "pipelined", splits=1, rows=tokens)
    finally:
        emulator.set_order("ascending")
        emulator.set_mma()
    assert sum(f"Li{tokens // 8}E" in call["kernel"] for call in recording.calls) == 3
    assert torch.equal(as_tensor(anywhere), as_tensor(once))
    for out in (once, split):
        assert_within_bound(as_tensor(out), x, weight.dense, error)


@pytest.mark.parametrize("bits", [pytest.param(bits, marks=[] if bits == 4 else pytest.mark.slow) for bits in SHAPES])
def test_one_hot_x_returns_rows_of_W(bits: int) -> None:
    """A random product hides one misplaced value; this cannot."""
    weight = build(Case(bits, *SHAPES[bits], 128))
    ops = PlainOps(device(80), [described(weight)])
    eye = torch.eye(weight.case.K, dtype=torch.float16)
    assert torch.equal(as_tensor(ops.gemm(as_array(eye), "pipelined", rows=64)), weight.dense.float().half())
