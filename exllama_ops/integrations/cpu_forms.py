"""Attention and the output layer of a token, written so that they are fast on a CPU: by Inductor, and eagerly.

The results are those of transformers' own forms within the rounding of the dtype. They are closer to the exact ones,
since sums are in float32. benchmarks/results/amd-zen-5-avx-512/decode-forms.md has the measurements.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Arguments of transformers' attention functions that change the result, and that are not known here.
_UNKNOWN = ("position_bias", "softcap", "s_aux")


Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]

_lock = threading.Lock()
# transformers' own "sdpa" attention, and what was put in its place since. Threads put in and take out in any order.
_attentions: list[Any] = []


@contextmanager
def fast_forms(model: Any, device: torch.device) -> Iterator[None]:
    """While graphs are traced: put the forms in the place of transformers' attention and of a dense output layer.

    Nothing changes on other devices than a CPU.
    """
    if device.type != "cpu":
        yield
        return
    output_layer = model.get_output_embeddings()
    plain = type(output_layer) is nn.Linear and "forward" not in vars(output_layer)
    try:
        if plain:
            output_layer.forward = lambda x: multiply_rows(x, output_layer.weight, output_layer.bias)
        with _in_place(attend_one):
            yield
    finally:
        if plain:
            del output_layer.forward


@contextmanager
def fast_eager_attention(device: torch.device) -> Iterator[None]:
    """While a forward runs eagerly: put the forms in the place of transformers' attention, on a CPU."""
    with _in_place(attend_one_eagerly) if device.type == "cpu" else nullcontext():
        yield


@contextmanager
def _in_place(one: Attend) -> Iterator[None]:
    with _lock:
        if not _attentions:
            _attentions.append(ALL_ATTENTION_FUNCTIONS["sdpa"])
        former = _attentions[0]

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, None]:
            unknown = any(kwargs.get(name) is not None for name in _UNKNOWN) or kwargs.get("dropout", 0.0)
            if unknown or attention_mask is None or attention_mask.shape[1] != 1 or query.shape[0] != 1:
                result: tuple[Tensor, None] = former(module, query, key, value, attention_mask, **kwargs)
                return result
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            attend = one if query.shape[2] == 1 else attend_many
            return attend(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None

        _attentions.append(attention)
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        with _lock:
            _attentions.remove(attention)
            ALL_ATTENTION_FUNCTIONS["sdpa"] = _attentions[-1]
            if len(_attentions) == 1:
                _attentions.clear()


def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one token: ``softmax(scale * q k^T + mask) v``.

    torch's kernel converts float16 slowly, starts threads for a few microseconds of work, and wants the keys of each
    query head. These sums read the keys of a group once, and Inductor makes one loop of each.

    Args:
        query: (1, heads, 1, dim).
        key: (1, groups, length, dim); ``heads / groups`` heads in turn belong to each.
        value: (1, groups, length, dim).
        mask: (1, 1, 1, length), bool (True: attend) or what is added.
        scale: of the products.
    """
    groups = key.shape[1]
    heads = query.shape[1] // groups
    q = query.view(groups, heads, 1, query.shape[3]).float() * scale
    scores = (q * key[0].unsqueeze(1).float()).sum(-1)
    hidden = ~mask[0] if mask.dtype == torch.bool else None
    scores = scores + mask[0].float() if hidden is None else scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(-1)
    result = (weights.unsqueeze(-1) * value[0].unsqueeze(1).float()).sum(-2)
    return result.to(query.dtype).view(1, query.shape[1], 1, value.shape[3])


def attend_one_eagerly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one token as `attend_one` has it, by products of matrices: eagerly its sums would all be written."""
    groups = key.shape[1]
    q = query.view(groups, -1, query.shape[3]).float() * scale
    scores = q @ key[0].float().transpose(1, 2)
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask[0], float("-inf"))
    else:
        scores += mask[0].float()
    result = scores.softmax(-1) @ value[0].float()
    return result.to(query.dtype).view(1, query.shape[1], 1, value.shape[3])


def attend_many(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of several tokens, as `attend_one` has it with a mask (1, 1, tokens, length).

    torch's kernel is two to three times as fast in float32 as in float16.
    """
    dtype = query.dtype
    if dtype == torch.float16:
        query, key, value = query.float(), key.float(), value.float()
    if mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    result = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return result.to(dtype)


def multiply_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` for few rows (1, rows, K), in float32 and rounded once: as fast as the weights can be read."""
    rows = x[0].float()
    # What as_strided takes has memory of its own. Else Inductor would compute the norm before it once for each column:
    # 5.3 ms a token instead of 3.3 for 576 x 49152 on a Zen 4.
    rows = rows.as_strided(rows.shape, rows.stride())
    result = (weight.float() * rows.unsqueeze(1)).sum(-1)
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype).unsqueeze(0)
