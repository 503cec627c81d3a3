"""What a quantized layer is before its weights are there, and every reason against running it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exllama_ops.kernel.scalar_types import SUPPORTED, WeightType, own_type
from exllama_ops.layout.checks import FLOAT_DTYPES, fills_words, words_rule
from exllama_ops.layout.formats import FORMATS


@dataclass(frozen=True)
class MPLinearLayerConfig:
    """What a quantized linear layer is, before its weights are there.

    Args:
        full_weight_shape: (K, N) of the layer in the model.
        partition_weight_shape: (K, N) of the part of it that this device holds. Parts along K are of equal sizes.
        weight_type: one of `ExllamaLinearKernel.SUPPORTED_QUANT_TYPES`, or a vLLM ScalarType of the same size and bias.
        act_type: dtype of the activations, float16, bfloat16 or float32.
        group_size: rows of a group, at least 1; -1 for one group of all K rows. The last group may be partial.
        zero_points: whether the layer has zero points of its own. They count then, and a bias of weight_type does not.
        has_g_idx: whether the layer says the group of every row (activation order).
        zero_points_v2: whether the layer's zero points are stored as they are, not minus one: a zero_offset of 0.
    """

    full_weight_shape: tuple[int, int]
    partition_weight_shape: tuple[int, int]
    weight_type: WeightType
    act_type: torch.dtype
    group_size: int
    zero_points: bool
    has_g_idx: bool = False
    zero_points_v2: bool = False


def has_g_idx(config: MPLinearLayerConfig) -> bool:
    """The field of this name. A config of vLLM lost it in 0.30 and means False."""
    return bool(getattr(config, "has_g_idx", False))


def zero_offset(config: MPLinearLayerConfig) -> int:
    """What is added to a stored zero point. Synthesised ones are v1, and so are those of a vLLM config."""
    return 0 if config.zero_points and getattr(config, "zero_points_v2", False) else 1


def reasons_against(config: MPLinearLayerConfig) -> list[str]:
    """Every reason why the kernel cannot serve a config, each with the value that it is about; none if it can."""
    reasons: list[str] = []
    weight_type = own_type(config.weight_type)
    if weight_type is None:
        names = ", ".join(map(str, SUPPORTED))
        reasons.append(f"weight type {config.weight_type} is not supported; supported are {names}")
    elif not weight_type.has_bias() and not config.zero_points:
        reasons.append(f"weight type {weight_type} has no bias, so the layer needs zero points; got zero_points=False")
    if config.act_type not in FLOAT_DTYPES:
        names = ", ".join(map(str, FLOAT_DTYPES))
        reasons.append(f"activation type {config.act_type} is not supported; supported are {names}")

    K, N = config.partition_weight_shape
    bits = getattr(config.weight_type, "size_bits", 0)
    if bits in FORMATS:
        sizes = (("output features N", N), ("input features K", K))
        reasons += [words_rule(name, size, bits) for name, size in sizes if not fills_words(size, bits)]
    full_K, full_N = config.full_weight_shape
    if full_K < K or full_N < N:
        reasons.append(f"the partition (K, N) = {(K, N)} must lie within the full weight; got {(full_K, full_N)}")

    size = config.group_size
    if size < 1 and size != -1:
        reasons.append(f"group size must be at least 1, or -1 for one group; got {size}")
    # Equal parts start at multiples of K. Unless groups and parts nest, a part may start within a group. At which row
    # depends on the part, and a config does not say which part this is.
    elif size != -1 and 0 < K < full_K and not has_g_idx(config) and K % size and size % K:
        reasons.append(
            f"group size {size} and the K={K} of {full_K} input features that the partition has must divide one "
            "another in a layer without g_idx"
        )
    return reasons
