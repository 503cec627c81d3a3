"""`open_checkpoint`: a format is one file, and loaders, `convert` and `save_gptq` take what it opens."""

from __future__ import annotations

import json
import re

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from checkpoint import plain_format
from checkpoint.builder import DATA, module, write
from exllama_ops import Checkpoint, CheckpointError, ExllamaLinear, convert, open_checkpoint, open_gptq, save_gptq
from exllama_ops.checkpoint import GptqCheckpoint, opening
from exllama_ops.checkpoint.files import TensorFiles

NAMES = ("smol1-w2g32-asym-act", "tiny-w3g32-asym-act-v2", "tiny-w4g64-lmhead")


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(opening, "FORMATS", (*opening.FORMATS, plain_format))


def assert_equal(one, other):
    assert (one.bits, one.group_size) == (other.bits, other.group_size)
    for name in ("qweight", "qzeros", "scales", "g_idx", "bias"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("name", NAMES)
def test_a_gptq_checkpoint_is_opened_as_by_open_gptq(name):
    checkpoint = open_checkpoint(DATA / name)
    assert isinstance(checkpoint, GptqCheckpoint)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.format == "gptq"
    want = open_gptq(DATA / name)
    assert (checkpoint.quantized, checkpoint.dense) == (want.quantized, want.dense)
    for layer, weight in checkpoint.weights().items():
        assert_equal(weight, want.read(layer))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("name", NAMES)
def test_a_format_of_one_file_is_opened_and_saved_as_gptq(tmp_path, name):
    source = open_gptq(DATA / name)
    checkpoint = open_checkpoint(plain_format.write(tmp_path / "plain", source))
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.format == "plain"
    assert len(checkpoint.weights()) == len(source.quantized)
    assert "no.such" not in checkpoint.weights()
    save_gptq(
        tmp_path / "gptq",
        checkpoint.weights(),
        {tensor: checkpoint.read_tensor(tensor) for tensor in checkpoint.dense},
        sym=False,
        desc_act=True,
    )
    saved = open_checkpoint(tmp_path / "gptq")
    assert set(saved.quantized) == set(source.quantized)
    assert set(saved.dense) == set(source.dense)
    for layer in source.quantized:
        assert_equal(saved.read(layer), source.read(layer))


@pytest.mark.usefixtures("plain")
def test_a_format_of_one_file_is_converted(tmp_path):
    source = open_gptq(write(tmp_path / "gptq", module("0", K=64, N=32, act=True, sym=False), sym=False, desc_act=True))
    checkpoint = open_checkpoint(plain_format.write(tmp_path / "plain", source))
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    assert convert(model, checkpoint.weights()).converted == ("0",)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), ExllamaLinear.from_weight(source.read("0"))(x))


@pytest.mark.usefixtures("plain")
def test_a_format_of_one_file_is_loaded_as_a_model(tmp_path):
    pytest.importorskip("transformers", reason='needs the extra "hf"')
    from exllama_ops import load_model

    source = DATA / "tiny-w4g64-lmhead"
    ids = torch.arange(8).unsqueeze(0)
    plain_path = plain_format.write(tmp_path, open_gptq(source))
    logits = [load_model(path, torch.float16, progress=False)(ids).logits for path in (source, plain_path)]
    assert torch.equal(*logits)


@pytest.mark.usefixtures("plain")
def test_a_folder_that_no_format_takes_is_refused_with_the_reasons_of_each(tmp_path):
    path = write(tmp_path, module(), quant_method="hqq")
    text = (
        f"{path}: no checkpoint format takes it. {path / 'config.json'}: quantization_config: quant_method must be one "
        "of gptq, auto-round, awq, compressed-tensors; got 'hqq' | plain: there must be a plain.json; found none"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(text)}$"):
        open_checkpoint(path)


def test_a_broken_checkpoint_is_told_as_its_format_tells_it(tmp_path):
    path = write(tmp_path, module())
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"^[^|]*model\.safetensors: must be a complete safetensors file"):
        open_checkpoint(path)


