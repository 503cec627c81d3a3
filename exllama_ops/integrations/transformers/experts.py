"""Experts that files hold one by one, behind transformers' interface for experts: one product for all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from exllama_ops import backends
from exllama_ops.integrations.transformers.names import ExpertPlace
from exllama_ops.integrations.transformers.pending import initialized
from exllama_ops.nn import ExllamaLinear
from exllama_ops.nn.experts import sum_of_experts, sum_of_sorted_rows
from exllama_ops.nn.packed_experts import PackedExperts

# The name by which a config of transformers asks for `experts_forward`.
IMPLEMENTATION = "exllama"

# On a module of experts: what the files call its projections, (gate, up, down) or (up, down).
_PROJECTIONS = "_exllama_projections"
# Likewise: the weights of each projection in stacks, if they can be.
_STACKS = "exllama_stacks"


class _Expert(nn.Module):
    """The layers of one expert. Who puts another module in the place of a layer, an adapter say, gets it called."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self._experts = (experts,)  # in a tuple, so that it is no child

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and isinstance(self._modules.get(name), ExllamaLinear):
            _release(self._experts[0]._modules.pop(_STACKS, None))
        super().__setattr__(name, value)


def _release(stacks: nn.Module | None) -> None:
    for stack in () if stacks is None else stacks.modules():
        if isinstance(stack, PackedExperts):
            stack.release()


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The sum over the chosen experts of ``weight * down(act(gate(x)) * up(x))``, for each token.

    One product a projection has the rows of all experts, by `exllama_ops.nn.experts.sum_of_sorted_rows`. Where the
    weights cannot be in stacks, or a layer was replaced, each expert makes its own, by `sum_of_experts` there.

    Args:
        self: a module of experts that `take_experts` changed. With other modules transformers' own product runs.
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, k) int64, the experts of each token; numbers past the last one are left out.
        top_k_weights: (tokens, k), their weights.

    Returns:
        (tokens, hidden) in the dtype of hidden_states.

    Source: ``grouped_mm_experts_forward`` of transformers 5.24.
    """
    names = getattr(self, _PROJECTIONS, None)
    if names is None:
        dense: Tensor = moe.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return dense
    stacks = self._modules.get(_STACKS)
    if stacks is not None and _is_served(hidden_states.device.type):

        def experts(x: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
            *into, down = stacks
            return _finished(self, [stack(x, offsets, ids) for stack in into], lambda x: down(x, offsets, ids))

        return sum_of_sorted_rows(hidden_states, top_k_index, top_k_weights, self.num_experts, experts)
    *into, down = names

    def expert(index: int, x: Tensor) -> Tensor | None:
        if index >= self.num_experts:
            return None
        layers = getattr(self, str(index))
        return _finished(self, [getattr(layers, name)(x) for name in into], getattr(layers, down))

    return sum_of_experts(hidden_states, top_k_index, top_k_weights, expert)


def _finished(module: Any, into: list[Tensor], down: Callable[[Tensor], Tensor]) -> Tensor:
    """What experts do to the results of their first projections, which their gate takes as one tensor."""
    # Side by side, or in turns; one projection may have made both.
    inner = torch.cat(into, -1) if module.is_concatenated else torch.stack(into, -1).flatten(-2)
    y = down(module._apply_gate(inner) if module.has_gate else module.act_fn(inner))
    return module.post_expert_norm(y) if module.has_post_expert_norm else y


def take_experts(
    model: Any, found: Mapping[str, ExpertPlace], layers: Mapping[str, nn.Module]
) -> tuple[dict[str, str], list[str]]:
    """Put one layer per projection and expert in the place of the parameters that hold all experts.

    Args:
        model: the model, on the meta device.
        found: name in the files -> place.
        layers: name in the files -> the layer to put there.

    Returns:
        Name in the files -> name of the module in the model; and what is wrong, a sentence each. Where something is
        wrong, that module of experts is as it was.
    """
    by_module: dict[str, dict[str, ExpertPlace]] = defaultdict(dict)
    for name, place in found.items():
        by_module[place.experts][name] = place
    taken: dict[str, str] = {}
    problems: list[str] = []
    for module_name, places in by_module.items():
        module = model.get_submodule(module_name)
        reason = _reason_against(module, places, layers)
        if reason:
            problems.append(f"{module_name}: {reason}")
            continue
        by_parameter = {(place.parameter, place.part): place.projection for place in places.values()}
        order = _order(module, by_parameter)
        setattr(module, _PROJECTIONS, tuple(by_parameter[key] for key in order))
        for parameter in {place.parameter for place in places.values()}:
            for owned in (parameter, f"{parameter}_bias"):
                if module._parameters.pop(owned, None) is not None:
                    setattr(module, owned, initialized())
        for name, place in places.items():
            if str(place.index) not in module._modules:
                module.add_module(str(place.index), _Expert(module))
            layers[name].register_buffer("bias", None)  # a loader would look for it by a name that files may not have
            module.get_submodule(str(place.index)).add_module(place.projection, layers[name])
            taken[name] = f"{module_name}.{place.index}.{place.projection}"
        module.config._experts_implementation = IMPLEMENTATION
    if taken:
        moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    return taken, problems


class ExpertStacks:
    """Brings the weights of experts into stacks while they are read, so that one at most is in memory twice."""

    def __init__(self) -> None:
        # By the name of the module, then by projection; None where the weights cannot be in a stack.
        self._stacks: dict[str, dict[str, PackedExperts | None]] = defaultdict(dict)

    def put(self, model: nn.Module, target: str, layer: ExllamaLinear) -> None:
        """Take a layer that was read.

        Args:
            model: the model.
            target: name of the layer in it.
            layer: with its weight.
        """
        path, _, projection = target.rpartition(".")
        name, _, index = path.rpartition(".")
        stacks = self._stacks[name]
        # accelerate moves the layers with hooks one by one.
        can_be = not layer.qweight.is_meta and not hasattr(layer, "_hf_hook")
        if projection not in stacks:
            module: Any = model.get_submodule(name)
            stacks[projection] = PackedExperts(layer, module.num_experts) if can_be else None
        stack = stacks[projection]
        if stack is not None and can_be and not stack.reason_against(layer):
            stack.put(int(index), layer)
        elif stack is not None:
            stack.release()
            stacks[projection] = None

    def finish(self, model: nn.Module) -> None:
        """Hand each module of experts its stacks, if it has all of them.

        What stood for the parameters while transformers initialized its modules is dropped.
        """
        for name, stacks in self._stacks.items():
            module: Any = model.get_submodule(name)
            for parameter in ("gate_up_proj", "up_proj", "down_proj"):
                for owned in (parameter, f"{parameter}_bias"):
                    vars(module).pop(owned, None)
            found = [stacks[projection] for projection in getattr(module, _PROJECTIONS)]
            full = nn.ModuleList(stack for stack in found if stack is not None and stack.is_full)
            if len(full) == len(found):
                # After the layers: what is done to modules is done to those first.
                module.add_module(_STACKS, full)
            else:
                _release(full)


def run_in_graphs(model: nn.Module) -> bool:
    """Whether no experts of a model are called one by one, for which the host reads who was chosen."""
    found: list[Any] = [module for module in model.modules() if hasattr(module, _PROJECTIONS)]
    return all(
        _STACKS in module._modules and _is_served(module.get_submodule(_STACKS)[0].qweight.device.type)
        for module in found
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_served(device: str) -> bool:
    """Whether a kernel of gptq_moe_gemm computes on a device.

    On a GPU the reference would take all rows for each expert, where the layers have kernels.
    """
    return device in ("cpu", "meta") or backends.has_kernel("gptq_moe_gemm", device)


def _order(module: Any, found: Container[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
    """The projections of an expert as `experts_forward` wants them, (parameter, part), by those that were found."""
    if not module.has_gate:
        return [("up_proj", 0), ("down_proj", 0)]
    if ("gate_up_proj", None) in found:
        return [("gate_up_proj", None), ("down_proj", 0)]
    return [("gate_up_proj", 0), ("gate_up_proj", 1), ("down_proj", 0)]


def _reason_against(module: Any, places: Mapping[str, ExpertPlace], layers: Mapping[str, nn.Module]) -> str:
    """Why quantized experts cannot run in a module; empty if they can."""
    if not hasattr(module, "has_gate"):
        return f"{type(module).__name__} does not take its experts through transformers' interface for experts"
    kinds = {(place.parameter, place.part) for place in places.values()}
    order = _order(module, kinds)
    missing = set(range(module.num_experts)) - {place.index for place in places.values()}
    if missing or len(places) != module.num_experts * len(order):
        return (
            f"all {module.num_experts} experts must be quantized, with {len(order)} projections each; the files have "
            f"{len(places)} such layers"
        )
    if kinds != set(order):
        return f"{type(module).__name__} merges other projections than gate, up and down"
    for name, place in places.items():
        outputs, inputs = getattr(module, place.parameter).shape[1:]
        if module.is_transposed:
            outputs, inputs = inputs, outputs
        parts = 2 if place.parameter == "gate_up_proj" and place.part is not None else 1
        expected = (inputs, outputs // parts)
        got = (layers[name].in_features, layers[name].out_features)
        if expected != got:
            return f"{name} must have a weight of (K, N) = {expected}; got {got}"
        if place.part is None and module.is_concatenated:
            return f"{type(module).__name__} keeps gate and up side by side, and {name} may have them in turns"
        if module.has_bias and layers[name].bias is None:
            return f"{name} has a bias in the model, which the files lack"
    return ""
