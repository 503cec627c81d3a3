"""Threads and forks: what the process shares is right whoever comes first, and a forked child computes."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch

from conformance.conftest import cpu_isa
from conformance.weights import Case, build
from exllama_ops.backends import batch_invariant
from exllama_ops.backends.cpu import precision
from exllama_ops.backends.reference import ReferenceBackend
from exllama_ops.layout import interning
from exllama_ops.ops import _library

THREADS = 8


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def at_once(work: Callable[[int], object]) -> list[object]:
    """What each of `THREADS` threads returns, which start together."""
    barrier = threading.Barrier(THREADS)
    results: list[object] = [None] * THREADS

    def run(index: int) -> None:
        barrier.wait()
        results[index] = work(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# Forks


def every_op(case: Case) -> Callable[[], list[torch.Tensor]]:
    """All ops on a weight of this kind: work for two threads, and copies too small for torch to use its pool."""
    weight = build(case)
    x, token, grad = torch.randn(64, case.K), torch.randn(1, case.K), torch.randn(64, case.N)
    ops = torch.ops.exllama

    def compute() -> list[torch.Tensor]:
        shuffled = weight.qweight.clone()
        ops.gptq_shuffle(shuffled, weight.row_order, case.bits)
        return [
            ops.gptq_gemm(token, *weight.args),
            ops.gptq_gemm(x, *weight.args),
            ops.gptq_gemm_dx(grad, *weight.args),
            ops.gptq_dequantize(*weight.args),
            ops.gptq_unshuffle(weight.qweight, weight.row_order, case.bits),
            shuffled,
        ]

    return compute


def exit_status_of_child(compute: Callable[[], list[torch.Tensor]], expected: list[torch.Tensor]) -> int:
    """0 if a forked child computes what is expected; -SIGALRM if it never ends."""
    child = os.fork()
    if not child:
        signal.alarm(60)
        results = compute()
        torch.set_num_threads(1)  # for torch, whose pool is not there
        os._exit(0 if all(map(torch.equal, results, expected)) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_child_that_is_forked_after_a_threaded_call_computes_the_same_bits(two_threads: None) -> None:
    with cpu_isa(""):
        compute = every_op(Case(4, 512, 384, 128, "perm"))
        expected = compute()
        assert exit_status_of_child(compute, expected) == 0


def test_a_child_that_is_forked_during_a_call_in_another_thread_computes_the_same_bits(two_threads: None) -> None:
    with cpu_isa(""):
        compute = every_op(Case(4, 512, 384, 128, "perm"))
        expected = compute()
        done = threading.Event()

        def work() -> None:
            while not done.is_set():
                compute()

        thread = threading.Thread(target=work)
        thread.start()
        statuses = [exit_status_of_child(compute, expected) for _ in range(5)]
        done.set()
        thread.join()
        assert statuses == [0] * 5


# Threads that compute


def test_calls_of_many_threads_at_once_compute_the_same_bits(two_threads: None) -> None:
    with cpu_isa(""):
        compute = every_op(Case(4, 512, 1024, 128, "perm"))
        expected = compute()

        def work(index: int) -> bool:
            return all(all(map(torch.equal, compute(), expected)) for _ in range(20))

        assert all(at_once(work))


def test_calls_from_within_a_parallel_region_of_torch_compute_the_same_bits(two_threads: None) -> None:
    libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    with cpu_isa(""):
        compute = every_op(Case(4, 512, 1024, 128, "perm"))
        expected = compute()
        right: list[bool] = []

        @callback
        def work(begin: int, end: int, context: object) -> None:
            right.extend(all(map(torch.equal, compute(), expected)) for _ in range(begin, end))

        one = ctypes.c_int64(1)
        for _ in range(5):
            assert libtorch.torch_parallel_for(ctypes.c_int64(0), ctypes.c_int64(8), one, work, None) == 0
        assert right == [True] * 40


WORKERS = """
import os, sys, torch, exllama_ops
from exllama_ops import quantize
from exllama_ops.nn import ExllamaLinear

def workers():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return names.count("exllama_ops\\n")

