"""What transformers generates with this library's layers, and how sure each token is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from exllama_ops import ExllamaLinear, convert, open_checkpoint

# Twice what two programs may differ by in a logit, as parts of the largest: tests/integrations/test_transformers.py
# has those bounds.
_SURE = {torch.float16: 4e-3, torch.bfloat16: 2e-2}


def model(path: Path, dtype: torch.dtype) -> Any:
    """A model of transformers, of any version, whose quantized layers are this library's."""
    checkpoint = open_checkpoint(path)
    config = transformers.AutoConfig.from_pretrained(path)
    vars(config).pop("quantization_config", None)
    built = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if set(checkpoint.quantized) & {"lm_head"}:
        built.config.tie_word_embeddings = False
    tensors = {name: checkpoint.read_tensor(name).to(dtype) for name in checkpoint.dense}
    built.load_state_dict(tensors, strict=False)
    experts = [name for name in checkpoint.quantized if ".experts." in name]
    convert(built, {name: checkpoint.read(name) for name in checkpoint.quantized if name not in experts})
    for name in experts:
        _fill_expert(built, name, ExllamaLinear.from_weight(checkpoint.read(name)).dequantize().to(dtype))
    return built


def _fill_expert(built: Any, name: str, dense: Tensor) -> None:
    """Put the dense weight (N, K) of one projection of one expert where transformers has those of all."""
    module, index, projection = re.fullmatch(r"(.+)\.(\d+)\.(\w+)_proj", name).groups()  # type: ignore[union-attr]
    all_experts = built.get_submodule(module)
    if projection == "down":
        all_experts.down_proj.data[int(index)] = dense
    else:
        half = dense.shape[0] if projection == "up" else 0
        all_experts.gate_up_proj.data[int(index), half : half + dense.shape[0]] = dense


def adapt(built: Any, parts: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Let each layer add ``2 * x @ A.T @ B.T``, for its name -> A, B."""

    def added(A: Tensor, B: Tensor) -> Callable[[Any, tuple[Tensor], Tensor], Tensor]:
        delta = 2 * A.float().T @ B.float().T
        return lambda module, inputs, out: (out.float() + inputs[0].float() @ delta).to(out.dtype)

    for name, (A, B) in parts.items():
        built.get_submodule(name).register_forward_hook(added(A, B))


@torch.inference_mode()
def expected(built: Any, prompt: list[int], new: int) -> list[int]:
    """The greedy tokens that follow a prompt, up to the first whose two largest logits are too near to tell."""
    tokens: list[int] = []
    for _ in range(new):
        logits = built(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].float()
        first, second = logits.topk(2).values.tolist()
        if first - second <= _SURE[built.dtype] * logits.abs().max().item():
            break
        tokens.append(int(logits.argmax()))
    return tokens
