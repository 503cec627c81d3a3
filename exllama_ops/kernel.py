"""ExllamaLinearKernel: the linear kernel of the same name in vLLM, for every GPTQ weight.

Its names, its arguments and the order of its calls are those of vLLM's MPLinearKernel interface, so that moving from
there is a change of import::

    kernel = ExllamaLinearKernel(config, "qweight", "scales", "qzeros", "g_idx")
    kernel.process_weights_after_loading(layer)
    y = kernel.apply_weights(layer, x, bias)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from exllama_ops.layout.checks import FLOAT_DTYPES, fills_words, words_rule
from exllama_ops.layout.formats import FORMATS
from exllama_ops.layout.groups import num_groups
from exllama_ops.layout.pack import pack_columns
from exllama_ops.prepare import shuffled_copy


class WeightType(Protocol):
    """What a config's weight_type needs: vLLM's own ScalarType has it, and so has ours."""

    @property
    def size_bits(self) -> int:
        """Width of a stored value."""
        ...

    @property
    def bias(self) -> int:
        """What is subtracted from a stored value; 0 for none."""
        ...


@dataclass(frozen=True)
class ScalarType:
    """An unsigned integer of ``size_bits`` bits that stands for ``stored - bias``.

    Args:
        size_bits: width of a stored value.
        bias: the zero point of every value; 0 for a type whose zero points come with the weight.
    """

    size_bits: int
    bias: int = 0

    def has_bias(self) -> bool:
        """Whether the type itself says the zero point."""
        return self.bias != 0

    def __str__(self) -> str:
        return f"uint{self.size_bits}" + (f"b{self.bias}" if self.bias else "")


uint2b2 = ScalarType(2, 2)
uint3b4 = ScalarType(3, 4)
uint4b8 = ScalarType(4, 8)
uint8b128 = ScalarType(8, 128)
uint2 = ScalarType(2)
uint3 = ScalarType(3)
uint4 = ScalarType(4)
uint8 = ScalarType(8)


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
        zero_points_v2: whether the layer's zero points are stored as they are, not minus one.
    """

    full_weight_shape: tuple[int, int]
    partition_weight_shape: tuple[int, int]
    weight_type: WeightType
    act_type: torch.dtype
    group_size: int
    zero_points: bool
    has_g_idx: bool = False
    zero_points_v2: bool = False


class _Prepared(NamedTuple):
    """Everything that processing gives a layer."""

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor
    g_idx: Tensor | None
    perm: Tensor
    shuffled: bool


