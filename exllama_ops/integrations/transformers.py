"""GPTQ checkpoints as transformers models: `load_model`."""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exllama_ops.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from exllama_ops.checkpoint.disk import list_directory, read_json
from exllama_ops.extras import collector_paused, require
from exllama_ops.layout import GptqWeight
from exllama_ops.layout.checks import fills_words, words_rule
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.layout.lazy import LazyWeights
from exllama_ops.nn import convert, quantize
from exllama_ops.progress import Notify, ignore

# Files of old transformers versions hold this buffer in every layer; every version computes it from the config.
_COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")

_GENERATION_CONFIG = "generation_config.json"

_NAMES_SHOWN = 8

# With 8 bits, groups of 128 cost a head of 4096 x 32000 a quarter less time than groups of 32, and the demo 0.1% of
# perplexity. With fewer bits larger groups cost accuracy: 37.5 instead of 39.9 is the demo's perplexity with 4 bits.
_HEAD_GROUP_SIZE = {bits: 128 if bits == 8 else 32 for bits in SUPPORTED_BITS}

# Outputs of the head that are quantized at a time, which bounds the float32 copies. They fill whole words in any width.
_HEAD_SLICE = 4096


def load_model(
    path_or_id: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    revision: str | None = None,
    progress: bool = True,
    notify: Notify = ignore,
    lm_head_bits: int | None = None,
) -> Any:
    """Load a GPTQ checkpoint as a transformers causal LM whose quantized Linear layers are `exllama_ops.ExllamaLinear`.

    The model is built on the meta device and filled tensor by tensor: peak memory is about the checkpoint's size.

    Args:
        path_or_id: a directory, or a hub id, as in `exllama_ops.open_checkpoint`.
        dtype: of the activations and of all dense tensors; scales keep the dtype they have in the file. None for the
            dtype of config.json, float16 if it names none.
        device: where to put the model.
        revision: branch, tag or commit of a hub id.
        progress: show a progress bar on stderr, if that is a terminal.
        notify: takes the steps, for a progress of your own.
        lm_head_bits: quantize a dense output head to 8 bits, or to 2, 3 or 4, by rounding to nearest. Every token reads
            the whole head, and 8 bits halve it. Fewer bits cost accuracy that nothing corrects. The groups are
            asymmetric, of 128 inputs for 8 bits and of 32 for fewer. If the head is tied to the embedding, that stays
            dense, and the model grows by the quantized copy. None leaves the head as it is.

    Returns:
        The model, a `transformers.PreTrainedModel`, in eval mode, its parameters frozen.

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
    checkpoint = open_checkpoint(path_or_id, revision=revision)
    with collector_paused():
        transformers = require("transformers")
        config = _read_config(transformers, checkpoint.path)
        if dtype is None:
            dtype = config.dtype or torch.float16
        model = _build(transformers, config, dtype)
        head_is_tied = False
        if lm_head_bits is not None:
            _check_head(model, checkpoint, lm_head_bits)
            head_is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        # A quantized copy of the head cannot be tied.
        if head_is_tied or _must_untie(model, checkpoint):
            for part in {id(part): part for part in (config, config.get_text_config(decoder=True))}.values():
                part.tie_word_embeddings = False
            model = _build(transformers, config, dtype)
    _check_quantized(model, checkpoint)

    total = len(checkpoint.quantized) + len(checkpoint.dense)
    with tqdm(desc="Loading", total=total, unit=" weights", disable=None if progress else True) as bar:
        counter = _Counter(bar, notify, f"loading {checkpoint.path}", total)
        try:
            convert(model, _weights(checkpoint, device, counter))
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error
        unexpected = _load_dense(model, checkpoint, dtype, device, counter)
    if head_is_tied:
        _fill_each_other(model.get_input_embeddings(), model.get_output_embeddings())
    if lm_head_bits is not None and not model.get_output_embeddings().weight.is_meta:
        try:
            _quantize_head(model, lm_head_bits, progress, notify)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: the output head: {error}") from error
    _check_complete(model, checkpoint.path)
    if unexpected:
        warnings.warn(
            f"{checkpoint.path}: {type(model).__name__} has no place for {_listed(unexpected)}; left out",
            stacklevel=2,
        )
    # It describes the files. What this model would save is in the layers' own order, and no GPTQ checkpoint.
    vars(model.config).pop("quantization_config", None)
    if _GENERATION_CONFIG in list_directory(checkpoint.path):
        model.generation_config = _read_generation_config(transformers, checkpoint.path / _GENERATION_CONFIG)
    # Moves what no file holds: buffers that the model computed.
    return model.to(device).eval()


def _read_config(transformers: Any, path: Path) -> Any:
    """The model's config, out of a copy: transformers opens any kind of file, waits for FIFOs, and knows no BOM."""
    values = read_json(path / "config.json")
    try:
        with tempfile.TemporaryDirectory() as copy:
            (Path(copy) / "config.json").write_text(json.dumps(values), encoding="utf-8")
            config = transformers.AutoConfig.from_pretrained(copy, trust_remote_code=False)
    except Exception as error:  # transformers' errors share no base class
        raise CheckpointError(f"{path / 'config.json'}: must describe a transformers model: {error}") from error
    config.name_or_path = str(path)
    return config


def _read_generation_config(transformers: Any, path: Path) -> Any:
    values = read_json(path)
    try:
        return transformers.GenerationConfig.from_dict(values)
    except Exception as error:  # as above
        raise CheckpointError(f"{path}: must describe how to generate: {error}") from error


