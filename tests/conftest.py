"""What holds for every test: the ops are registered, and compute in float32 at least.

GPU tests skip without a GPU, with a reason that is counted. So do pinned tests under another torch.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import exllama_ops  # registers torch.ops.exllama

(TORCH_OF_CI,) = re.findall(
    r"^TORCH .*torch==(\S+)", (Path(__file__).parents[1] / "Makefile").read_text(), re.MULTILINE
)


@pytest.fixture(autouse=True)
def float32_arithmetic() -> Iterator[None]:
    """Use the CPU's float class, so that most tests have one bound to know: gamma of the sum."""
    before = exllama_ops.get_cpu_matmul_precision()
    exllama_ops.set_cpu_matmul_precision("highest")
    yield
    exllama_ops.set_cpu_matmul_precision(before)


# Workers of pytest-xdist share the cores. With a thread for each core in each worker, they wait more than they compute.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

# A job in the background ignores SIGINT, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, help="in tests/properties, how many random cases to run")
    parser.addoption("--first-seed", type=int, default=0, help="in tests/properties, the seed of the first of them")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skipped = {}
    if not torch.cuda.is_available():
        skipped["gpu"] = "needs a CUDA device, and there is none"
    if torch.__version__.partition("+")[0] != TORCH_OF_CI:
        skipped["pinned"] = f"pins what torch {TORCH_OF_CI} makes of code; this one is {torch.__version__}"
    for item in items:
        for marker, reason in skipped.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