class ExllamaLinearKernel:
    """``y = x @ W + bias`` with ``W[k, n] = scales[g, n] * (q[k, n] - z[g, n])``, the parameters held by a layer.

    Args:
        config: what the layer is.
        w_q_param_name: the layer's packed weight, int32, (K * bits / 32, N) or its transpose.
        w_s_param_name: its scales, (G, N) or the transpose, float16, bfloat16 or float32.
        w_zp_param_name: its packed zero points, int32, (G, N * bits / 32) or the transpose. Without zero points, the
            name that the synthesised ones get; "qzeros" if None.
        w_gidx_param_name: its g_idx, (K,) integers in [0, G), the group of each row.

    A parameter says by ``input_dim``, ``output_dim`` and ``packed_dim`` how it is laid out; one that does not is taken
    to be laid out as above. G is ceil(K / group_size). With a g_idx it may be any number: the part of a K-sharded
    layer with activation order has global groups in its g_idx, and scales and zero points for all of them.

    Raises:
        ValueError: `can_implement` says no, or a parameter that the config speaks of has no name.

    The original differs: it stored the permutation under the name of g_idx, knew float16 alone, and ran only weights
    whose groups divide K.
    """

    SUPPORTED_QUANT_TYPES: ClassVar[tuple[ScalarType, ...]] = (
        uint2b2, uint3b4, uint4b8, uint8b128, uint2, uint3, uint4, uint8,
    )  # fmt: skip

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest compute capability of an NVIDIA GPU that runs this kernel, times ten. Other devices need none."""
        return 60

    @classmethod
    def can_implement(cls, config: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether the kernel serves a config.

        Args:
            config: what the layer is.

        Returns:
            (True, None), or False and every reason against it, each with the value that it is about.
        """
        reasons = cls._reasons_against(config)
        return (False, "; ".join(reasons)) if reasons else (True, None)

    @classmethod
    def _own_type(cls, weight_type: WeightType) -> ScalarType | None:
        """Our type of the same size and bias; None if there is none, or if the other is signed or floating point."""
        if getattr(weight_type, "signed", False) or getattr(weight_type, "exponent", 0):
            return None
        key = (getattr(weight_type, "size_bits", None), getattr(weight_type, "bias", None))
        return next((own for own in cls.SUPPORTED_QUANT_TYPES if (own.size_bits, own.bias) == key), None)

    @classmethod
    def _reasons_against(cls, config: MPLinearLayerConfig) -> list[str]:
        reasons: list[str] = []
        weight_type = cls._own_type(config.weight_type)
        if weight_type is None:
            names = ", ".join(map(str, cls.SUPPORTED_QUANT_TYPES))
            reasons.append(f"weight type {config.weight_type} is not supported; supported are {names}")
        elif not weight_type.has_bias() and not config.zero_points:
            reasons.append(
                f"weight type {weight_type} has no bias, so the layer needs zero points; got zero_points=False"
            )
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
        # Equal parts start at multiples of K. Unless groups and parts nest, a part may start within a group, at a row
        # that depends on the part, and a config does not say which part this is.
        elif size != -1 and 0 < K < full_K and not _has_g_idx(config) and K % size and size % K:
            reasons.append(
                f"group size {size} and the K={K} of {full_K} input features that the partition has must divide one "
                "another in a layer without g_idx"
            )
        return reasons

    def __init__(
        self,
        config: MPLinearLayerConfig,
        w_q_param_name: str,
        w_s_param_name: str,
        w_zp_param_name: str | None = None,
        w_gidx_param_name: str | None = None,
    ) -> None:
        reasons = self._reasons_against(config)
        if config.zero_points and w_zp_param_name is None:
            reasons.append("zero_points=True needs a w_zp_param_name; got None")
        if _has_g_idx(config) and w_gidx_param_name is None:
            reasons.append("has_g_idx=True needs a w_gidx_param_name; got None")
        weight_type = self._own_type(config.weight_type)
        if reasons or weight_type is None:
            raise ValueError(f"ExllamaLinearKernel: {'; '.join(reasons)}")
        self.config = config
        self.w_q_name = w_q_param_name
        self.w_s_name = w_s_param_name
        self.w_zp_name = w_zp_param_name or "qzeros"
        self.w_gidx_name = w_gidx_param_name or "g_idx"
        self.w_perm_name = f"{self.w_gidx_name}_perm"
        self._shuffled_name = f"{self.w_q_name}_shuffled"
        self._bits = weight_type.size_bits
        self._bias = weight_type.bias
        self._use_v2_format = config.zero_points and _zero_points_v2(config)
        self._group_size = config.full_weight_shape[0] if config.group_size == -1 else config.group_size

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring the layer's parameters into the form that `apply_weights` runs; once, after they are loaded.

        The packed weight becomes a contiguous, shuffled copy, (K * bits / 32, N); scales and zero points become
        contiguous (G, N) and (G, N * bits / 32). Scales are cast to the activations' dtype if that changes none of
        them, else they keep their own: the op takes any, exactly. Without zero points, packed ones of ``bias - 1`` (the
        v1 format) are added. g_idx keeps its name and its values. Beside it the layer gets ``<g_idx name>_perm``:
        ``argsort(g_idx, stable=True)`` as int32, or an empty tensor where there is no activation order (no g_idx, one
        that says ``k // group_size``, or one of zeros alone, which some checkpoints have in its place).

        If the rows sorted by group do not fall into groups of group_size, as in a part of a K-sharded layer with
        activation order, the weight stays in checkpoint order and runs by its g_idx.

        Args:
            layer: the module that holds the parameters. It also gets the bool ``<weight name>_shuffled``, the sign
                that it was processed and how.

        Raises:
            ValueError: the layer was processed before, or a parameter is missing, has another shape, dtype, device or
                packing, or g_idx leaves [0, G). The layer is left as it was.
        """
        if hasattr(layer, self._shuffled_name) or hasattr(layer, self.w_perm_name):
            raise ValueError(
                f"ExllamaLinearKernel: the layer's '{self.w_q_name}' was processed before; what it holds now is no "
                "checkpoint weight. Load the checkpoint into a new layer"
            )
        prepared = self._prepare(layer)
        _set_parameter(layer, self.w_q_name, prepared.qweight, input_dim=0, output_dim=1, packed_dim=0)
        _set_parameter(layer, self.w_s_name, prepared.scales, input_dim=0, output_dim=1)
        _set_parameter(layer, self.w_zp_name, prepared.qzeros, input_dim=0, output_dim=1, packed_dim=1)
        if prepared.g_idx is not None:
            _set_parameter(layer, self.w_gidx_name, prepared.g_idx, input_dim=0)
        _set_parameter(layer, self.w_perm_name, prepared.perm, input_dim=0)
        setattr(layer, self._shuffled_name, prepared.shuffled)

    def _prepare(self, layer: nn.Module) -> _Prepared:
        K, N = self.config.partition_weight_shape
        bits = self._bits
        sizes = f"N={N}, bits={bits}"

        qweight = _matrix(layer, self.w_q_name, (torch.int32,), packed="input")
        _check_shape(self.w_q_name, qweight, "(K*bits/32, N)", (K * bits // 32, N), f"for K={K}, {sizes}")
        device = qweight.device

        scales = _matrix(layer, self.w_s_name, FLOAT_DTYPES, device=device)
        G = scales.shape[0]
        if _has_g_idx(self.config):
            _check_shape(self.w_s_name, scales, "(G, N)", (max(G, 1), N), f"for N={N}")
        else:
            G = num_groups(K, self._group_size)
            _check_shape(self.w_s_name, scales, "(G, N)", (G, N), f"for K={K}, N={N}, group_size={self._group_size}")

        if self.config.zero_points:
            qzeros = _matrix(layer, self.w_zp_name, (torch.int32,), packed="output", device=device)
            _check_shape(self.w_zp_name, qzeros, "(G, N*bits/32)", (G, N * bits // 32), f"for G={G}, {sizes}")
        else:
            # v1 stores a zero point minus one; every bias is at least 2.
            stored = torch.full((G, N), self._bias - 1, dtype=torch.int32, device=device)
            qzeros = pack_columns(stored, bits)

        g_idx = self._g_idx(layer, G, device) if _has_g_idx(self.config) else None
        qweight, perm, shuffled = shuffled_copy(qweight, self._meaning(g_idx, G), bits, self._group_size, G)
        scales = _cast_if_exact(scales, self.config.act_type).contiguous()
        return _Prepared(qweight, scales, qzeros.contiguous(), g_idx, perm, shuffled)

    def _g_idx(self, layer: nn.Module, G: int, device: torch.device) -> Tensor:
        name, K = self.w_gidx_name, self.config.partition_weight_shape[0]
        g_idx = _tensor(layer, name, (torch.int32, torch.int64), device)
        _check_shape(name, g_idx, "(K,)", (K,), f"for K={K}")
        low, high = (int(value) for value in g_idx.aminmax())
        if low < 0 or high >= G:
            raise ValueError(
                f"ExllamaLinearKernel: '{name}' must hold groups in [0, G) for the G={G} rows of '{self.w_s_name}'; "
                f"got values from {low} to {high}"
            )
        return g_idx.to(torch.int32).contiguous()

    def _meaning(self, g_idx: Tensor | None, G: int) -> Tensor | None:
        """None for zeros alone, which stand for no activation order where the scales have the groups of one."""
        if g_idx is not None and num_groups(g_idx.shape[0], self._group_size) == G and not g_idx.any():
            return None
        return g_idx

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W + bias``, by `torch.ops.exllama.gptq_gemm`: sums in at least float32, one rounding, then the bias.

        Args:
            layer: a layer that `process_weights_after_loading` went over.
            x: (*, K) float16, bfloat16 or float32, any strides.
            bias: (N,) or None; added in x's dtype.

        Returns:
            (*, N) in x's dtype, new memory.

        Raises:
            ValueError: the layer was not processed, or x's last size is not K, or x's dtype or device does not fit.
        """
        K, N = self.config.partition_weight_shape
        shuffled: bool | None = getattr(layer, self._shuffled_name, None)
        if shuffled is None:
            raise ValueError(
                f"ExllamaLinearKernel: the layer's '{self.w_q_name}' must be processed before it is applied: call "
                "process_weights_after_loading"
            )
        if x.shape[-1] != K:
            raise ValueError(f"ExllamaLinearKernel: x must have shape (*, K) with K={K}; got {tuple(x.shape)}")
        rows_name = self.w_perm_name if shuffled else self.w_gidx_name
        out: Tensor = torch.ops.exllama.gptq_gemm(
            x.reshape(-1, K).contiguous(),
            getattr(layer, self.w_q_name),
            getattr(layer, self.w_zp_name),
            getattr(layer, self.w_s_name),
            getattr(layer, rows_name),
            shuffled,
            self._bits,
            use_v2_format=self._use_v2_format,
            group_size=self._group_size,
        )
        out = out.view(*x.shape[:-1], N)
        return out if bias is None else out + bias.to(out.dtype)


def _has_g_idx(config: MPLinearLayerConfig) -> bool:
    """Of a vLLM config too, which lost the field in 0.30."""
    return bool(getattr(config, "has_g_idx", False))


def _zero_points_v2(config: MPLinearLayerConfig) -> bool:
    """Of a vLLM config too, which never had the field."""
    return bool(getattr(config, "zero_points_v2", False))


def _tensor(layer: nn.Module, name: str, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None) -> Tensor:
    tensor = getattr(layer, name, None)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"ExllamaLinearKernel: the layer has no parameter '{name}'")
    if tensor.dtype not in dtypes:
        names = ", ".join(map(str, dtypes))
        raise ValueError(
            f"ExllamaLinearKernel: '{name}' must be {'one of ' * (len(dtypes) > 1)}{names}; got {tensor.dtype}"
        )
    if device is not None and tensor.device != device:
        raise ValueError(f"ExllamaLinearKernel: '{name}' must be on {device} like the weight; got {tensor.device}")
    return tensor.data


