"""Checkpoints of each kind that vLLM refuses, small enough to be served in seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from exllama_ops import open_checkpoint, quantize, save_gptq
from vllm_plugin import formats

DATA = Path(__file__).parents[1] / "data"
VOCABULARY = 512


class Kind(NamedTuple):
    """How a random Llama is quantized."""

    bits: int
    group_size: int
    sym: bool = False
    act_order: bool = False
    checkpoint_format: str = "gptq_v2"
    head_bits: int | None = None
    format: str = "gptq"


# The names say what each pins down. 192 inputs are one group of 128 and half of one.
KINDS = {
    "2bit-act-v2": Kind(2, 32, act_order=True),
    "3bit-act-v1": Kind(3, 32, act_order=True, checkpoint_format="gptq"),
    "4bit-asym-act-v1": Kind(4, 64, act_order=True, checkpoint_format="gptq"),
    "4bit-sym-partial": Kind(4, 128, sym=True, checkpoint_format="gptq"),
    "8bit-act-v1": Kind(8, 32, act_order=True, checkpoint_format="gptq"),
    "4bit-head-of-8": Kind(4, 64, sym=True, checkpoint_format="gptq", head_bits=8),
    "awq-partial": Kind(4, 128, format="awq"),
    "autoround-3bit": Kind(3, 32, sym=True, format="auto-round"),
    "compressed-act": Kind(4, 32, act_order=True, format="compressed-tensors"),
}


def write(kind: Kind, path: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Llama of two layers, 4 heads of 48 and 2 for keys."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = transformers.LlamaConfig(
        **{**sizes, **heads, "vocab_size": VOCABULARY, "max_position_embeddings": 256, **changes}
    )
    model = transformers.LlamaForCausalLM(config).half()
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name != "lm_head" or kind.head_bits):
            bits = kind.head_bits if name == "lm_head" else kind.bits
            weights[name] = _quantized(module, bits or kind.bits, kind, seed)
    tensors = {name: p.detach() for name, p in model.named_parameters() if name.rpartition(".")[0] not in weights}
    fields = json.loads(config.to_json_string(use_diff=False))
    formats.WRITERS[kind.format](kind, path, weights, tensors, fields | {"architectures": ["LlamaForCausalLM"]})
    return path


def write_experts(path: Path) -> Path:
    """A random Qwen3-MoE of four experts, of which a token takes two, each projection quantized on its own."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2}
    config = transformers.Qwen3MoeConfig(
        **sizes, **heads, num_experts=4, num_experts_per_tok=2, vocab_size=VOCABULARY, max_position_embeddings=256
    )
    model = transformers.Qwen3MoeForCausalLM(config).half()
    kind = Kind(4, 32, act_order=True)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "proj" in name:
            weights[name] = _quantized(module, kind.bits, kind)
        elif name.endswith(".experts"):
            for index in range(4):
                gate, up = module.gate_up_proj[index].chunk(2)
                parts = {"gate": gate, "up": up, "down": module.down_proj[index]}
                for part, weight in parts.items():
                    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                    linear.weight.data = weight.detach()
                    weights[f"{name}.{index}.{part}_proj"] = _quantized(linear, kind.bits, kind)
    dense = {name: p.detach() for name, p in model.named_parameters() if name.rpartition(".")[0] not in weights}
    tensors = {name: p for name, p in dense.items() if ".experts." not in name}
    fields = json.loads(config.to_json_string(use_diff=False)) | {"architectures": ["Qwen3MoeForCausalLM"]}
    save_gptq(path, weights, tensors, sym=False, desc_act=True, config=fields | {"dtype": "float16"})
    return path


def write_adapter(model: Path, path: Path, layers: tuple[str, ...]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """An adapter in PEFT's files, of rank 4, for the layers that are called so.

    Returns:
        Name of the layer -> A (4, K) and B (N, 4), of which the layer adds ``2 * x @ A.T @ B.T``.
    """
    torch.manual_seed(1)
    checkpoint = open_checkpoint(model)
    parts, tensors = {}, {}
    for name in checkpoint.quantized:
        if name.rpartition(".")[2] in layers:
            K, N = checkpoint.summary(name).in_features, checkpoint.summary(name).out_features
            A, B = (torch.randn(4, K) / K**0.5).half(), (torch.randn(N, 4) / 2).half()
            parts[name] = A, B
            tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
    fields = config | {"target_modules": layers, "base_model_name_or_path": str(model)}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return parts


def _quantized(module: nn.Linear, bits: int, kind: Kind, seed: int = 0) -> Any:
    K = module.in_features
    g_idx = None
    if kind.act_order:
        # q, k and v share their input, and so their order: GPTQ makes it of the activations.
        order = torch.randperm(K, generator=torch.Generator().manual_seed(K + seed))
        g_idx = (torch.arange(K) // kind.group_size)[order].int()
    weight = quantize(module.weight, bits, kind.group_size, kind.sym, g_idx=g_idx)
    return weight if module.bias is None else replace(weight, bias=torch.randn_like(module.bias.detach()) / 8)


PROMPTS = [[1, 17, 33, 4], [5, 9, 200, 13, 101, 44], [300, 2]]
