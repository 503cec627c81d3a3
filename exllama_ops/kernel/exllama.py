"""ExllamaLinearKernel: the linear kernel of the same name in vLLM, for every GPTQ weight."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from exllama_ops.kernel.config import MPLinearLayerConfig, has_g_idx, reasons_against, zero_offset
from exllama_ops.kernel.layer import check_shape, read_matrix, read_tensor, set_parameter
from exllama_ops.kernel.scalar_types import SUPPORTED, ScalarType, own_type
from exllama_ops.layout.checks import FLOAT_DTYPES
from exllama_ops.layout.groups import num_groups
from exllama_ops.layout.pack import pack_columns
from exllama_ops.prepare import shuffled_copy


class _Prepared(NamedTuple):
    """Everything that processing gives a layer."""

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor
    g_idx: Tensor | None
    perm: Tensor
    group_size: int


class ExllamaLinearKernel:
    """``y = x @ W + bias`` with ``W[k, n] = scales[g, n] * (q[k, n] - z[g, n])``, the parameters held by a layer.

    Args:
        config: what the layer is.
        w_q_param_name: the layer's packed weight, int32, (K * bits / 32, N) or its transpose.
        w_s_param_name: its scales, (G, N) or the transpose, float16, bfloat16 or float32.
        w_zp_param_name: its packed zero points, int32, (G, N * bits / 32) or the transpose. Without zero points, the
            name that the synthesised ones get; "qzeros" if None.
        w_gidx_param_name: its g_idx, (K,) integers in [0, G), the group of each row.

    A parameter says by ``input_dim``, ``output_dim`` and ``packed_dim`` how it is laid out. One that does not is taken
    to be laid out as above. G is ceil(K / group_size). With a g_idx, G may be any number. A row shard of a layer with
    activation order has the global groups in its g_idx, and scales and zero points for all of them.

    Raises:
        ValueError: `can_implement` says no, or a parameter that the config speaks of has no name.

    vLLM's kernel differs: it stored the permutation under the name of g_idx. It knew float16 alone, and ran only
    weights whose groups divide K.

    Source: `exllama_ops.reference.gptq_gemm` for the product; vLLM, ``ExllamaLinearKernel``, for the interface.
    """

    SUPPORTED_QUANT_TYPES: ClassVar[tuple[ScalarType, ...]] = SUPPORTED

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
        reasons = reasons_against(config)
        return (False, "; ".join(reasons)) if reasons else (True, None)

    def __init__(
        self,
        config: MPLinearLayerConfig,
        w_q_param_name: str,
        w_s_param_name: str,
        w_zp_param_name: str | None = None,
        w_gidx_param_name: str | None = None,
    ) -> None:
        reasons = reasons_against(config)
        if config.zero_points and w_zp_param_name is None:
            reasons.append("zero_points=True needs a w_zp_param_name; got None")
        if has_g_idx(config) and w_gidx_param_name is None:
            reasons.append("has_g_idx=True needs a w_gidx_param_name; got None")
        weight_type = own_type(config.weight_type)
        if reasons or weight_type is None:
            raise ValueError(f"ExllamaLinearKernel: {'; '.join(reasons)}")
        self.config = config
        self.w_q_name = w_q_param_name
        self.w_s_name = w_s_param_name
        self.w_zp_name = w_zp_param_name or "qzeros"
        self.w_gidx_name = w_gidx_param_name or "g_idx"
        self.w_perm_name = f"{self.w_gidx_name}_perm"
        self._shuffled_name = f"{self.w_q_name}_shuffled"
        self._group_size_name = f"{self.w_q_name}_group_size"
        self._bits = weight_type.size_bits
        self._bias = weight_type.bias
        self._zero_offset = zero_offset(config)
        self._group_size = config.full_weight_shape[0] if config.group_size == -1 else config.group_size

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring the layer's parameters into the form that `apply_weights` runs. Call it once, after they are loaded.

        The packed weight becomes a contiguous, shuffled copy, (K * bits / 32, N). Scales and zero points become
        contiguous (G, N) and (G, N * bits / 32). Scales are cast to the activations' dtype if that changes none of
        them. Else they keep their own, which the op takes exactly. A layer without zero points gets packed ones of
        ``bias - 1`` (zero_offset 1).

        g_idx keeps its name and its values. Beside it the layer gets ``<g_idx name>_perm``:
        ``argsort(g_idx, stable=True)`` as int32. It is empty where there is no activation order. That is so without a
        g_idx, with one that says ``k // group_size``, and with zeros alone, as some checkpoints have them.

        The rows sorted by group may not fall into groups of group_size, as in a row shard of a layer with activation
        order. Then each group is filled up with rows that name no column of x, as `exllama_ops.prepare` does it. The
        weight, the scales and the zero points get more rows, and the permutation more entries.

        Args:
            layer: the module that holds the parameters. It also gets the bool ``<weight name>_shuffled``, the sign
                that it was processed, and the int ``<weight name>_group_size``.

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
        set_parameter(layer, self.w_q_name, prepared.qweight, input_dim=0, output_dim=1, packed_dim=0)
        set_parameter(layer, self.w_s_name, prepared.scales, input_dim=0, output_dim=1)
        set_parameter(layer, self.w_zp_name, prepared.qzeros, input_dim=0, output_dim=1, packed_dim=1)
        if prepared.g_idx is not None:
            set_parameter(layer, self.w_gidx_name, prepared.g_idx, input_dim=0)
        set_parameter(layer, self.w_perm_name, prepared.perm, input_dim=0)
        setattr(layer, self._shuffled_name, True)
        setattr(layer, self._group_size_name, prepared.group_size)

    def _prepare(self, layer: nn.Module) -> _Prepared:
        K, N = self.config.partition_weight_shape
        bits = self._bits
        sizes = f"N={N}, bits={bits}"

        qweight = read_matrix(layer, self.w_q_name, (torch.int32,), packed="input")
        check_shape(self.w_q_name, qweight, "(K*bits/32, N)", (K * bits // 32, N), f"for K={K}, {sizes}")
        device = qweight.device

        scales = read_matrix(layer, self.w_s_name, FLOAT_DTYPES, device=device)
        G = scales.shape[0]
        if has_g_idx(self.config):
            check_shape(self.w_s_name, scales, "(G, N)", (max(G, 1), N), f"for N={N}")
        else:
            G = num_groups(K, self._group_size)
            check_shape(self.w_s_name, scales, "(G, N)", (G, N), f"for K={K}, N={N}, group_size={self._group_size}")

        if self.config.zero_points:
            qzeros = read_matrix(layer, self.w_zp_name, (torch.int32,), packed="output", device=device)
            check_shape(self.w_zp_name, qzeros, "(G, N*bits/32)", (G, N * bits // 32), f"for G={G}, {sizes}")
        else:
            # v1 stores a zero point minus one; every bias is at least 2.
            stored = torch.full((G, N), self._bias - 1, dtype=torch.int32, device=device)
            qzeros = pack_columns(stored, bits)

        g_idx = self._g_idx(layer, G, device) if has_g_idx(self.config) else None
        shuffled = shuffled_copy(qweight, self._meaning(g_idx, G), bits, self._group_size, G)
        scales = shuffled.of_its_groups(_cast_if_exact(scales, self.config.act_type)).contiguous()
        qzeros = shuffled.of_its_groups(qzeros).contiguous()
        return _Prepared(shuffled.qweight, scales, qzeros, g_idx, shuffled.perm, shuffled.group_size)

    def _g_idx(self, layer: nn.Module, G: int, device: torch.device) -> Tensor:
        name, K = self.w_gidx_name, self.config.partition_weight_shape[0]
        g_idx = read_tensor(layer, name, (torch.int32, torch.int64), device)
        check_shape(name, g_idx, "(K,)", (K,), f"for K={K}")
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
        if not hasattr(layer, self._shuffled_name):
            raise ValueError(
                f"ExllamaLinearKernel: the layer's '{self.w_q_name}' must be processed before it is applied: call "
                "process_weights_after_loading"
            )
        if x.shape[-1] != K:
            raise ValueError(f"ExllamaLinearKernel: x must have shape (*, K) with K={K}; got {tuple(x.shape)}")
        out: Tensor = torch.ops.exllama.gptq_gemm(
            x.reshape(-1, K).contiguous(),
            getattr(layer, self.w_q_name),
            getattr(layer, self.w_zp_name),
            getattr(layer, self.w_s_name),
            getattr(layer, self.w_perm_name),
            True,
            self._bits,
            use_v2_format=self._zero_offset == 0,
            group_size=getattr(layer, self._group_size_name),
        )
        out = out.view(*x.shape[:-1], N)
        return out if bias is None else out + bias.to(out.dtype)


def _cast_if_exact(scales: Tensor, dtype: torch.dtype) -> Tensor:
    cast = scales.to(dtype)
    return cast if torch.equal(cast.to(scales.dtype), scales) else scales
