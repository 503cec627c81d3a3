"""Parameters by address: what LLVM makes of a choice between two of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptx_emulator.emulator import Emulator, build, reasons_against

pytestmark = pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")

PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry choose(.param .u64 out, .param .u64 first, .param .u64 second)
{
.reg .pred %p<2>;
.reg .b32 %r<5>;
.reg .b64 %rd<4>;
mov.u32 %r1, %tid.x;
setp.eq.u32 %p1, %r1, 0;
mov.b32 %r2, first;
mov.b32 %r3, second;
selp.b32 %r4, %r2, %r3, %p1;
ld.param.u64 %rd1, [%r4];
ld.param.u64 %rd2, [out];
mul.wide.u32 %rd3, %r1, 8;
add.s64 %rd2, %rd2, %rd3;
st.global.u64 [%rd2], %rd1;
ret;
}
"""


def test_a_parameter_is_read_by_an_address_of_32_bits(tmp_path: Path) -> None:
    path = tmp_path / "choose.ptx"
    path.write_text(PTX)
    emulator = Emulator(build(ptx_files=[path]))
    out = torch.zeros(2, dtype=torch.int64)
    with emulator.only([(out.data_ptr(), 16)]):
        emulator.launch("choose", [1], [2], [out.data_ptr(), 5, 7])
    assert out.tolist() == [5, 7]