torch.set_num_threads(1)
layer, x = ExllamaLinear.from_weight(quantize(torch.randn(256, 512), 4, 128)), torch.randn(64, 512)
for threads in (1, 3, 2, 4):
    torch.set_num_threads(threads)
    layer(x)
    print(workers())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads of a process where Linux lists them")
def test_there_are_no_more_workers_than_torch_may_have_threads() -> None:
    process = subprocess.run([sys.executable, "-c", WORKERS], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout.split()) == (0, ["0", "2", "2", "3"]), process.stderr


# Shared state


class SlowDictionary(WeakValueDictionary[object, torch.Tensor]):
    """Lets other threads pass between looking and writing."""

    def get(self, key: object, default: object = None) -> object:
        found = super().get(key)
        time.sleep(1e-3)
        return found

    def setdefault(self, key: object, default: torch.Tensor) -> object:
        found = self.get(key)
        if found is None:
            self[key] = found = default
        return found


def test_threads_that_intern_equal_orders_get_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interning, "_orders", SlowDictionary())
    orders = at_once(lambda index: interning.intern(torch.arange(64, dtype=torch.int32)))
    assert len({id(order) for order in orders}) == 1


class SlowLibrary:
    """Follows a setting, and lets other threads pass before it does."""

    value: object = None

    def set_precision(self, value: int) -> None:
        time.sleep(random.random() * 1e-3)
        self.value = precision.PRECISIONS[value]

    def set_batch_invariant(self, enabled: bool) -> None:
        time.sleep(random.random() * 1e-3)
        self.value = enabled


@pytest.mark.parametrize(
    ("module", "name", "setter", "values"),
    [
        (precision, "_precision", precision.set_cpu_matmul_precision, precision.PRECISIONS),
        (batch_invariant, "_enabled", batch_invariant.set_batch_invariant, (False, True)),
    ],
    ids=["precision", "batch_invariant"],
)
def test_libraries_follow_the_last_setting_of_many_threads(
    module: Any, name: str, setter: Callable[[Any], None], values: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, getattr(module, name))
    for _ in range(20):
        monkeypatch.setattr(module, "_libraries", [])
        at_once(lambda index: setter(values[index % len(values)]) if index % 4 else module.apply_to(SlowLibrary()))
        assert [library.value for library in module._libraries] == [getattr(module, name)] * (THREADS // 4)


def test_a_call_beside_a_change_of_precision_has_one_of_the_precisions() -> None:
    with cpu_isa(""):
        weight = build(Case(4, 512, 256, 128))
        x = torch.randn(32, 512)
        results = []
        for name in precision.PRECISIONS:
            precision.set_cpu_matmul_precision(name)
            results.append(torch.ops.exllama.gptq_gemm(x, *weight.args))

        def work(index: int) -> bool:
            if index < 2:
                for i in range(3000):
                    precision.set_cpu_matmul_precision(precision.PRECISIONS[(i + index) % 3])
                return True
            outs = [torch.ops.exllama.gptq_gemm(x, *weight.args) for _ in range(30)]
            return all(any(torch.equal(out, result) for result in results) for out in outs)

        assert all(at_once(work))
        assert len({result.sum().item() for result in results}) == 3


def test_many_threads_hear_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def warn(message: str, *args: object, **kwargs: object) -> None:
        time.sleep(1e-3)
        told.append(message)

    monkeypatch.setattr(warnings, "warn", warn)
    kernel = ReferenceBackend().kernel(
        "gptq_unshuffle", "CPU", {"this test": ["it wants the reference"]}, lambda _: None
    )
    words, order = torch.zeros(4, 8, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    at_once(lambda index: kernel(words, order, 4))
    assert len(told) == 1


def test_libraries_of_two_devices_can_come_late_at_once() -> None:
    installed: list[tuple[str, str, str]] = []

    def late(index: int) -> object:
        key = ("CUDA", "XPU")[index % 2]
        kernel = _library.NativeKernel(lambda space, op: installed.append((key, space, op)))
        return _library.late_kernel(("gptq_shuffle", "gptq_unshuffle")[index % 4 // 2], key, kernel)

    assert all(map(callable, at_once(late)))
    assert len(installed) == THREADS
