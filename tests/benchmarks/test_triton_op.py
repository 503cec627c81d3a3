"""The comparison of plain implementations with triton_op, of the op that is one launch."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs Triton's compiler, and TRITON_INTERPRET=1 replaces it", allow_module_level=True)

from benchmarks import triton_op


@pytest.mark.slow
def test_inductor_sees_more_of_a_triton_op_and_fuses_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_op, "ROUNDS", 1)
    with triton_op.traceable():
        ways = triton_op.variants()["gptq_gemm_dx"]
        plain, traced = (triton_op.measure(ways[way], 16, False) for way in ("plain", "triton_op"))
    assert traced.nodes > plain.nodes
    assert traced[2:] == plain[2:]
    assert (plain.weights_written, plain.scheduled, plain.generated) == (0, 3, 2)
