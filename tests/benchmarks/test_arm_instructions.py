"""Counting instructions in a listing; neither a compiler nor an Arm is needed."""

from __future__ import annotations

from benchmarks.arm_instructions import inner_loop


def test_the_innermost_loop_with_the_most_products_is_counted() -> None:
    code = [
        (0, "mov", "x0, #0"),
        (4, "ldr", "q0, [x1]"),  # the outer loop begins
        (8, "sdot", "v0.4s, v1.16b, v2.16b"),
        (12, "b.ne", "8 <f+0x8>"),
        (16, "sdot", "v0.4s, v1.16b, v2.16b"),
        (20, "sdot", "v0.4s, v1.16b, v2.16b"),
        (24, "b.ne", "10 <f+0x10>"),
        (28, "b.gt", "4 <f+0x4>"),
        (32, "b", "400 <g>"),
    ]
    assert inner_loop(code) == ["sdot", "sdot", "b.ne"]
