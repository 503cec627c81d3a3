"""Synthetic checkpoints and a slow decoder, written with none of the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from exllama_ops.layout import GptqWeight

DATA = Path(__file__).parents[1] / "data"
WORD = 0xFFFFFFFF


def to_int32(words: Tensor) -> Tensor:
    """Unsigned words in int64 -> the int32 with the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def pack(values: Tensor, bits: int) -> Tensor:
    """(count, n) values -> (count * bits / 32, n) int32 words, bit by bit."""
    count, n = values.shape
    words = torch.zeros(count * bits // 32, n, dtype=torch.int64)
    for k in range(count):
        for b in range(bits):
            word, shift = divmod(bits * k + b, 32)
            words[word] |= ((values[k].long() >> b) & 1) << shift
    return to_int32(words)


def unpack(words: Tensor, bits: int) -> Tensor:
    """(rows, n) int32 words -> (rows * 32 / bits, n) int64 values, bit by bit."""
    unsigned = words.long() & WORD
    rows, n = words.shape
    values = torch.zeros(rows * 32 // bits, n, dtype=torch.int64)
    for k in range(values.shape[0]):
        for b in range(bits):
            word, shift = divmod(bits * k + b, 32)
            values[k] |= ((unsigned[word] >> shift) & 1) << b
    return values


def decode(weight: GptqWeight) -> Tensor:
    """W (K, N) in float64."""
    q = unpack(weight.qweight, weight.bits).double()
    z = unpack(weight.qzeros.t(), weight.bits).t().double()
    groups = torch.arange(len(q)) // weight.group_size if weight.g_idx is None else weight.g_idx.long()
    return (q - z[groups]) * weight.scales.double()[groups]


def words_to_v1(words: Tensor, bits: int) -> Tensor:
    """v2 zero words (G, W) -> v1, one Python integer after the other."""
    rows = []
    for row in (words.long() & WORD).tolist():
        if bits == 3:
            stream = sum(word << (32 * i) for i, word in enumerate(row))
            count = len(row) * 32 // 3
            fields = [((stream >> (3 * i)) - 1) & 7 for i in range(count)]
            stream = sum(value << (3 * i) for i, value in enumerate(fields))
            rows.append([(stream >> (32 * i)) & WORD for i in range(len(row))])
        else:
            ones = sum(1 << i for i in range(0, 32, bits))
            rows.append([(word - ones) & WORD for word in row])
    return to_int32(torch.tensor(rows))


def module(
    name: str = "m.q",
    *,
    K: int = 64,
    N: int = 32,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    act: bool = False,
    bias: bool = False,
    fmt: str = "gptq",
    seed: int = 0,
) -> dict[str, Tensor]:
    """The tensors of one quantized module, as a file has them."""
    gen = torch.Generator().manual_seed(seed)
    size = K if group_size == -1 else group_size
    groups = -(-K // size)
    zeros = torch.full((groups, N), 2 ** (bits - 1))
    if not sym:
        zeros = torch.randint(0, 2**bits, (groups, N), generator=gen)
        zeros[0, 1] = 0
    words = pack(zeros.t(), bits).t().contiguous()
    g_idx = torch.arange(K, dtype=torch.int32) // size
    tensors = {
        f"{name}.qweight": pack(torch.randint(0, 2**bits, (K, N), generator=gen), bits),
        f"{name}.qzeros": words_to_v1(words, bits) if fmt == "gptq" else words,
        f"{name}.scales": torch.rand(groups, N, generator=gen).add(0.5).half(),
        f"{name}.g_idx": g_idx[torch.randperm(K, generator=gen)] if act else g_idx,
    }
    if bias:
        tensors[f"{name}.bias"] = torch.randn(N, generator=gen).half()
    return tensors


def quantization(**changes: Any) -> dict[str, Any]:
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    return {key: value for key, value in (base | changes).items() if value is not ...}


def write(directory: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """A directory with one file and config.json; ``name=...`` (an ellipsis) leaves a field out."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "test", "quantization_config": quantization(**changes)}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_sharded(directory: Path, shards: dict[str, dict[str, Tensor]], **changes: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, directory / file, metadata={"format": "pt"})
    weight_map = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"quantization_config": quantization(**changes)}))
    return directory