@pytest.mark.parametrize("field", [{"bits": 5}, {"quant_method": "hqq"}])
def test_what_no_format_takes_is_refused_before_its_weights_are_downloaded(tmp_path, monkeypatch, field):
    asked = []

    def download(repo, *, revision, allow_patterns):
        asked.append(tuple(allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    write(tmp_path, module(), **field)
    with pytest.raises(CheckpointError, match="no checkpoint format takes it"):
        open_checkpoint("owner/name")
    assert asked == [("*.json",)]
    write(tmp_path, module())
    assert open_checkpoint("owner/name").quantized == ("m.q",)


@pytest.mark.parametrize("opens", [open_gptq, open_checkpoint])
def test_configs_that_contradict_warn_once_in_the_line_of_the_caller(tmp_path, opens):
    write(tmp_path, module())
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 64}')
    with pytest.warns(UserWarning, match="group_size is 32 and 64") as seen:
        opens(tmp_path)
    assert [warning.filename for warning in seen] == [__file__]


def test_module_says_what_the_file_has():
    checkpoint = open_gptq(DATA / "tiny-w3g32-asym-act-v2")
    for name in checkpoint.quantized:
        described, weight = checkpoint.module(name), checkpoint.read(name)
        assert (described.in_features, described.out_features) == (weight.in_features, weight.out_features)
        assert (described.bits, described.group_size, described.zero_offset, described.sym) == (3, 32, 0, False)
        for tensor in described.tensors:
            stored = checkpoint.read_tensor(f"{name}.{tensor}")
            assert described.shapes[tensor] == tuple(stored.shape)
            assert described.dtypes[tensor] == stored.dtype
    with pytest.raises(CheckpointError, match=r"no quantized module 'no\.such'"):
        checkpoint.module("no.such")


@pytest.mark.parametrize("name", NAMES)
def test_a_summary_says_of_each_module_what_reading_it_finds(name):
    checkpoint = open_checkpoint(DATA / name)
    for layer in checkpoint.quantized:
        summary, weight = checkpoint.summary(layer), checkpoint.read(layer)
        K, N = (weight.qweight.shape[0] * 32 // weight.bits, weight.qweight.shape[1])
        assert (summary.in_features, summary.out_features, summary.num_groups) == (K, N, len(weight.scales))
        assert (summary.bits, summary.group_size, summary.sym) == (weight.bits, weight.group_size, "asym" not in name)
        assert summary.act_order == (weight.g_idx is not None)
        assert summary.bias == (weight.bias is not None)
        assert summary.zero_format == ("gptq_v2" if name.endswith("v2") else "gptq")
        stored = [tensor for tensor in load_file(DATA / name / "model.safetensors") if tensor.startswith(f"{layer}.")]
        assert summary.num_bytes == sum(checkpoint.read_tensor(tensor).nbytes for tensor in stored)
    with pytest.raises(CheckpointError, match=r"no quantized module 'no\.such'"):
        checkpoint.summary("no.such")


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes_of_tensors_come_without_reading_them(name, monkeypatch):
    checkpoint = open_checkpoint(DATA / name)
    stored = load_file(DATA / name / "model.safetensors")
    monkeypatch.setattr(TensorFiles, "read", None)
    for tensor in checkpoint.dense:
        assert checkpoint.tensor_shape(tensor) == tuple(stored[tensor].shape)
        assert checkpoint.tensor_dtype(tensor) == stored[tensor].dtype
    for asked in (checkpoint.tensor_shape, checkpoint.tensor_dtype):
        with pytest.raises(CheckpointError, match=r"no tensor 'no\.such'"):
            asked("no.such")


def test_quantization_is_the_config_as_the_files_have_it(tmp_path):
    write(tmp_path, module(), made_by="a tool", sym=None, format=None)
    other = {"bits": 4, "format": "gptq_v2", "sym": True, "damp_percent": 0.1, "method": "gptq"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(other))
    checkpoint = open_checkpoint(tmp_path)
    want = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "made_by": "a tool"}
    assert checkpoint.quantization == {**want, "sym": True, "format": "gptq_v2", "damp_percent": 0.1}
    assert checkpoint.config.checkpoint_format == "gptq_v2"


@pytest.mark.parametrize("opens", [open_gptq, open_checkpoint])
def test_what_the_files_do_not_say_may_be_said(tmp_path, opens):
    write(tmp_path, module("m", sym=False, act=True, fmt="gptq_v2"))
    want = open_gptq(
        write(
            tmp_path / "said",
            module("m", sym=False, act=True, fmt="gptq_v2"),
            sym=False,
            desc_act=True,
            checkpoint_format="gptq_v2",
        )
    )
    (tmp_path / "config.json").write_text('{"model_type": "test"}')
    with pytest.raises(CheckpointError, match=r"config\.json must have a quantization_config"):
        opens(tmp_path)
    said = {"bits": 4, "group_size": 32, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"}
    checkpoint = opens(tmp_path, quantization_config=said)
    assert_equal(checkpoint.read("m"), want.read("m"))
    assert checkpoint.quantization == said
    with pytest.raises(CheckpointError, match="quantization_config, as given,: field group_size is missing"):
        opens(tmp_path, quantization_config={"bits": 4})


@pytest.mark.parametrize("opens", [open_gptq, open_checkpoint])
def test_what_is_said_wins_over_the_files_aloud(tmp_path, opens):
    write(tmp_path, module(sym=False, fmt="gptq_v2"), sym=False, checkpoint_format="gptq", desc_act=None)
    with pytest.warns(UserWarning, match="as given, and .*checkpoint_format is 'gptq_v2' and 'gptq'") as seen:
        checkpoint = opens(tmp_path, quantization_config={"format": "gptq_v2"})
    assert [warning.filename for warning in seen] == [__file__]
    assert checkpoint.config.checkpoint_format == "gptq_v2"
