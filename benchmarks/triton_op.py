"""The Triton backend's ops as plain implementations beside `torch.library.triton_op`: what a compiler sees of each.

    python -m benchmarks.triton_op > benchmarks/results/triton-op.md

Needs no GPU: graphs are traced on fake CUDA tensors, and lowered by Inductor on fake CPU tensors, since its choice of
reductions asks a GPU. What a launch costs can be measured on a GPU alone.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode, Scheduler
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.library import triton_op, wrap_triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import exllama_ops  # noqa: F401  registers torch.ops.exllama
from exllama_ops.backends.triton import gemm, gemm_dx, tiles
from exllama_ops.cli.output import emit

SIZE, GROUP = 4096, 128
OPTIONS = (True, 4, True, GROUP)
TOKENS = (1, 16)
ROUNDS = 3
A100 = tiles.Device("sm80", 108)


class _Driver:
    """All that Triton asks of a driver while a kernel is traced."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)


def _traced_launch(kernel: Any, grid: Any, tensors: Any, sizes: Any, constants: Any, **options: Any) -> None:
    """A launch as `triton_op` wants it; options of the compiler are no part of a graph."""
    wrap_triton(kernel)[grid](**tensors, **sizes, **constants)


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """Have the kernels traced instead of launched, by the plans of an A100."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    driver.set_active(_Driver())
    with contextlib.ExitStack() as patches:
        patches.callback(driver.set_active, None)  # the next to ask gets the default
        for module in (gemm, gemm_dx):
            for name, other in (
                ("launch", _traced_launch),
                ("device_of", lambda device: A100),
                ("tuned", lambda plan, M, weight, device: plan),
            ):
                patches.enter_context(mock.patch.object(module, name, other))
        yield


class Block(nn.Module):
    """A product between what Inductor would fuse: ``x + silu(rms_norm(x) @ W)``."""

    def __init__(self, op: Callable[..., Tensor], device: str, act_order: bool) -> None:
        super().__init__()
        self.op = op

        def words(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.int32, device=device)

        self.register_buffer("qweight", words(SIZE // 8, SIZE))
        self.register_buffer("qzeros", words(SIZE // GROUP, SIZE // 8))
        self.register_buffer("scales", torch.empty(SIZE // GROUP, SIZE, dtype=torch.float16, device=device))
        self.register_buffer("perm", words(SIZE if act_order else 0))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        product = self.op(F.rms_norm(x, (SIZE,)), self.qweight, self.qzeros, self.scales, self.perm)
        return (x + F.silu(product),)


class Seen(NamedTuple):
    """What was seen of one block.

    Args:
        nodes: calls in the graph that AOTAutograd makes.
        seconds: for making it.
        weights_written: weights that it takes as written to, and copies.
        scheduled: what Inductor runs after its fusion; an op counts as one, whatever it launches.
        generated: of them, kernels that Inductor writes.
    """

    nodes: int
    seconds: float
    weights_written: int
    scheduled: int
    generated: int


def measure(op: Callable[..., Tensor], M: int, act_order: bool) -> Seen:
    """Trace and lower a block."""
    with FakeTensorMode() as mode, torch.no_grad():
        x = torch.empty(M, SIZE, dtype=torch.float16, device="cuda")
        block = Block(op, "cuda", act_order)
        seconds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            graph, signature = aot_export_module(block, (x,), trace_joint=False)
            seconds.append(time.perf_counter() - start)
        assert isinstance(graph, GraphModule)
        calls = [
            n for n in graph.graph.nodes if n.op == "call_function" and getattr(n.target, "__name__", "") != "getitem"
        ]
        nodes = _scheduled(Block(op, "cpu", act_order), x.to("cpu"), mode)
    generated = [node for node in nodes if not isinstance(node, ExternKernelSchedulerNode)]
    launches = [node for node in nodes if type(node.node).__name__ != "MultiOutput"]  # of an op's result, its name
    return Seen(len(calls), statistics.median(seconds), len(signature.buffers_to_mutate), len(launches), len(generated))


def _scheduled(block: Block, x: Tensor, mode: FakeTensorMode) -> list[Any]:
    """What Inductor would run, after its passes and its fusion."""
    table = select_decomp_table()
    graph, _ = aot_export_module(block, (x,), trace_joint=False, decompositions=table)
    assert isinstance(graph, GraphModule)
    inputs = [*block.buffers(), x]
    with DebugContext(), V.set_fake_mode(mode):
        post_grad_passes(graph, is_inference=True)
        lowering = GraphLowering(graph, example_inputs=inputs)
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            scheduled = Scheduler(lowering.operations).nodes
    return [node for node in scheduled if not isinstance(node, NopKernelSchedulerNode)]


def variants() -> dict[str, dict[str, Callable[..., Tensor]]]:
    """By op, and by how it is registered."""

    def as_triton_op(name: str, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def function(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
            return compute(x, qweight, qzeros, scales, g_idx, *OPTIONS)

        function.__annotations__ = dict.fromkeys(("x", "qweight", "qzeros", "scales", "g_idx", "return"), Tensor)
        return triton_op(f"exllama_benchmark::{name}", function, mutates_args=())

    def plain(name: str) -> Callable[..., Tensor]:
        op = getattr(torch.ops.exllama, name)
        return lambda x, *weight: op(x, *weight, *OPTIONS)

    computes = {"gptq_gemm": gemm.gptq_gemm, "gptq_gemm_dx": gemm_dx.gptq_gemm_dx}
    return {name: {"plain": plain(name), "triton_op": as_triton_op(name, f)} for name, f in computes.items()}


def main() -> int:
    """Print the table; returns the exit status."""
    columns = (
        "op",
        "M",
        "order",
        "as",
        "graph nodes",
        "tracing, s",
        "weights taken as written",
        "scheduled",
        "of them Inductor's",
    )
    emit(
        f"x + silu(op(rms_norm(x))), {SIZE} x {SIZE}, 4 bits, groups of {GROUP}, float16, the plans of an A100; "
        f"torch {torch.__version__}, Triton {triton.__version__}. Never run on a GPU.\n\n"
        "torch cannot analyse a kernel with tuples of pointers, as gptq_gemm's is, and takes every tensor beside them "
        "for written: even a sorted weight's empty permutation. In gptq_gemm_dx a permutation is, by its assertion.\n\n"
    )
    emit("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|\n")
    with traceable():
        for name, ways in variants().items():
            for act_order in (False, True):
                for M in TOKENS:
                    for way, op in ways.items():
                        seen = measure(op, M, act_order)
                        order = "act-order" if act_order else "sorted"
                        cells = (name, M, order, way, seen.nodes, f"{seen.seconds:.2f}", *seen[2:])
                        emit("| " + " | ".join(map(str, cells)) + " |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
