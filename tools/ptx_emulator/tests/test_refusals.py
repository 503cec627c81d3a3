"""What is not supported is refused with its line, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptx_emulator.emulator import Emulator, build, translate_all
from ptx_emulator.ptx import PtxError, parse
from ptx_emulator.toolchain import BuildError

MODULE = """.version 8.0
.target sm_80
.address_size 64
.visible .entry refused()
{
.reg .b32 %r<9>;
.reg .pred %p;
TEXT
ret;
}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frobnicate.u32 %r1, %r2;", r"line 8: frobnicate.u32: is not supported"),
        ("add.rz.ftz.oob.f32 %r1, %r2, %r3;", r"line 8: add.rz.ftz.oob.f32: modifiers \['oob'\] are not supported"),
        ("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1}, {%r2}, {%r3}, {%r4};", r"line 8: mma.*f16.*k = 16"),
        ("shfl.bfly.b32 %r1, %r2, 1, 31;", r"line 8: shfl.bfly.b32: only shfl.sync is supported"),
        ("mov.u32 %r1, %clock;", r"line 8: mov.u32: the special register %clock is not supported"),
        ("ld.shared.u32 %r1, [nowhere];", r"line 8: ld.shared.u32: unknown symbol 'nowhere'"),
        ("cp.async.bulk.commit_group;", r"line 8: cp.async.bulk.commit_group: modifiers \['bulk'\]"),
    ],
)
def test_an_instruction_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "refused.ptx"
    path.write_text(MODULE.replace("TEXT", text))
    library = build(ptx_files=[path])
    with pytest.raises(PtxError, match=message):
        translate_all(library)
    with pytest.raises(PtxError, match=message):
        Emulator(library).launch("refused", [1], [1], [])


def test_text_that_is_no_ptx_is_refused_with_its_line() -> None:
    with pytest.raises(PtxError, match="line 8: no token"):
        parse(MODULE.replace("TEXT", "add.u32 %r1, ?;"))
    with pytest.raises(PtxError, match="line 9: expected ';', got 'ret'"):
        parse(MODULE.replace("TEXT", "add.u32 %r1, %r2, %r3"))


def test_a_kernel_without_unsupported_instructions_translates(tmp_path: Path) -> None:
    path = tmp_path / "accepted.ptx"
    path.write_text(MODULE.replace("TEXT", "mov.u32 %r1, %tid.x;"))
    assert translate_all(build(ptx_files=[path])) == 1


def test_host_code_that_calls_an_unknown_function_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "graphs.cu"
    source.write_text(
        "#include <cuda_runtime.h>\n"
        'extern "C" cudaError_t capture(cudaStream_t stream) {\n'
        "    return cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);\n"
        "}\n"
    )
    with pytest.raises(BuildError, match="the emulated runtime has no cudaStreamBeginCapture"):
        build([source])
