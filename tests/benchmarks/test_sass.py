"""The counts of benchmarks/sass.py on a kernel small enough to count by hand."""

from __future__ import annotations

import pytest

from benchmarks.sass import Code, SassError, kernels

# A loop of 4 instructions with a branch around a load, a longer way with one more FFMA, and a subroutine.
TEXT = """
\t.section\t.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 BRA `(.L_x_2) ;
        /*0020*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0030*/                   CALL.REL.NOINC `($__internal_0_$divide) ;
.L_x_2:
        /*0040*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0050*/              @P1 BRA `(.L_x_3) ;
        /*0060*/                   FFMA R1, R2, R3, R1 ;
.L_x_3:
        /*0070*/              @P2 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
        .weak           $__internal_0_$divide
$__internal_0_$divide:
        /*0090*/                   I2F.U64.RP R0, R4 ;
        /*00a0*/                   RET.REL.NODEC R2 `(kernel) ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
"""


def code(text: str = TEXT) -> Code:
    ((name, body),) = kernels(text).items()
    assert name == "kernel"
    return Code(body)


@pytest.mark.parametrize(
    ("needs", "instructions"),
    [
        ({"macs": 2048}, 4),
        ({"macs": 4096}, 8),
        ({"macs": 2048, "FFMA": 1}, 5),
        ({"macs": 2048, "LDG.E.128": 1}, 8),
        ({"macs": 4096, "LDG.E.128": 1, "FFMA": 1}, 13),
    ],
)
def test_the_cheapest_way_that_does_the_work_is_counted(needs: dict[str, int], instructions: int) -> None:
    assert code().cheapest_cycle(needs) == instructions


def test_work_that_no_loop_does_is_refused() -> None:
    with pytest.raises(SassError, match="no cycle issues"):
        code().cheapest_cycle({"DFMA": 1})


def test_an_unknown_tensor_core_instruction_is_refused() -> None:
    with pytest.raises(SassError, match=r"does not know: HMMA\.8816"):
        code(TEXT.replace("HMMA.16816.F32", "HMMA.8816.F32"))
