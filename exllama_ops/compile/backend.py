"""The Dynamo backend "exllama": Inductor, with our pass over the graphs that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from exllama_ops.compile.shared_input import FuseSharedInput

_PASS_OPTION = "pre_grad_custom_pass"
_SWITCH = "use_pre_grad_passes"


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
        mode: of Inductor: "default", "reduce-overhead", "max-autotune" or "max-autotune-no-cudagraphs"; "lite" runs
            no passes.
        options: of Inductor, by name as in ``torch._inductor.config``.

    Returns:
        The compiled graph.

    Raises:
        ValueError: Inductor has no such mode or option, or another type for it. Or one of them, or
            ``torch._inductor.config``, keeps passes from running or has another one in the place of ours.
    """
    compiled: Callable[..., Any] = _inductor(mode, options or {})(graph, example_inputs)
    return compiled


def _inductor(mode: str | None, options: Mapping[str, Any]) -> Any:
    """What ``torch.compile(backend="inductor")`` calls, with our pass among its options."""
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise ValueError(f'backend "exllama": mode must be one of {", ".join(modes)}; got {mode!r}')
    named = {name.replace("-", "_"): value for name, value in options.items()}
    unknown = sorted(named.keys() - torch._inductor.list_options())
    if unknown:
        raise ValueError(f'backend "exllama": options must be of torch._inductor.config; got {", ".join(unknown)}')
    in_use = getattr(torch._inductor.config, _PASS_OPTION)
    if _PASS_OPTION in named or not isinstance(in_use, FuseSharedInput | None):
        raise ValueError(
            f'backend "exllama": {_PASS_OPTION}, among the options and in torch._inductor.config, is its own; with '
            'backend="inductor", a pass of yours can call exllama_ops.compile.FuseSharedInput'
        )
    try:
        inductor = torch._TorchCompileInductorWrapper(mode, {**named, _PASS_OPTION: FuseSharedInput()}, None)
    except RuntimeError as error:
        raise ValueError(f'backend "exllama": {error}') from error
    if not inductor.config.get(_SWITCH, getattr(torch._inductor.config, _SWITCH)):
        by = "the options" if _SWITCH in named else f"mode {mode!r}" if _SWITCH in inductor.config else "the config"
        raise ValueError(
            f'backend "exllama": needs {_SWITCH}, without which its pass does not run; {by} switched it off'
        )
    return inductor


def _reset() -> None:
    """What Inductor does when Dynamo is reset."""
    if torch.cuda.is_initialized():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


exllama.reset = _reset  # type: ignore[attr-defined]  # where torch.compile looks for it
