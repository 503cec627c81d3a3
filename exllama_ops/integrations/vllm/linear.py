"""How vLLM computes a linear layer with this library: its packed weights are read by name, cut and joined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from exllama_ops.integrations.vllm.loading import hold, refill
from exllama_ops.integrations.vllm.parts import join, part_of, runs
from exllama_ops.layout import GptqWeight
from exllama_ops.nn import ExllamaLinear

if TYPE_CHECKING:
    from exllama_ops.integrations.vllm.config import ExllamaConfig


class ExllamaLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """The products of one layer of vLLM.

    Args:
        config: of the checkpoint.
        names: of the weights in the files that are fused into the layer, in the order of their outputs.
    """

    def __init__(self, config: ExllamaConfig, names: list[str]) -> None:
        self.config = config
        self.names = names

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Nothing is made for vLLM's loaders to fill: the packed tensors are read from the files afterwards."""
        layer.exllama_device = torch.get_default_device()
        layer.exllama_parts = (input_size_per_partition, output_partition_sizes, input_size)
        # Adapters of vLLM ask here for the device, and those of an output head for the dtype.
        asked = "weight" if isinstance(layer, ParallelLMHead) else "qweight"
        layer.register_buffer(asked, torch.empty(0, dtype=params_dtype, device=layer.exllama_device), persistent=False)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Read this process's part of each weight and pack it. A second call changes nothing.

        Raises:
            CheckpointError: the files are broken.
            ValueError: the layer cannot be cut so.
        """
        if hasattr(layer, "exllama"):
            return
        hold(layer, self._products(layer))
        self.config.layers.was_read(self.names, self, layer)

    def read_again(self, layer: Any) -> None:
        """Put what the files hold now into a layer.

        Raises:
            CheckpointError: the files are broken.
            ValueError: they hold weights of another form.
        """
        refill(layer, self._products(layer), self.names[0])

    def _products(self, layer: Any) -> nn.ModuleList:
        shards: list[GptqWeight] = []
        for index, name in enumerate(self.names):
            weight = self.config.checkpoint.read(name)
            shards += _shards(layer, weight, name, index, len(self.names))
        return nn.ModuleList(ExllamaLinear.from_weight(weight).to(layer.exllama_device) for weight in join(shards))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W + bias``, the outputs of all parts side by side."""
        outputs = [product(x) for product in layer.exllama]
        missing = sum(layer.exllama_parts[1]) - sum(product.out_features for product in layer.exllama)
        if missing:  # the vocabulary is padded
            outputs.append(x.new_zeros(*x.shape[:-1], missing))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return out if bias is None else out + bias


def _shards(layer: Any, weight: GptqWeight, name: str, index: int, count: int) -> list[GptqWeight]:
    """This process's parts of one weight of the files; vLLM adds the biases itself."""
    in_part, out_parts, in_size = layer.exllama_parts
    rank, size = layer.tp_rank, layer.tp_size
    if weight.in_features != in_size:
        raise ValueError(f"{name}: must have {in_size} inputs; got {weight.in_features}")
    rows = part_of(in_size, in_part, rank, size) if isinstance(layer, RowParallelLinear) else range(in_size)
    if isinstance(layer, ParallelLMHead):
        indices = layer.shard_indices
        run = range(indices.org_vocab_start_index, min(indices.org_vocab_end_index, weight.out_features))
        columns = [run] if run else []  # the last processes may have nothing but padding
    elif count == len(out_parts):
        columns = [part_of(weight.out_features, out_parts[index], rank, size)]
    else:  # the files have in one weight what vLLM takes for several
        columns = runs(_fused_sizes(layer), out_parts, rank, size)
    return [weight.shard(rows=rows, columns=run, bias=False) for run in columns]


def _fused_sizes(layer: Any) -> list[int]:
    """Outputs of each weight that a layer fuses, as the files have them."""
    if isinstance(layer, QKVParallelLinear):
        keys = layer.total_num_kv_heads
        return [layer.total_num_heads * layer.head_size, keys * layer.head_size, keys * layer.v_head_size]
    return list(layer.output_sizes)
