"""PEFT over quantized layers: `register` lets LoRA take an `ExllamaLinear` for the linear layer that it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from torch import nn

from exllama_ops.extras import require
from exllama_ops.nn import ExllamaLinear

require("peft", "peft")
import peft  # noqa: E402 (after the check that says what to install)
from peft.tuners import lora, tuners_utils  # noqa: E402
from peft.tuners.lora import model as lora_model  # noqa: E402

# These ways to make the first adapter read the base weight at most. All others of peft write to it.
_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")

_NAMES_SHOWN = 4

# What undoes the registration, and how many calls of `register` want it.
_undo = ExitStack()
_calls = 0


class ExllamaLoraLinear(lora.Linear):  # type: ignore[misc]
    """LoRA beside an `ExllamaLinear`: ``y = layer(x) + scaling * B(A(x))``.

    It is peft's adapter for nn.Linear, DoRA and the other variants included. DoRA dequantizes the weight at each call.

    Raises:
        ValueError: it is asked to merge.
    """

    # The weight reads as (N, K), whatever the layer was that it replaced.
    fan_in_fan_out = property(lambda self: False, lambda self, value: None)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, ExllamaLinear)
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(_merge_refusal([type(self.get_base_layer()).__name__]))


def register() -> ExitStack:
    """Let PEFT put LoRA adapters over `ExllamaLinear`, in this process and from now on.

    ``get_peft_model``, ``PeftModel.from_pretrained``, ``load_adapter`` and ``target_modules="all-linear"`` then take
    quantized layers as they take nn.Linear. Calling it again changes nothing.

    Returns:
        A context manager that undoes this call when it is left, or by ``close()``. Models that were adapted meanwhile
        keep working.

    Raises:
        RuntimeError: this version of peft lacks one of the functions that are extended.

    PEFT then refuses by name, before it changes the model, what a packed weight cannot do. That is merging, methods
    other than LoRA, and initializations that write to the base weight.
    """
    global _calls
    if _calls == 0:
        _extend()
    _calls += 1
    registration = ExitStack()
    registration.callback(_leave)
    return registration


def _extend() -> None:
    extended: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (lora_model, "dispatch_gptq", _with_our_layer),
        (tuners_utils, "_maybe_include_all_linear_layers", _with_quantized_layers),
        (tuners_utils.BaseTuner, "_check_merge_allowed", _with_merge_refused),
    ]
    missing = [f"{owner.__name__}.{name}" for owner, name, _ in extended if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(f"register: peft {peft.__version__} has no {', '.join(missing)}; 0.18 to 0.21 are known")
    for owner, name, extend in extended:
        original = getattr(owner, name)
        setattr(owner, name, extend(original))
        _undo.callback(setattr, owner, name, original)


def _leave() -> None:
    global _calls
    _calls -= 1
    if _calls == 0:
        _undo.close()


def _with_our_layer(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    """The function that makes adapters of GPTQ layers, which knows the layer of gptqmodel alone."""

    def dispatch_gptq(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
        if _is_quantized(target):
            return ExllamaLoraLinear(target, adapter_name, **kwargs)
        adapter: nn.Module | None = dispatch(target, adapter_name, **kwargs)
        return adapter

    return dispatch_gptq


def _with_quantized_layers(include: Callable[[Any, nn.Module], Any]) -> Callable[[Any, nn.Module], Any]:
    """The function that resolves "all-linear". PEFT calls it before it replaces the first module."""

    def include_all_linear(config: Any, model: nn.Module) -> Any:
        targets = getattr(config, "target_modules", None)
        config = include(config, model)
        if isinstance(targets, str) and targets.lower() == "all-linear":
            config.target_modules = {*config.target_modules, *_layers_without_adapter(model)}
        _check(config, model)
        return config

    return include_all_linear


def _with_merge_refused(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """The method that says whether adapters can be merged. PEFT calls it before it merges the first one."""

    def check_merge_allowed(tuner: Any) -> None:
        quantized = [name for name, module in tuner.model.named_modules() if _has_adapter(module)]
        if quantized:
            raise ValueError(_merge_refusal(quantized))
        check(tuner)

    return check_merge_allowed


def _is_quantized(module: nn.Module) -> bool:
    """Whether this is a quantized layer, with or without adapters."""
    return isinstance(module, ExllamaLinear) or _has_adapter(module)


def _has_adapter(module: nn.Module) -> bool:
    return isinstance(module, tuners_utils.BaseTunerLayer) and isinstance(module.get_base_layer(), ExllamaLinear)


def _layers_without_adapter(model: Any) -> Iterator[str]:
    """The quantized layers that no adapter holds, but for the output head, which "all-linear" leaves out."""
    head = model.get_output_embeddings() if isinstance(model, tuners_utils.PreTrainedModel) else None
    held = {id(module.get_base_layer()) for module in model.modules() if _has_adapter(module)}
    for name, module in model.named_modules():
        if isinstance(module, ExllamaLinear) and module is not head and id(module) not in held:
            yield name


def _check(config: Any, model: nn.Module) -> None:
    """Refuse by name what cannot be done with the quantized layers that a config names."""
    trained = [name for name in getattr(config, "modules_to_save", None) or () if _is_saved_whole(model, name)]
    if trained:
        raise ValueError(
            f"PEFT: modules_to_save={trained} would be trained whole, and quantized layers have nothing to train; name "
            "them in target_modules instead"
        )
    targets = [
        name
        for name, module in model.named_modules()
        if _is_quantized(module) and tuners_utils.check_target_module_exists(config, name)
    ] if getattr(config, "target_modules", None) else []  # fmt: skip
    if not targets:
        return
    method = getattr(config.peft_type, "value", config.peft_type)
    if method != "LORA":
        raise ValueError(
            f"PEFT: {method} has no adapter for the quantized layers {_listed(targets)}; use peft.LoraConfig, or take "
            "them out of target_modules"
        )
    if config.init_lora_weights not in _INITS or getattr(config, "kasa_config", None) is not None:
        what = (
            "kasa_config" if config.init_lora_weights in _INITS else f"init_lora_weights={config.init_lora_weights!r}"
        )
        raise ValueError(
            f"PEFT: {what} writes to the base weights, and those of {_listed(targets)} are packed; use "
            f"init_lora_weights=True, 'gaussian', 'orthogonal' or 'eva'"
        )


def _is_saved_whole(model: nn.Module, saved: str) -> bool:
    """Whether a name of modules_to_save means a module with quantized layers and no parameter beside them."""
    for name, module in model.named_modules():
        if name == saved or name.endswith(f".{saved}"):
            quantized = any(_is_quantized(member) for member in module.modules())
            if quantized and next(module.parameters(), None) is None:
                return True
    return False


def _merge_refusal(names: list[str]) -> str:
    return (
        f"PEFT: adapters cannot be merged into packed weights, as those of {_listed(names)} are; keep them beside the "
        "model, by save_pretrained and PeftModel.from_pretrained, or merge them into a dense model, whose layers hold "
        "ExllamaLinear.dequantize()"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
