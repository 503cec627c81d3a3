"""Tiny models of many families as GPTQ checkpoints, beside the dense models that have the same weights."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from exllama_ops.checkpoint import save_gptq
from exllama_ops.layout import GptqWeight
from exllama_ops.nn import quantize

VOCABULARY = 96
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {**_TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OLD = {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1}
_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}


def _vision() -> dict[str, Any]:
    sizes = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    return {**sizes, "patch_size": 14, "spatial_merge_size": 1, "temporal_patch_size": 1}


# Configs by family. A family that a config does not name runs on the same code as one of these.
CONFIGS: dict[str, Callable[[], Any]] = {
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, multi_query=True
    ),
    "gpt2": lambda: transformers.GPT2Config(**_OLD, eos_token_id=2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **{k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}, tie_word_embeddings=False
    ),
    "phi3": lambda: transformers.Phi3Config(**_TEXT),
    "mixtral": lambda: transformers.MixtralConfig(**_TEXT, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**_EXPERTS, head_dim=16),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**_TEXT, "num_key_value_heads": 4},
        **_MLA,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_TEXT, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8, time_step_rank=32
    ),
    "lfm2": lambda: transformers.Lfm2Config(**_TEXT, layer_types=["conv", "full_attention"]),
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "qwen2_vl": lambda: transformers.Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": _ROPE},
        vision_config=_vision(),
        vision_start_token_id=90,
        vision_end_token_id=91,
        image_token_id=92,
        video_token_id=93,
    ),
}

# Names that hubs have, for the names that transformers gives: (pattern, replacement) in turn.
HUB_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "gpt_neox": ((r"^lm_head", "embed_out"),),
    "mixtral": ((r"\.mlp\.", ".block_sparse_moe."), ("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")),
    "qwen2_vl": ((r"^model\.language_model", "model"), (r"^model\.visual", "visual")),
}

_AUTO = {"t5": "AutoModelForSeq2SeqLM", "qwen2_vl": "AutoModelForImageTextToText"}
_IN_BLOCKS = re.compile(r"(^|\.)(layers|h|block)\.\d+\.(?!.*(visual|gate\.))")


def write(
    family: str,
    path: Path,
    *,
    names: tuple[tuple[str, str], ...] = (),
    head: bool = False,
    quantizes_experts: bool = True,
    act_order: bool = False,
    skip: Callable[[str], bool] = lambda name: False,
) -> nn.Module:
    """Write a checkpoint; return the dense float32 model whose weights are those of its packed layers.

    Args:
        family: a key of `CONFIGS`.
        path: the directory.
        names: renames the tensors in the files.
        head: whether the output head is quantized too.
        quantizes_experts: whether experts are packed, each projection on its own; else they are dense, and merged.
        act_order: whether weights are asymmetric and have an order of rows of their own; else neither.
        skip: whether a module, by its name before it is renamed, stays dense and is left out of the files.
    """
    torch.manual_seed(0)
    config = CONFIGS[family]()
    auto = getattr(transformers, _AUTO.get(family, "AutoModelForCausalLM"))
    model = auto.from_config(config, dtype=torch.float32).eval()
    model.tie_weights()
    weights: dict[str, GptqWeight] = {}
    packed: set[str] = set()

    def rename(name: str) -> str:
        return functools.reduce(lambda text, pair: re.sub(*pair, text), names, name)

    def pack(name: str, dense: Tensor, bias: Tensor | None = None) -> Tensor:
        """Round (N, K) in place, and put it among the packed weights unless it is skipped."""
        K = dense.shape[1]
        g_idx = (torch.arange(K, dtype=torch.int32) // 32)[torch.randperm(K)] if act_order else None
        bias = None if bias is None else bias.half()
        weight = quantize(dense.contiguous(), 4, 32, not act_order, g_idx=g_idx, bias=bias)
        if not skip(name):
            weights[rename(name)] = weight
        return _dense(weight)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):  # of experts, which begin as 0
                parameter.normal_(std=0.1)
            parameter.copy_(parameter.half().float())
        for name, module in model.named_modules():
            if not _IN_BLOCKS.search(f"{name}.") and not (head and module is model.get_output_embeddings()):
                continue
            if isinstance(module, transformers.pytorch_utils.Conv1D):
                module.weight.copy_(pack(name, module.weight.t(), module.bias).t())
                packed.add(name)
            elif isinstance(module, nn.Linear) and module.out_features % 8 == 0:  # routers stay dense
                module.weight.copy_(pack(name, module.weight, module.bias))
                packed.add(name)
            elif (
                quantizes_experts and hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter)
            ):
                for index, (into, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
                    if module.is_transposed:  # and in turns
                        bias = module.gate_up_proj_bias[index], module.down_proj_bias[index]
                        into.copy_(pack(f"{name}.gate_up.{index}", into.t(), bias[0]).t())
                        down.copy_(pack(f"{name}.down.{index}", down.t(), bias[1]).t())
                        continue
                    half = len(into) // 2
                    into[:half] = pack(f"{name}.{index}.gate_proj", into[:half])
                    into[half:] = pack(f"{name}.{index}.up_proj", into[half:])
                    down.copy_(pack(f"{name}.{index}.down_proj", down))
                packed.add(name)
    saved = model.state_dict().keys()
    own = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in saved)]
    tensors = {rename(name): tensor.detach().half() for name, tensor in own if name.rpartition(".")[0] not in packed}
    fields = json.loads(config.to_json_string(use_diff=False))
    fields |= {"architectures": [type(model).__name__], "dtype": "float16"}
    save_gptq(path, weights, tensors, sym=not act_order, desc_act=act_order, config=fields)
    return model


def _dense(weight: GptqWeight) -> Tensor:
    """(N, K) of a weight of 4 bits in groups of 32."""
    shifts = torch.arange(0, 32, 4)
    q = ((weight.qweight.unsqueeze(1) >> shifts.view(1, 8, 1)) & 15).flatten(0, 1)
    z = ((weight.qzeros.unsqueeze(2) >> shifts) & 15).flatten(1)
    groups = torch.arange(len(q)) // 32 if weight.g_idx is None else weight.g_idx
    return ((q - z[groups]) * weight.scales.float()[groups]).t()


def inputs(model: Any) -> dict[str, Tensor]:
    """Arguments of a forward without a cache."""
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    """The logits of `inputs`."""
    result: Tensor = model(**inputs(model), use_cache=False).logits
    return result
