"""How `torch.fx.symbolic_trace` sees a layer: as one node, like nn.Linear."""

from __future__ import annotations

from torch import nn
from torch.fx import Proxy


def call_as_leaf(module: nn.Module, x: object) -> Proxy | None:
    """The node that calls a module, for its forward to return where x is no Tensor.

    torch.fx takes the modules of torch.nn for leaves, and enters the forward of every other one.

    Args:
        module: a module of the one argument x.
        x: what its forward was given.

    Returns:
        The result of the call. None where the forward itself must be traced: of the module that is traced as a whole,
        and of one with forward hooks, which are in the graph already and would run again in a call.

    Raises:
        TypeError: x does not come from a tracer either.
    """
    if not isinstance(x, Proxy):
        raise TypeError(f"{type(module).__name__}: x must be a Tensor; got {type(x).__name__}")
    name = x.tracer.path_of_module(module)  # type: ignore[attr-defined]
    if not name or module._forward_hooks or module._forward_pre_hooks:
        return None
    return x.tracer.create_proxy("call_module", name, (x,), {})