def _build(transformers: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model with its parameters on the meta device; buffers are real, since rotary ones are in no file."""
    init_empty_weights = require("accelerate").init_empty_weights
    try:
        # The buffers are made here and moved with the rest, whatever the caller's default device is.
        with torch.device("cpu"), init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # as above
        raise CheckpointError(f"config.json must describe a causal language model: {error}") from error
    # accelerate wraps every parameter anew, which parts the tied ones.
    model.tie_weights()
    return model


def _tied_groups(model: nn.Module) -> list[list[str]]:
    """The names of each parameter, several where it is tied."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def _must_untie(model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Whether the files contradict a config that ties: one of the two is quantized, or both are there and differ."""
    quantized, dense = set(checkpoint.quantized), set(checkpoint.dense)
    for names in _tied_groups(model):
        if len(names) == 1:
            continue
        if any(name.removesuffix(".weight") in quantized for name in names):
            return True
        present = [name for name in names if name in dense]
        if len(present) > 1:
            first = checkpoint.read_tensor(present[0])
            if not all(torch.equal(first, checkpoint.read_tensor(name)) for name in present[1:]):
                return True
    return False


def _check_quantized(model: nn.Module, checkpoint: Checkpoint) -> None:
    modules = dict(model.named_modules())
    alien = [name for name in checkpoint.quantized if not isinstance(modules.get(name), nn.Linear)]
    if alien:
        raise CheckpointError(
            f"{checkpoint.path}: quantized modules must be nn.Linear layers of {type(model).__name__}, which "
            f"config.json describes; {len(alien)} of {len(checkpoint.quantized)} are not: {_listed(alien)}"
        )


def _check_head(model: Any, checkpoint: Checkpoint, bits: int) -> None:
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


def _name_of(model: nn.Module, module: nn.Module) -> str | None:
    return next((name for name, member in model.named_modules() if member is module), None)


def _fill_each_other(*modules: Any) -> None:
    """Share the weight of modules that are tied in the files, which then hold one of them."""
    filled = [module.weight for module in modules if not module.weight.is_meta]
    for module in modules:
        if filled and module.weight.is_meta:
            module.weight = filled[0]


def _quantize_head(model: Any, bits: int, progress: bool, notify: Notify) -> None:
    """Put an ExllamaLinear with the rounded weight in place of the output head."""
    tqdm = require("tqdm").tqdm
    head = model.get_output_embeddings()
    name = _name_of(model, head)
    assert name is not None
    slices = head.weight.split(_HEAD_SLICE)
    parts = []
    disable = None if progress else True
    with tqdm(desc="Quantizing the head", total=len(slices), unit=" slices", disable=disable) as bar:
        counter = _Counter(bar, notify, f"quantizing the output head to {bits} bits", len(slices))
        for rows in slices:
            parts.append(quantize(rows, bits, _HEAD_GROUP_SIZE[bits]))
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
    convert(model, {name: packed})


class _Counter:
    """Counts, on a bar and for a `Notify`."""

    def __init__(self, bar: Any, notify: Notify, step: str, total: int) -> None:
        self._bar, self._notify, self._step, self._total = bar, notify, step, total
        self._done = 0
        notify(step, 0, total)

    def count(self) -> None:
        self._done += 1
        self._bar.update()
        self._notify(self._step, self._done, self._total)


def _weights(checkpoint: Checkpoint, device: torch.device | str, counter: _Counter) -> LazyWeights:
    """The quantized modules, each read onto ``device`` when it is asked for."""

    def read(name: str) -> GptqWeight:
        weight = checkpoint.read(name, device)
        counter.count()
        return weight

    return LazyWeights(checkpoint.quantized, read)


def _load_dense(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str, counter: _Counter
) -> list[str]:
    """Fill parameters and persistent buffers; return the names of the tensors that the model has no place for."""
    tied = {name: names for names in _tied_groups(model) for name in names}
    buffers = dict(model.named_buffers())
    kept = _kept_in_float32(model, dtype)
    unexpected: list[str] = []
    filled: set[str] = set()
    for name in checkpoint.dense:
        counter.count()
        if name not in tied and name not in buffers:
            if not _COMPUTED.search(name):
                unexpected.append(name)
            continue
        if name in filled or _COMPUTED.search(name):
            continue
        tensor = checkpoint.read_tensor(name, device)
        module_name, _, leaf = name.rpartition(".")
        expected = getattr(model.get_submodule(module_name), leaf)
        if tensor.shape != expected.shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} must have shape {tuple(expected.shape)} for {type(model).__name__}; "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() and not kept.search(name):
            tensor = tensor.to(dtype)
        names = tied.get(name, [name])
        value = nn.Parameter(tensor, requires_grad=False) if name in tied else tensor
        for member in names:
            module_name, _, leaf = member.rpartition(".")
            setattr(model.get_submodule(module_name), leaf, value)
        filled.update(names)
    return unexpected


def _kept_in_float32(model: Any, dtype: torch.dtype) -> re.Pattern[str]:
    """The names of the tensors that a model of transformers wants in float32 even if the rest is ``dtype``."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:  # the others only lack float16's range
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in sorted(names)) or "(?!)")


def _check_complete(model: nn.Module, path: Path) -> None:
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    missing = [name for name, tensor in tensors.items() if tensor.is_meta]
    if missing:
        raise CheckpointError(f"{path}: tensors that {type(model).__name__} needs are missing: {_listed(missing)}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