def _matrix(
    layer: nn.Module,
    name: str,
    dtypes: tuple[torch.dtype, ...],
    *,
    packed: Literal["input", "output"] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """A parameter as a view in (input, output) order, which its ``input_dim`` and ``output_dim`` tell."""
    tensor = _tensor(layer, name, dtypes, device)
    if tensor.dim() != 2:
        raise ValueError(f"ExllamaLinearKernel: '{name}' must have 2 dimensions; got shape {tuple(tensor.shape)}")
    param = getattr(layer, name)
    given: tuple[int | None, ...] = (getattr(param, "input_dim", None), getattr(param, "output_dim", None))
    # Two dimensions: one of the numbers tells the other.
    input_dim = given[0] if given[0] is not None else 0 if given[1] is None else 1 - given[1]
    output_dim = given[1] if given[1] is not None else 1 - input_dim
    if (input_dim, output_dim) not in ((0, 1), (1, 0)):
        raise ValueError(
            f"ExllamaLinearKernel: '{name}' must have input_dim and output_dim 0 and 1, in any order; got {given}"
        )
    packed_dim = getattr(param, "packed_dim", None)
    expected = input_dim if packed == "input" else output_dim
    if packed is not None and packed_dim not in (None, expected):
        raise ValueError(
            f"ExllamaLinearKernel: '{name}' must be packed along its {packed} dimension, packed_dim={expected}; got "
            f"packed_dim={packed_dim}"
        )
    return tensor if input_dim == 0 else tensor.t()


def _check_shape(name: str, tensor: Tensor, formula: str, expected: tuple[int, ...], given: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"ExllamaLinearKernel: '{name}' must have shape {formula} = {expected} {given}, in (input, output) order; "
            f"got {tuple(tensor.shape)}"
        )


def _cast_if_exact(scales: Tensor, dtype: torch.dtype) -> Tensor:
    cast = scales.to(dtype)
    return cast if torch.equal(cast.to(scales.dtype), scales) else scales


def _set_parameter(layer: nn.Module, name: str, tensor: Tensor, **dims: int) -> None:
    parameter = nn.Parameter(tensor, requires_grad=False)
    for attribute, dim in dims.items():
        setattr(parameter, attribute, dim)
    setattr(layer, name, parameter)
