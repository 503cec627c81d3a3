"""The Dynamo backend "exllama": Inductor, with our pass over the graphs that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from exllama_ops.compile.shared_input import FuseSharedInput

_PASS_OPTION = "pre_grad_custom_pass"


def exllama(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph as Inductor does, with `FuseSharedInput` before autograd; for ``torch.compile``, by its name.

    The name is found without importing this package, by the entry point group ``torch_dynamo_backends``.

    Args:
        graph: of Dynamo.
        example_inputs: of the graph.
        mode: of Inductor: "default", "reduce-overhead", "max-autotune" or "max-autotune-no-cudagraphs".
        options: of Inductor, by name as in ``torch._inductor.config``.

    Returns:
        The compiled graph.

    Raises:
        ValueError: Inductor has no such mode or option, or the option is the one that this backend sets.
    """
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, example_inputs, config_patches=_config(mode, options or {}))  # type: ignore[return-value]


def _config(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise ValueError(f'backend "exllama": mode must be one of {", ".join(modes)}; got {mode!r}')
    named = {name.replace("-", "_"): value for name, value in options.items()}
    unknown = sorted(named.keys() - torch._inductor.list_options())
    if unknown:
        raise ValueError(f'backend "exllama": options must be of torch._inductor.config; got {", ".join(unknown)}')
    if _PASS_OPTION in named:
        raise ValueError(
            f'backend "exllama": the option {_PASS_OPTION} is its own; with backend="inductor", a pass of yours can '
            "call exllama_ops.compile.FuseSharedInput"
        )
    return {**(modes[mode] if mode else {}), **named, _PASS_OPTION: FuseSharedInput()}


def _reset() -> None:
    """What Inductor does when Dynamo is reset."""
    if torch.cuda.is_initialized():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


exllama.reset = _reset  # type: ignore[attr-defined]  # where torch.compile looks for it
