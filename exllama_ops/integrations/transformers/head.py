"""A dense output head, rounded to few bits: every token reads the whole of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from exllama_ops.checkpoint import Checkpoint
from exllama_ops.integrations.transformers.counter import Counter
from exllama_ops.layout import GptqWeight
from exllama_ops.layout.checks import fills_words, words_rule
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.nn import ExllamaLinear, quantize

# With 8 bits, groups of 128 cost a head of 4096 x 32000 a quarter less time than groups of 32, and the demo 0.1% of
# perplexity. With fewer bits larger groups cost accuracy: 37.5 instead of 39.9 is the demo's perplexity with 4 bits.
_GROUP_SIZE = {bits: 128 if bits == 8 else 32 for bits in SUPPORTED_BITS}

# Outputs of the head that are quantized at a time, which bounds the float32 copies. They fill whole words in any width.
_SLICE = 4096


def check_head(model: Any, checkpoint: Checkpoint, bits: int) -> None:
    """Check that the head of a model can be quantized.

    Args:
        model: as its class makes it, on the meta device.
        checkpoint: of the model.
        bits: 2, 3, 4 or 8.

    Raises:
        ValueError: the head is no nn.Linear, is quantized in the files, or does not fill whole words.
    """
    head = model.get_output_embeddings()
    name = _name_of(model, head)
    if type(head) is not nn.Linear or name is None:
        raise ValueError(
            f"load_model: lm_head_bits needs an output head that is an nn.Linear; {type(model).__name__} has "
            f"{type(head).__name__}"
        )
    if name in checkpoint.quantized:
        raise ValueError(
            f"load_model: lm_head_bits must be None for a checkpoint whose head is quantized, as {name} of "
            f"{checkpoint.path} is; got {bits}"
        )
    for size_name, size in (("out_features", head.out_features), ("in_features", head.in_features)):
        if not fills_words(size, bits):
            raise ValueError(
                f"load_model: lm_head_bits={bits} does not fit {name}: {words_rule(size_name, size, bits)}"
            )


def quantize_head(model: Any, bits: int, counter: Counter) -> None:
    """Put an ExllamaLinear with the rounded weight in place of the output head. A tied embedding stays dense.

    Args:
        model: with a dense head.
        bits: 2, 3, 4 or 8.
        counter: counts the slices of `head_slices`.
    """
    head = model.get_output_embeddings()
    name = _name_of(model, head)
    assert name is not None
    parts = []
    for rows in head.weight.detach().split(_SLICE):
        parts.append(quantize(rows, bits, _GROUP_SIZE[bits]))
        counter.count()
    packed = GptqWeight(
        qweight=torch.cat([part.qweight for part in parts], 1),
        qzeros=torch.cat([part.qzeros for part in parts], 1),
        scales=torch.cat([part.scales for part in parts], 1),
        g_idx=None,
        bits=bits,
        group_size=parts[0].group_size,
        bias=None if head.bias is None else head.bias.detach(),
    )
    del parts
    model.set_submodule(name, ExllamaLinear.from_weight(packed).to(head.weight.dtype).train(head.training))
    untie(model, name)


def head_slices(model: Any) -> int:
    """How many slices `quantize_head` takes."""
    return len(model.get_output_embeddings().weight.split(_SLICE))


def untie(model: Any, *names: str) -> None:
    """Part quantized modules from what the config ties them to: a packed weight is tied to nothing."""
    tied = getattr(model, "all_tied_weights_keys", {})
    weights = {f"{name}.weight" for name in names}
    parted = [target for target, source in tied.items() if target in weights or source in weights]
    for target in parted:
        del tied[target]
    if parted:
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


def _name_of(model: nn.Module, module: nn.Module) -> str | None:
    return next((name for name, member in model.named_modules() if member is module), None)
