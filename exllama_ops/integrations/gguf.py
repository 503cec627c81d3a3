"""GGUF files of llama.cpp as checkpoints: Q4_0 and Q8_0 are GPTQ weights in groups of 32, bit for bit.

transformers has the tables for their names, configs and tokenizers, and undoes what llama.cpp does to rows.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exllama_ops.checkpoint import Checkpoint, CheckpointError, ModuleSummary
from exllama_ops.checkpoint.errors import shown
from exllama_ops.checkpoint.zeros import constant_zeros
from exllama_ops.extras import require
from exllama_ops.layout import GptqWeight, pack_rows
from exllama_ops.layout.checks import fills_words, words_rule

GROUP_SIZE = 32

# The bits of the types that are GPTQ weights, and the types whose values are in no blocks.
_BITS = {"Q4_0": 4, "Q8_0": 8}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What Llama 3.1 and its kin have: frequencies that their config.json describes as rope scaling.
_ROPE = "rope_freqs.weight"
# A block begins with its scale, in float16.
_SCALE_BYTES = 2


class GgufCheckpoint(Checkpoint):
    """A GGUF file, for `convert_checkpoint`; tensors are read on demand.

    Args:
        path: the file. A config.json beside it is taken for that of the model.

    Attributes:
        model_config: contents of a config.json.

    Raises:
        CheckpointError: transformers does not know the file's architecture, or a tensor cannot be stored in a GPTQ
            checkpoint; the text names it.
        ImportError: the extra "hf" is not installed.

    Warns:
        UserWarning: the file has tensors that the model has no place for.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: Mapping[str, Any] = {}
        self.quantization: Mapping[str, Any] = {}
        transformers = require("transformers")
        gguf = require("gguf")
        with _read_by_others(path):
            self._reader = gguf.GGUFReader(path)
            # It says what transformers does not read from the file, and has what the file lacks.
            beside = (path.parent / "config.json").is_file()
            of_file = {} if beside else {"gguf_file": path.name}
            config = transformers.AutoConfig.from_pretrained(path.parent, trust_remote_code=False, **of_file)
            vars(config).pop("quantization_config", None)
            with torch.device("meta"):
                self._model = transformers.AutoModelForCausalLM.from_config(config)
            names, self._processor = _names(self._reader, self._model)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        self._tensors: dict[str, Any] = {}
        for tensor in self._reader.tensors:
            name = names.get(tensor.name, "")
            if name in self._tensors or (name and name not in self._shapes):
                raise CheckpointError(
                    f"{path}: tensor {tensor.name} must be a tensor of {type(self._model).__name__}, which has it in "
                    "another form, as experts of a mixture are: convert the model that the file was made of"
                )
            if name:
                self._check_shape(name, tensor)
                self._tensors[name] = tensor
        unknown = [tensor.name for tensor in self._reader.tensors if tensor.name not in names]
        if _ROPE in unknown and not beside:
            raise CheckpointError(
                f"{path}: tensor {_ROPE} changes how positions are rotated, which transformers does not read from the "
                "file: put config.json of the model beside it"
            )
        if unknown:
            warnings.warn(
                f"{path}: {type(self._model).__name__} has no place for {', '.join(unknown)}; left out", stacklevel=2
            )
        self._check_complete()
        self.quantized: tuple[str, ...] = tuple(
            name.removesuffix(".weight") for name in self._tensors if self._is_quantized(name)
        )
        members = {f"{name}.{kind}" for name in self.quantized for kind in ("weight", "bias")}
        self.dense: tuple[str, ...] = tuple(name for name in self._tensors if name not in members)
        self.weight_bytes: int = sum(int(tensor.n_bytes) for tensor in self._tensors.values())
        # It takes as long as all before.
        with _read_by_others(path):
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        config.architectures = [type(self._model).__name__]
        config.dtype = torch.float16
        self.model_config: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        for name in ("_name_or_path", "quantization_config"):
            self.model_config.pop(name, None)

    def write_others(self, directory: Path) -> None:
        """Write the tokenizer, with its chat template, and the generation config."""
        self._tokenizer.save_pretrained(directory)
        self._model.generation_config.save_pretrained(directory)

    def summary(self, name: str) -> ModuleSummary:
        """What the file says of one quantized module."""
        K, N = self._shape(name)
        bias = self._tensors.get(f"{name}.bias")
        return ModuleSummary(
            in_features=K,
            out_features=N,
            bits=_BITS[_type(self._weight(name))],
            group_size=GROUP_SIZE,
            num_groups=K // GROUP_SIZE,
            sym=True,
            act_order=False,
            zero_format=self.format,
            bias=bias is not None,
            num_bytes=int(self._weight(name).n_bytes) + (0 if bias is None else int(bias.n_bytes)),
        )

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, as the model has it."""
        self._tensor(name)
        return self._shapes[name]

    def tensor_dtype(self, name: str) -> torch.dtype:
        """The dtype that `read_tensor` gives: the file's, or float16 for what is in blocks."""
        return _PLAIN.get(_type(self._tensor(name)), torch.float16)

    def read(self, name: str, device: torch.device | str = "cpu") -> GptqWeight:
        """Read one quantized module.

        Args:
            name: one of ``quantized``.
            device: where to put the tensors.

        Returns:
            The weight: ``q - 8`` of Q4_0 or ``q - 128`` of Q8_0 times the block's scale, in the model's order of rows.

        Raises:
            CheckpointError: there is no such module, or a scale is NaN or infinite.
        """
        tensor = self._weight(name)
        bits = _BITS[_type(tensor)]
        K, N = self._shape(name)
        data = torch.from_numpy(tensor.data.copy()).reshape(N, K // GROUP_SIZE, -1)[self._rows(tensor, N)]
        scales = data[:, :, :_SCALE_BYTES].contiguous().view(torch.float16)[:, :, 0].t().contiguous()
        if not scales.isfinite().all():
            raise CheckpointError(f"{self.path}: tensor {tensor.name} must have finite scales; got NaN or infinity")
        values = data[:, :, _SCALE_BYTES:]
        # A byte of Q4_0 holds value i of the block and, above it, value i + 16. One of Q8_0 is an int8, to be 128 more.
        q = torch.cat([values & 15, values >> 4], -1) if bits == 4 else values ^ 128
        bias = self.read_tensor(f"{name}.bias") if f"{name}.bias" in self._tensors else None
        weight = GptqWeight(
            qweight=pack_rows(q.reshape(N, K).t(), bits),
            qzeros=constant_zeros(2 ** (bits - 1), bits, (K // GROUP_SIZE, N * bits // 32), torch.device("cpu")),
            scales=scales,
            g_idx=None,
            bits=bits,
            group_size=GROUP_SIZE,
            bias=bias,
        )
        return GptqWeight(
            weight.qweight.to(device),
            weight.qzeros.to(device),
            weight.scales.to(device),
            None,
            bits,
            GROUP_SIZE,
            None if bias is None else bias.to(device),
        )

    def read_tensor(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor as the model has it: in the file's dtype, or in float16 what is in blocks.

        Args:
            name: one of ``dense``.
            device: where to put it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        tensor = self._tensor(name)
        dtype = self.tensor_dtype(name)
        values = require("gguf").dequantize(tensor.data, tensor.tensor_type)
        processed = self._processor.process(weights=values, name=tensor.name).weights
        return torch.from_numpy(processed.copy()).to(dtype).to(device)

    def _tensor(self, name: str) -> Any:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: no tensor {shown(name)}; there are {len(self._tensors)}")
        return tensor

    def _weight(self, name: str) -> Any:
        if name not in self.quantized:
            raise CheckpointError(f"{self.path}: no quantized module {shown(name)}; there are {len(self.quantized)}")
        return self._tensor(f"{name}.weight")

    def _shape(self, name: str) -> tuple[int, int]:
        """K and N of a Linear layer."""
        N, K = self._shapes[f"{name}.weight"]
        return K, N

    def _rows(self, tensor: Any, N: int) -> Tensor:
        """The row of the file that each row of the model's weight is."""
        rows = torch.arange(N, dtype=torch.int64, device="cpu").reshape(N, 1).numpy()
        return torch.from_numpy(self._processor.process(weights=rows, name=tensor.name).weights.copy()).flatten()

    def _check_shape(self, name: str, tensor: Any) -> None:
        """Check that a tensor has the values that the model has; llama.cpp drops dimensions of 1."""
        want, got = self._shapes[name], tuple(reversed(tensor.shape.tolist()))
        if [size for size in want if size != 1] != [size for size in got if size != 1]:
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name} must have shape {want}, as {type(self._model).__name__} of this "
                f"config has it; got {got}: put config.json of the model beside the file"
            )

    def _check_complete(self) -> None:
        tied = set(self._model._tied_weights_keys or ())
        missing = [name for name, _ in self._model.named_parameters() if name not in self._tensors and name not in tied]
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} tensors of {type(self._model).__name__} must be in the file; the first "
                f"that is missing is {missing[0]}"
            )

    def _is_quantized(self, name: str) -> bool:
        """Whether a tensor becomes a GPTQ weight. An error names one that can be neither that nor dense."""
        tensor = self._tensors[name]
        kind = _type(tensor)
        module = self._model.get_submodule(name.rpartition(".")[0])
        if kind in _PLAIN or isinstance(module, nn.Embedding):
            return False
        if module is self._model.get_output_embeddings() and kind not in _BITS:
            return False
        where = f"{self.path}: tensor {tensor.name} ({name})"
        if not isinstance(module, nn.Linear) or len(self._shapes[name]) != 2:
            raise CheckpointError(f"{where} must be the weight of a Linear layer, as it is {kind}; it is another one")
        if kind not in _BITS:
            raise CheckpointError(
                f"{where} must be one of {', '.join((*_BITS, *_PLAIN))}, which a GPTQ checkpoint holds exactly; got "
                f"{kind}: quantize the model by `llama-quantize --pure` to Q4_0 or Q8_0"
            )
        if not fills_words(self._shapes[name][0], _BITS[kind]):
            raise CheckpointError(f"{where}: {words_rule('N', self._shapes[name][0], _BITS[kind])}")
        return True


def _type(tensor: Any) -> str:
    return str(tensor.tensor_type.name)


def _names(reader: Any, model: Any) -> tuple[dict[str, str], Any]:
    """The names of the file's tensors in the model, and what undoes llama.cpp's changes to them."""
    tables = require("transformers.modeling_gguf_pytorch_utils")
    architecture = tables.read_field(reader, "general.architecture")[0]
    processor = tables.TENSOR_PROCESSORS.get(architecture, tables.TensorProcessor)(config=model.config.to_dict())
    return tables.get_gguf_hf_weights_map(model, processor), processor


@contextmanager
def _read_by_others(path: Path) -> Iterator[None]:
    """What gguf and transformers raise of a file that they cannot read becomes a CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: must be a GGUF file; there is none: `hf download OWNER/NAME FILE` fetches one")
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # their errors share no base class
        raise CheckpointError(f"{path}: cannot be read as a GGUF file: {' '.join(str(error).split())}") from error
