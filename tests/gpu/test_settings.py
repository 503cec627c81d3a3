"""Settings of torch under which its BLAS refuses, or would sum in float16: valid calls stay valid and exact."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from conformance.weights import Case, build
from cuda import bounds
from cuda.test_emulated import ALGORITHMS
from exllama_ops.backends import cuda as cuda_backend
from exllama_ops.testing.bounds import assert_within_bound

pytestmark = pytest.mark.gpu

# Rows for which the choice falls on each algorithm that this GPU has.
TOKENS = (1, 16, 300, 2048)
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(params=["shuffled", "unshuffled"])
def case(request: pytest.FixtureRequest) -> Case:
    shuffled = request.param == "shuffled"
    return Case(4, 1024, 512, 128, "perm" if shuffled else "sorted", shuffled)


@pytest.fixture
def fp16_accumulation() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_fp16_accumulation
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    yield
    torch.backends.cuda.matmul.allow_fp16_accumulation = before


@pytest.fixture
def deterministic_without_a_workspace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    read_environment()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    monkeypatch.undo()
    read_environment()


def read_environment() -> None:
    assert cuda_backend.BACKEND.library is not None
    cuda_backend.BACKEND.library.read_environment()


def assert_every_product_is_within_its_bound(case: Case, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    weight = build(case)
    on_device = weight.to("cuda")
    for dtype in dtypes:
        error = max(bounds.gemm_error(algorithm, weight, dtype) for algorithm in ALGORITHMS)
        for M in TOKENS:
            x = torch.randn(M, case.K, generator=torch.Generator().manual_seed(M)).to(dtype)
            out = torch.ops.exllama.gptq_gemm(x.cuda(), *on_device.args)
            assert_within_bound(out, x, weight.dense, error)


@pytest.mark.usefixtures("fp16_accumulation")
def test_sums_stay_in_float32_where_torch_may_take_float16(case: Case) -> None:
    assert_every_product_is_within_its_bound(case)


@pytest.mark.usefixtures("deterministic_without_a_workspace")
def test_deterministic_mode_needs_no_workspace_of_a_blas(case: Case) -> None:
    assert_every_product_is_within_its_bound(case)


def test_bfloat16_needs_no_tensor_cores_that_know_it(case: Case) -> None:
    if torch.cuda.get_device_capability() >= (8, 0):
        pytest.skip("needs a GPU below compute capability 8.0")
    assert_every_product_is_within_its_bound(case, (torch.bfloat16,))
