"""What the backends declare, worked out by hand: a change of a kernel's sums changes a number here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from exllama_ops.testing.bounds import gamma
from exllama_ops.testing.errors import (
    cpu_dx_error,
    cpu_gemm_error,
    cpu_spans,
    cuda_dx_error,
    cuda_gemm_error,
    reference_error,
    triton_dx_error,
    triton_gemm_error,
)


def test_the_reference_sums_in_float64_and_rounds_to_float32() -> None:
    assert reference_error(4096).relative == 2.0**-24 + gamma(4096, 2.0**-53)


def test_a_span_is_rows_of_one_group_128_at_most() -> None:
    groups = torch.tensor([1] * 130 + [0] * 2 + [1])
    assert [span.tolist() for span in cpu_spans(groups)] == [[130, 131], [*range(128)], [128, 129, 132]]
    assert [len(span) for span in cpu_spans(groups, by_row=True)] == [128, 5]


# Groups of 64 and 300 rows: spans of 64, or of 128, 128 and 44.
@pytest.mark.parametrize(("group_size", "depth"), [(64, 64 + 10 + 2), (300, 128 + 6 + 2)])
def test_the_cpu_declares_the_depth_of_its_sums(group_size: int, depth: int) -> None:
    x, W, groups = torch.ones(1, 600), torch.ones(600, 1, dtype=torch.float64), torch.arange(600) // group_size
    assert cpu_gemm_error("highest", x, W, groups) == (gamma(depth), 0.0)
    for precision in ("highest", "high", "medium"):  # ceil(600 / 128) spans of any groups
        assert cpu_gemm_error(precision, x, W, groups, by_row=True) == (gamma(128 + 5 + 2), 0.0)
    assert cpu_dx_error(64).relative == gamma(67)


@pytest.mark.parametrize("outlier", [0.0, 300.0])
def test_the_cpu_declares_the_errors_of_its_integers_span_by_span(outlier: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 96, generator=generator)
    x[1, 40] += outlier
    W = torch.randn(96, 5, generator=generator).double()
    groups = torch.randperm(96, generator=generator) // 32
    high, medium = torch.zeros(3, 5).double(), torch.zeros(3, 5).double()
    for group in range(3):
        for row in range(3):
            a, w = x[row, groups == group].double().abs(), W[groups == group].abs()
            medium[row] += a.max() / 127 * w.sum(0)
            if a.max() > 16 * a.mean():
                high[row] += 2.0**-11 * (a @ w + 2.0**-18 * a.max() * w.sum(0))
            else:
                high[row] += 2.0**-11 * a.norm() * w.norm(dim=0)
    for precision, relative, absolute in (("high", 0.0, high), ("medium", gamma(32 + 3 + 2), medium)):
        error = cpu_gemm_error(precision, x, W, groups)
        assert error.relative == relative
        torch.testing.assert_close(error.absolute, absolute, rtol=1e-12, atol=0)


def test_a_row_that_is_not_finite_has_its_error_to_itself() -> None:
    x, W, groups = torch.ones(3, 64), torch.ones(64, 2, dtype=torch.float64), torch.arange(64) // 32
    expected = cpu_gemm_error("high", x, W, groups).absolute
    x[1, 3], x[1, 40] = torch.nan, torch.inf
    absolute = cpu_gemm_error("high", x, W, groups).absolute
    assert torch.equal(absolute[[0, 2]], expected[[0, 2]])
    assert not absolute[1].isfinite().any()


def test_the_cuda_kernels_declare_the_depths_of_their_sums() -> None:
    size = {"K": 4000, "G": 32}  # 16 splits of 256, 8 stages of 512
    half = torch.float16
    assert cuda_gemm_error("scalar", half, **size).relative == gamma(64 * 16 + 32 + 4 + 16)
    assert cuda_gemm_error("scalar", half, **size, by_row=True).relative == gamma(64 * 16 + 4000 + 4 + 16)
    assert cuda_gemm_error("mma", half, **size).relative == gamma(128 * 8 + 32 + 4 + 16, 2.0**-22)
    assert cuda_gemm_error("tiled", half, **size).relative == gamma(4002)
    assert cuda_gemm_error("dense", half, **size).relative == 2.0**-11 + gamma(4002)
    assert cuda_gemm_error("dense", torch.bfloat16, **size).relative == 2.0**-8 + gamma(4002)
    with pytest.raises(KeyError):  # float32 W is not rounded, and `dense` never takes it
        cuda_gemm_error("dense", torch.float32, **size)
    with pytest.raises(AssertionError, match="sparse"):
        cuda_gemm_error("sparse", half, **size)
    assert cuda_dx_error("tiled", 64).relative == gamma(66)
    assert cuda_dx_error("dense", 64).relative == (1 + 2.0**-6) * gamma(66, 2.0**-22)
    with pytest.raises(AssertionError):
        cuda_dx_error("mma", 64)


def test_the_triton_kernels_declare_the_depths_of_their_plans() -> None:
    def error(form: str, bits: int, groups_of: str, *, truncates: bool = False) -> float:
        plan = SimpleNamespace(form=form, block_b=8, groups_of=groups_of, splits=3, steps_per_split=5)
        return triton_gemm_error(plan, bits, truncates=truncates).relative

    # Blocks of 4 bits are 8 values, of 3 bits 32; a step is 8 blocks, and log2(8) = 3 halvings add them.
    assert error("gemv", 4, "step") == gamma(8 + 5 + 3 + 3 + 2)
    assert error("gemv", 3, "step") == gamma(32 + 5 + 3 + 3 + 2)
    assert error("gemv", 4, "row") == gamma(5 * 8 + 3 + 3 + 2)
    assert error("float_dot", 4, "step") == gamma(5 * 64 + 3 + 3 + 2)
    assert error("dot", 4, "step") == gamma(64 + 5 + 3 + 2)
    assert error("dot", 4, "step", truncates=True) == gamma(64 + 5 + 3 + 2, 2.0**-22)
    assert triton_dx_error(64).relative == gamma(66)
