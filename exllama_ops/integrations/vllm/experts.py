"""Mixtures of experts in vLLM: one product of all experts for each projection."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation

from exllama_ops import backends
from exllama_ops.checkpoint import CheckpointError
from exllama_ops.integrations.vllm.loading import hold, refill
from exllama_ops.integrations.vllm.parts import part_of
from exllama_ops.nn import ExllamaLinear
from exllama_ops.nn.experts import sum_of_experts, sum_of_sorted_rows
from exllama_ops.nn.packed_experts import PackedExperts

if TYPE_CHECKING:
    from exllama_ops.integrations.vllm.config import ExllamaConfig

_ONE_BY_ONE = "exllama_ops calls experts one by one, which is slow, and on a GPU needs --enforce-eager: %s"

logger = init_logger(f"vllm.{__name__}")

_EXPERT = re.compile(r"([0-9]+)\.(\w+)")


class ExllamaExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The products of all experts of one layer.

    Args:
        config: of the checkpoint.
        layer: of vLLM.
        names: (expert, projection) -> name in the files.
    """

    def __init__(self, config: ExllamaConfig, layer: RoutedExperts, names: dict[tuple[int, str], str]) -> None:
        super().__init__(layer.moe_config)
        self.config = config
        self.names = names

    @classmethod
    def of(cls, config: ExllamaConfig, layer: RoutedExperts, prefix: str) -> Any:
        """The method for a layer of experts: vLLM's own if none of them is quantized.

        Raises:
            CheckpointError: some are quantized and some are not.
            ValueError: vLLM is to run adapters on the experts.
        """
        names = {}
        for rest, stored in config.names_below(prefix):
            if matched := _EXPERT.fullmatch(rest):
                names[int(matched[1]), matched[2]] = stored
        if not names:
            return UnquantizedFusedMoEMethod(layer.moe_config)
        projections = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name]
        wanted = {(e, name) for e in range(layer.global_num_experts) for name in projections if name is not None}
        if wanted != names.keys():
            raise CheckpointError(
                f"{config.model}: {prefix} has {layer.global_num_experts} experts with the projections "
                f"{', '.join(filter(None, projections))}, of which the files quantize {len(names)} of {len(wanted)}; "
                "exllama_ops needs all of them quantized, or none"
            )
        _check_adapters(prefix)
        config.take(names.values())
        return cls(config, layer, names)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Nothing is made for vLLM's loaders to fill: the packed tensors are read from the files afterwards."""
        layer.exllama_device = torch.get_default_device()
        layer.exllama_part = intermediate_size_per_partition

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: torch.dtype, moe_parallel_config: Any
    ) -> tuple[int, int]:
        """As they are: no kernel of vLLM runs."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: vLLM's own kernels do not run."""
        return

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Read this process's experts, or its part of each, and pack them. A second call changes nothing.

        Raises:
            CheckpointError: the files are broken.
            ValueError: the layer cannot be cut so.
        """
        if hasattr(layer, "exllama"):
            return
        hold(layer, self._products(layer))
        self.config.layers.was_read(self.names.values(), self, layer)

    def read_again(self, layer: RoutedExperts) -> None:
        """Put what the files hold now into a layer.

        Raises:
            CheckpointError: the files are broken.
            ValueError: they hold weights of another form.
        """
        refill(layer, self._products(layer), next(iter(self.names.values())))

    def _products(self, layer: RoutedExperts) -> nn.Module:
        """The stacks of each projection; or, of experts that differ in more than their values, all layers by expert."""
        parallel = layer.moe_config.moe_parallel_config
        local = range(layer.global_num_experts)
        if layer.expert_map is not None:  # this process has some of the experts
            local = layer.expert_map.ge(0).nonzero().flatten().tolist()
        experts, stacks = {}, Stacks(len(local))
        for expert in local:
            into = [name for name in (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name) if name is not None]
            products = []
            for name in (*into, layer.ckpt_down_proj_name):
                weight = self.config.checkpoint.read(self.names[expert, name])
                down = name == layer.ckpt_down_proj_name
                whole = weight.in_features if down else weight.out_features
                run = part_of(whole, layer.exllama_part, parallel.tp_rank, parallel.tp_size)
                shard = weight.shard(rows=run, bias=False) if down else weight.shard(columns=run, bias=False)
                products.append(ExllamaLinear.from_weight(shard).to(layer.exllama_device))
            experts[str(expert)] = nn.ModuleList(products)
            stacks.put(products)
        return stacks.all or nn.ModuleDict(experts)

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """The sum over the chosen experts of ``weight * down(act(gate(x)) * up(x))``, for each token."""
        if layer.apply_router_weight_on_input:  # of one expert a token
            x, topk_weights = (x * topk_weights).to(x.dtype), torch.ones_like(topk_weights)

        def activated(into: list[Tensor]) -> Tensor:
            inner = torch.cat(into, -1)
            out = inner.new_empty(inner.shape[0], layer.exllama_part)
            apply_moe_activation(layer.activation, out, inner)
            return out

        def experts(rows: Tensor, offsets: Tensor, own: Tensor) -> Tensor:
            *into, down = layer.exllama
            y: Tensor = down(activated([stack(rows, offsets, own) for stack in into]), offsets, own)
            return y

        def expert(index: int, rows: Tensor) -> Tensor | None:
            if str(index) not in layer.exllama:
                return None
            *into, down = layer.exllama[str(index)]
            y: Tensor = down(activated([product(rows) for product in into]))
            return y

        if isinstance(layer.exllama, nn.ModuleDict):
            return sum_of_experts(x, topk_ids, topk_weights, expert)
        # Those of other processes are numbered -1, which is none.
        local = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids]
        E = layer.exllama[0].qweight.shape[0]
        return sum_of_sorted_rows(x, local, topk_weights, E, experts)


class Stacks:
    """The weights of experts in stacks, one for each projection, while they are alike.

    Args:
        num_experts: of this process.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._stacks: list[PackedExperts] = []
        self._put = 0

    def put(self, products: list[ExllamaLinear]) -> None:
        """Take the layers of the next expert, which compute with views from now on."""
        device = products[0].qweight.device.type
        if self._put == 0 and (device == "cpu" or backends.has_kernel("gptq_moe_gemm", device)):
            self._stacks = [PackedExperts(product, self._num_experts) for product in products]
        elif self._put == 0:
            logger.warning_once(_ONE_BY_ONE, f"no kernel takes all of them on {device}; install Triton")
        reasons = [stack.reason_against(product) for stack, product in zip(self._stacks, products, strict=False)]
        if any(reasons):
            logger.warning_once(_ONE_BY_ONE, "; ".join(filter(None, reasons)))
            for stack in self._stacks:
                stack.release()
            self._stacks = []
        for stack, product in zip(self._stacks, products, strict=False):
            stack.put(self._put, product)
        self._put += 1

    @property
    def all(self) -> nn.ModuleList | None:
        """A stack for each projection, or None where they are not alike."""
        return nn.ModuleList(self._stacks) if self._stacks else None


def _check_adapters(prefix: str) -> None:
    """Check that no adapter is to be run on experts: those of vLLM are parts of its own kernels."""
    current = get_current_vllm_config_or_none()
    adapters = None if current is None else current.lora_config
    if adapters is not None and (adapters.target_modules is None or "experts" in adapters.target_modules):
        raise ValueError(
            f"{prefix}: exllama_ops runs no adapters on quantized experts; name the layers that may have some, such as "
            "--lora-target-modules q_proj k_proj v_proj o_proj"
        )
