"""Directories, shards, hub ids and optional dependencies."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from checkpoint.builder import DATA, module, quantization, write, write_sharded
from exllama_ops.checkpoint import CheckpointError, open_gptq, read_gptq
from exllama_ops.checkpoint.files import TensorFiles

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64),
    *(torch.int64, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
)

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def two_shards():
    """Two modules, the tensors of the second split over both files."""
    a, b = module("a", bias=True), module("b", seed=1)
    moved = {"b.scales": b.pop("b.scales"), "norm.weight": torch.ones(3)}
    return {FIRST: a | moved, SECOND: b}


def test_shards_read_as_one_file(tmp_path):
    shards = two_shards()
    whole = read_gptq(write(tmp_path / "whole", shards[FIRST] | shards[SECOND]), progress=False)
    sharded = read_gptq(write_sharded(tmp_path / "shards", shards), progress=False)
    assert set(whole) == set(sharded) == {"a", "b"}
    for name, weight in whole.items():
        other = sharded[name]
        assert torch.equal(weight.qweight, other.qweight)
        assert torch.equal(weight.qzeros, other.qzeros)
        assert torch.equal(weight.scales, other.scales)


def test_a_single_file_of_any_name_is_read(tmp_path):
    write(tmp_path, module("a"))
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-128g.safetensors")
    assert open_gptq(tmp_path).quantized == ("a",)


def test_names_come_in_the_order_of_the_data(tmp_path):
    shards = {FIRST: module("z"), SECOND: module("a")}
    assert open_gptq(write_sharded(tmp_path, shards)).quantized == ("z", "a")


def test_a_missing_shard_is_named(tmp_path):
    write_sharded(tmp_path, two_shards())
    (tmp_path / SECOND).unlink()
    with pytest.raises(CheckpointError, match=rf"{SECOND}: no such file"):
        open_gptq(tmp_path)


def test_a_tensor_that_the_index_has_and_the_file_has_not_is_named(tmp_path):
    shards = two_shards()
    write_sharded(tmp_path, shards)
    save_file({key: value for key, value in shards[SECOND].items() if key != "b.qzeros"}, tmp_path / SECOND)
    with pytest.raises(CheckpointError, match=rf"{SECOND}: tensor b\.qzeros is missing: the index"):
        open_gptq(tmp_path)


def test_a_tensor_that_the_index_lacks_is_ignored_aloud(tmp_path):
    shards = two_shards()
    write_sharded(tmp_path, shards)
    save_file(shards[SECOND] | {"extra": torch.ones(1), "a.scales": torch.zeros(2, 32).half()}, tmp_path / SECOND)
    with pytest.warns(UserWarning, match=rf"not in the index, so ignored: extra of {SECOND}, a\.scales of {SECOND}"):
        checkpoint = open_gptq(tmp_path)
    assert checkpoint.read("a").scales.ne(0).all()
    assert "extra" not in checkpoint.dense


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"index\.json: must be JSON"),
        ("[]", r"index\.json: must hold a JSON object; got list"),
        ("{}", r"index\.json: weight_map must be a JSON object; got None"),
        ('{"weight_map": ["a.qweight"]}', r"index\.json: weight_map must be a JSON object; got \['a\.qweight'\]"),
    ],
)
def test_a_broken_index_is_refused(tmp_path, text, message):
    write_sharded(tmp_path, two_shards())
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_gptq(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/model.safetensors", "", ".", "..", "a/", 5, None, True, ["a"], {"a": "b"}],
    ids=repr,
)
def test_the_index_names_files_of_its_own_directory(tmp_path, name):
    write_sharded(tmp_path, two_shards())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.qweight": name}}))
    message = rf"index\.json: weight_map must map each tensor to a file name.*; got {re.escape(repr(name))} for 'a\.q"
    with pytest.raises(CheckpointError, match=message):
        open_gptq(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800"], ids=["long", "null byte", "surrogate"])
def test_names_that_no_file_has_are_refused(tmp_path, name):
    write_sharded(tmp_path, two_shards())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.qweight": name}}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_gptq(tmp_path)


def test_ambiguous_directories_are_refused(tmp_path):
    write_sharded(tmp_path / "both", two_shards())
    write(tmp_path / "both", module("a"))
    with pytest.raises(CheckpointError, match=r"must have model\.safetensors or one index; got .*index\.json, model\."):
        open_gptq(tmp_path / "both")
    write_sharded(tmp_path / "two", two_shards())
    shutil.copy(tmp_path / "two" / "model.safetensors.index.json", tmp_path / "two" / "other.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"one index; got model.*other"):
        open_gptq(tmp_path / "two")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_refused_with_its_size(tmp_path, size):
    file = write(tmp_path, module()) / "model.safetensors"
    content = file.read_bytes()[:size]
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: must be a complete.*got {len(content)} bytes"):
        open_gptq(tmp_path)


def test_a_file_that_changes_after_opening_is_refused(tmp_path):
    checkpoint = open_gptq(write(tmp_path, module()))
    for tensors in (module("other"), module(K=128)):
        save_file(tensors, tmp_path / "new")
        (tmp_path / "new").replace(tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"tensor m\.q\.qweight is not what it was"):
            checkpoint.read("m.q")


def test_tensors_that_change_places_after_opening_are_refused(tmp_path):
    file = write(tmp_path, module() | {"a": torch.zeros(4), "b": torch.ones(4)}) / "model.safetensors"
    checkpoint = open_gptq(tmp_path)
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["a"], header["b"] = header["b"], header["a"]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(end - 8)
    file.write_bytes(content[:8] + text + content[end:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor a is not what it was when"):
        checkpoint.read_tensor("a")
    assert open_gptq(tmp_path).read_tensor("a").eq(1).all()


def test_data_that_is_cut_off_after_opening_is_refused(tmp_path):
    file = write(tmp_path, module()) / "model.safetensors"
    checkpoint = open_gptq(tmp_path)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"must be a complete safetensors file: tensor .* ends after the file"):
        checkpoint.read("m.q")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_every_dtype_is_read(tmp_path, dtype):
    tensor = torch.tensor([0, 1, 2, 4]).to(dtype)
    read = open_gptq(write(tmp_path, module() | {"x": tensor})).read_tensor("x")
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_scalars_and_tensors_of_nothing_are_read(tmp_path):
    checkpoint = open_gptq(write(tmp_path, module() | {"scalar": torch.tensor(3.0), "empty": torch.ones(0, 2)}))
    assert torch.equal(checkpoint.read_tensor("scalar"), torch.tensor(3.0))
    assert checkpoint.read_tensor("empty").shape == (0, 2)


def test_pickles_are_refused_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization()}))
    with pytest.raises(CheckpointError, match=r"must have its weights in safetensors files; found none"):
        open_gptq(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickle files, which can run code.*: model\.pt, pytorch_model\.bin"):
        open_gptq(tmp_path)


def test_pickles_beside_safetensors_are_left_alone(tmp_path):
    write(tmp_path, module())
    (tmp_path / "training_args.bin").write_bytes(b"")
    assert open_gptq(tmp_path).quantized == ("m.q",)


@pytest.mark.parametrize("path", ["./no-such", "/no/such/dir", "a/b/c", Path("owner/name")])
def test_a_path_that_is_no_directory_is_not_asked_of_the_hub(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(CheckpointError, match="must be an existing directory or a hub id"):
        open_gptq(path)


@pytest.mark.parametrize(
    "path", ["a\0b", "x" * 5000, "./" + "x/" * 5000, Path("\ud800")], ids=lambda path: str(path)[:3]
)
def test_a_path_that_the_system_refuses_is_a_checkpoint_error(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(CheckpointError, match="cannot be read: "):
        open_gptq(path)


def test_links_in_a_circle_are_no_directory(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=r"loop: cannot be read: Too many levels of symbolic links"):
        open_gptq(tmp_path / "loop")


@pytest.mark.parametrize("function", ["stat", "listdir", "open"])
def test_a_directory_without_permission_is_a_checkpoint_error(tmp_path, monkeypatch, function):
    """Simulated: permission bits do not hold for root."""
    write(tmp_path, module())

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        open_gptq(tmp_path)


def test_revision_of_a_local_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"revision is for hub ids.*'main'"):
        open_gptq(write(tmp_path, module()), revision="main")


def test_a_hub_id_is_downloaded_configs_first_and_no_pickles(tmp_path, monkeypatch):
    asked = []

    def download(repo, *, revision, allow_patterns):
        asked.append((repo, revision, tuple(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    write(tmp_path, module())
    checkpoint = open_gptq("owner/name", revision="abc")
    assert checkpoint.path == tmp_path
    (first, second) = asked
    assert first == ("owner/name", "abc", ("*.json",))
    assert second[:2] == ("owner/name", "abc")
    assert {"*.safetensors", "*.json", "tokenizer*"} <= set(second[2])
    assert not any(name.endswith((".bin", ".pt", "*")) and name != "tokenizer*" for name in second[2])

    asked.clear()
    write(tmp_path, module(), quant_method="awq")
    with pytest.raises(CheckpointError, match="got 'awq'"):
        open_gptq("owner/name")
    assert len(asked) == 1


def test_no_network_says_what_to_do(monkeypatch):
    def download(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find the files on the Hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"owner/name: .*cannot find the files[\s\S]*hf download owner/name"):
        open_gptq("owner/name")


@pytest.mark.parametrize(
    ("missing", "argument"), [("safetensors", DATA / "tiny-w4g64-lmhead"), ("huggingface_hub", "owner/name")]
)
def test_a_missing_extra_is_named(monkeypatch, missing, argument):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ImportError, match=rf'{missing} is needed here and not installed: pip install "exllama-ops\[hf\]"'
    ):
        open_gptq(argument)


def test_importing_the_package_imports_no_optional_dependency():
    code = (
        "import sys, exllama_ops.checkpoint;"
        "print([m for m in ('safetensors', 'huggingface_hub', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_stack_of_no_bytes_is_not_taken_apart(tmp_path: Path) -> None:
    """Its header may name more experts than there is memory for."""
    save_file({"experts.qweight": torch.empty(1 << 40, 1, 0, dtype=torch.int32)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert [*files.tensors] == ["experts.qweight"]
    assert not files.stacks
