"""`load_model`: a checkpoint as a transformers model, through transformers' own loader."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exllama_ops.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from exllama_ops.checkpoint.disk import list_directory, read_json
from exllama_ops.checkpoint.errors import listed, shown
from exllama_ops.extras import collector_paused, require
from exllama_ops.integrations.transformers.counter import Counter
from exllama_ops.integrations.transformers.head import check_head, head_slices, quantize_head
from exllama_ops.layout.checks import FLOAT_DTYPES
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.nn import ExllamaLinear
from exllama_ops.progress import Notify, ignore

_GENERATION_CONFIG = "generation_config.json"

# The classes of transformers that generate text. Where several know a family, config.json says which class it is.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
)


def load_model(
    path_or_id: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    *,
    revision: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    notify: Notify = ignore,
    lm_head_bits: int | None = None,
) -> Any:
    """Load a quantized checkpoint as a transformers model whose quantized layers are `exllama_ops.ExllamaLinear`.

    It is ``from_pretrained`` after `exllama_ops.integrations.transformers.register`, with files that are read by this
    library, and with an error where a tensor is missing. Peak memory is about the checkpoint's size.

    Args:
        path_or_id: a directory, or a hub id, as in `exllama_ops.open_checkpoint`.
        dtype: of the activations and of all dense tensors; scales keep the dtype they have in the file. None or "auto"
            for the dtype of config.json, or else of the first dense tensor of the files that has a floating dtype.
        device: where to put the model.
        revision: branch, tag or commit of a hub id.
        quantization_config: what the files do not say, as in `exllama_ops.open_checkpoint`.
        trust_remote_code: whether code of the checkpoint may run. Without it a model that needs such code is refused.
        progress: show a progress bar on stderr, if that is a terminal.
        notify: takes the steps, for a progress of your own.
        lm_head_bits: quantize a dense output head to 8 bits, or to 2, 3 or 4, by rounding to nearest. Every token reads
            the whole head, and 8 bits halve it. Fewer bits cost accuracy that nothing corrects. The groups are
            asymmetric, of 128 inputs for 8 bits and of 32 for fewer. If the head is tied to the embedding, that stays
            dense, and the model grows by the quantized copy. None leaves the head as it is.

    Returns:
        The model, a `transformers.PreTrainedModel`, in eval mode, its parameters frozen: a causal language model, or
        one that takes images too, or an encoder-decoder.

    Raises:
        CheckpointError: the checkpoint is broken, or does not fit the model that its config describes; the text names
            the tensors.
        ImportError: the extra "hf" is not installed.
        ValueError: lm_head_bits is no width, or the head is quantized already, or is no Linear layer of the model, or
            its sizes do not fill whole words.

    Warns:
        UserWarning: the checkpoint has dense tensors that the model has no place for.
    """
    if lm_head_bits is not None and lm_head_bits not in SUPPORTED_BITS:
        raise ValueError(f"load_model: lm_head_bits must be None or one of {SUPPORTED_BITS}; got {lm_head_bits}")
    tqdm = require("tqdm").tqdm
    checkpoint = open_checkpoint(path_or_id, revision=revision, quantization_config=quantization_config)
    with collector_paused():
        transformers = require("transformers")
        config = _read_config(transformers, checkpoint.path, trust_remote_code)
        model_class = _model_class(transformers, config, checkpoint.path, trust_remote_code)
        generation_config = None
        if _GENERATION_CONFIG in list_directory(checkpoint.path):
            generation_config = _read_generation_config(transformers, checkpoint.path / _GENERATION_CONFIG)
        if dtype is None or dtype == "auto":
            dtype = config.dtype or _dtype_of(checkpoint)
        if lm_head_bits is not None:
            check_head(_skeleton(model_class, config), checkpoint, lm_head_bits)

    disable = None if progress else True
    total = len(checkpoint.quantized) + len(checkpoint.dense)
    with tqdm(desc="Loading", total=total, unit=" weights", disable=disable) as bar:
        counter = Counter(bar, notify, f"loading {checkpoint.path}", total)
        model, report = _from_pretrained(model_class, config, checkpoint, dtype, torch.device(device), counter)
    _check_report(model, checkpoint, report)
    # It was made from the config alone. This file says more.
    if generation_config is not None:
        model.generation_config = generation_config
    model.config.name_or_path = model.name_or_path = str(checkpoint.path)
    model.requires_grad_(False)
    if lm_head_bits is not None:
        slices = head_slices(model)
        with tqdm(desc="Quantizing the head", total=slices, unit=" slices", disable=disable) as bar:
            counter = Counter(bar, notify, f"quantizing the output head to {lm_head_bits} bits", slices)
            try:
                quantize_head(model, lm_head_bits, counter)
            except ValueError as error:
                raise CheckpointError(f"{checkpoint.path}: the output head: {error}") from error
    return model


def _read_config(transformers: Any, path: Path, trust_remote_code: bool) -> Any:
    """The model's config, out of a copy: transformers opens any kind of file, waits for FIFOs, and knows no BOM."""
    values = read_json(path / "config.json")
    # Another method's config would have to be one that transformers knows. The checkpoint was opened by this one.
    values.pop("quantization_config", None)
    family = values.get("model_type")
    needs_code = values.get("auto_map") and family not in transformers.CONFIG_MAPPING
    if needs_code and not trust_remote_code:
        raise CheckpointError(
            f"{path / 'config.json'}: the family {family!r} needs code of this checkpoint, which does not run "
            "unless you trust it and say so: trust_remote_code=True, or --trust-remote-code on the command line"
        )
    try:
        with tempfile.TemporaryDirectory() as copy:
            (Path(copy) / "config.json").write_text(json.dumps(values), encoding="utf-8")
            source = path if needs_code else copy
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers' errors share no base class
        raise CheckpointError(f"{path / 'config.json'}: must describe a transformers model: {error}") from error
    vars(config).pop("quantization_config", None)
    config.architectures = config.architectures or []
    config.name_or_path = str(path)
    return config


