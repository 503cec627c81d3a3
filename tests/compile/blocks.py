"""A block as models have it, and backends that show what the pass makes of its graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.debugging import aot_eager, eager
from torch._functorch.aot_autograd import make_boxed_func

from exllama_ops import ExllamaLinear, quantize
from exllama_ops.compile import FuseSharedInput

K, HEADS = 96, 3
_G_IDX = 4  # its place among the arguments of an op


def order_of(seed: int) -> torch.Tensor:
    """A g_idx with activation order, of groups of 32."""
    return (torch.arange(K) // 32)[torch.randperm(K, generator=torch.Generator().manual_seed(seed))]


class Block(nn.Module):
    """Attention without positions, and an MLP; q, k and v share an order of rows, gate and up another."""

    def __init__(self, act_order: bool = False, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def linear(out_features: int, in_features: int = K, bias: bool = False, order: int = 0) -> ExllamaLinear:
            weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
            g_idx = order_of(10 * seed + order) if act_order and in_features == K else None
            offset = torch.randn(out_features, generator=generator) if bias else None
            return ExllamaLinear.from_weight(quantize(weight, 4, 32, g_idx=g_idx, bias=offset))

        self.q, self.k, self.v = linear(K, bias=True), linear(32), linear(32)
        self.o = linear(K, order=1)
        self.gate, self.up, self.down = linear(64, order=2), linear(64, order=2), linear(K, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x).unflatten(-1, (HEADS, -1)), self.k(x).unsqueeze(-2), self.v(x).unsqueeze(-2)
        x = x + self.o(((q * k).sum(-1, keepdim=True).tanh() * v).flatten(-2))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Recorder:
    """A backend: the pass, then AOTAutograd and eager ops. What it was given and made is kept.

    Attributes:
        before: the graphs of Dynamo.
        after: the same after the pass.
        aot: the graphs of AOTAutograd, forward ones and backward ones.
        orders: of each of those, the length of the order of rows of each product: 0 for none.
    """

    def __init__(self) -> None:
        self.before: list[Counter[str]] = []
        self.after: list[Counter[str]] = []
        self.aot: list[Counter[str]] = []
        self.orders: list[list[int]] = []

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.before.append(ops(graph))
        run_pass(graph)
        self.after.append(ops(graph))
        return aot_eager(graph, inputs, fw_compiler=self._record, bw_compiler=self._record)

    def _record(self, graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.aot.append(ops(graph))
        products = (node for node in graph.graph.nodes if "exllama.gptq_gemm" in str(node.target))
        self.orders.append([node.args[_G_IDX].meta["val"].shape[0] for node in products])
        return make_boxed_func(eager(graph, inputs))


def run_pass(graph: fx.GraphModule) -> None:
    """The pass over a graph and those inside, as Inductor runs it."""
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            FuseSharedInput()(module.graph)
            module.graph.lint()
            module.recompile()


def ops(graph: fx.GraphModule) -> Counter[str]:
    """How often each of our ops is in a graph and those inside: "gptq_gemm_multi/3" for one of three parts.

    Overloads that are not the default one follow: "gptq_gemm.no_autograd".
    """
    count: Counter[str] = Counter()
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            namespace, *name = str(node.target).removesuffix(".default").split(".")
            if namespace == "exllama":
                name[0] += f"/{len(node.args[1])}" if name[0].endswith("multi") else ""
                count[".".join(name)] += 1
    return count


FUSED = Counter({"gptq_gemm_multi/3": 1, "gptq_gemm_multi/2": 1, "gptq_gemm": 2})
FUSED_AOT = Counter({f"{name}.no_autograd": count for name, count in FUSED.items()})