def _read_generation_config(transformers: Any, path: Path) -> Any:
    values = read_json(path)
    try:
        config = transformers.GenerationConfig.from_dict(values)
    except Exception as error:  # as above
        raise CheckpointError(f"{path}: must describe how to generate: {error}") from error
    # transformers looks at them when it generates.
    stop = config.eos_token_id
    if stop is not None and not all(type(token) is int for token in (stop if isinstance(stop, list) else [stop])):
        raise CheckpointError(
            f"{path}: eos_token_id must be the number of a token, or a list of them; got {shown(stop)}"
        )
    return config


def _model_class(transformers: Any, config: Any, path: Path, trust_remote_code: bool) -> Any:
    """The class that generates with a config: the one that config.json names, else the first that fits."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import _get_model_class

    code = getattr(config, "auto_map", None) or {}
    classes = []
    for name in _AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            classes.append(_get_model_class(config, mapping))
        elif trust_remote_code and name in code:
            classes.append(get_class_from_dynamic_module(code[name], path))
    if not classes:
        raise CheckpointError(
            f"{path / 'config.json'}: transformers {transformers.__version__} generates no text with the family "
            f"{config.model_type!r}"
        )
    return next((known for known in classes if known.__name__ in config.architectures), classes[0])


def _dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the first dense tensor with floating values, float16 where there is none."""
    dtypes = map(checkpoint.tensor_dtype, checkpoint.dense)
    return next((dtype for dtype in dtypes if dtype in FLOAT_DTYPES), torch.float16)


def _skeleton(model_class: Any, config: Any) -> Any:
    with torch.device("meta"):
        return model_class._from_config(config)


class _Tensor:
    """A tensor of the files, read when transformers indexes it. A tensor of a quantized layer is never read here."""

    def __init__(self, checkpoint: Checkpoint, name: str, counter: Counter) -> None:
        self._checkpoint, self._name, self._counter = checkpoint, name, counter

    def get_dtype(self) -> str:
        """As in the header of safetensors, as far as transformers looks: floats begin with F."""
        return "F" if self._checkpoint.tensor_dtype(self._name).is_floating_point else "I"

    def get_shape(self) -> list[int]:
        """The shape of the whole tensor."""
        return list(self._checkpoint.tensor_shape(self._name))

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self._checkpoint.read_tensor(self._name)
        self._counter.count()
        return tensor[index]


def _from_pretrained(
    model_class: Any, config: Any, checkpoint: Checkpoint, dtype: Any, device: torch.device, counter: Counter
) -> tuple[Any, dict[str, Any]]:
    """The model, and transformers' report of keys that are missing, unexpected or of another shape."""
    # It imports transformers, which `require` has found by now.
    from exllama_ops.integrations.transformers.quantizer import GPTQConfig, Registration

    tensors = {name: _Tensor(checkpoint, name, counter) for name in checkpoint.dense}
    # transformers notes which of its renamings it used, and undoes those when it saves.
    tensors |= {f"{name}.qweight": _Tensor(checkpoint, name, counter) for name in checkpoint.quantized}
    try:
        with Registration(), _quiet(), collector_paused(), _default_device_cpu():
            model, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                # Without a map transformers asks accelerate for nothing.
                device_map=None if device.type == "cpu" else {"": device},
                quantization_config=GPTQConfig(checkpoint.quantization, checkpoint, counter.count),
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except CheckpointError:
        raise
    except Exception as error:  # transformers' errors share no base class
        raise CheckpointError(
            f"{checkpoint.path}: transformers cannot load {model_class.__name__}, which config.json describes: {error}"
        ) from error
    return model, report


def _default_device_cpu() -> AbstractContextManager[Any]:
    """transformers refuses any other default device of the caller's. The context costs every call of a function."""
    cpu = torch.device("cpu")
    return nullcontext() if torch.get_default_device() == cpu else cpu


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and reports: what they say is said here."""
    from transformers.utils import logging

    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


def _check_report(model: Any, checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    for name, got, expected in sorted(report["mismatched_keys"]):
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name} must have shape {tuple(expected)} for {type(model).__name__}; got "
            f"{tuple(got)}"
        )
    missing = [
        name
        for name in sorted(report["missing_keys"])
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), ExllamaLinear)
    ]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: tensors that {type(model).__name__} needs are missing: {listed(missing)}"
        )
    unexpected = sorted(report["unexpected_keys"])
    if unexpected:
        warnings.warn(
            f"{checkpoint.path}: {type(model).__name__} has no place for {listed(unexpected)}; left out",
            stacklevel=3,
        )
