"""Which files are the model where a directory has more than one answer, and what is said where it has none."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
from safetensors.torch import save_file

from checkpoint.builder import DATA, module, quantization, write, write_sharded
from exllama_ops.checkpoint import CheckpointError, open_checkpoint, open_gptq

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
AUTOGPTQ = "gptq_model-4bit-32g.safetensors"


def index_of(names):
    return json.dumps({"weight_map": {f"{Path(name).stem}.qweight": name for name in names}})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of one module each, named as the file is."""
    folder = tmp_path_factory.mktemp("files")
    adapters = ("adapter_model.safetensors", "consolidated.safetensors", "._model.safetensors")
    for name in (*SHARDS, AUTOGPTQ, *adapters, "model.safetensors", "other.safetensors", "third.safetensors"):
        save_file(module(Path(name).stem.replace(".", "")), folder / name)
    return folder


def put(directory, files, names, config=None, quantize=None):
    for name in names:
        if name.endswith(".json"):
            (directory / name).write_text(index_of(SHARDS if name == INDEX else ("other.safetensors",)))
        else:
            (directory / name).symlink_to(files / name)
    (directory / "config.json").write_text(json.dumps({"quantization_config": {**quantization(), **(config or {})}}))
    if quantize is not None:
        (directory / "quantize_config.json").write_text(json.dumps(quantization(**quantize)))
    return directory


def whole(directory):
    """Shards whose index has all of their tensors."""
    weight_map = {
        f"{Path(name).stem}.{kind}": name for name in SHARDS for kind in ("qweight", "qzeros", "scales", "g_idx")
    }
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("names", "taken", "left_out"),
    [
        (["model.safetensors", "adapter_model.safetensors", "consolidated.safetensors"], "model", ()),
        (["model.safetensors", "._model.safetensors"], "model", ()),
        (["other.safetensors", "adapter_model.safetensors"], "other", ()),
        (["consolidated.safetensors"], "consolidated", ()),
        (["model.safetensors", "other.safetensors"], "model", ("other.safetensors",)),
        ([AUTOGPTQ, "other.safetensors"], AUTOGPTQ[:-12], ("other.safetensors",)),
        (["model.safetensors", INDEX], "model", (INDEX,)),
        (["model.safetensors", SHARDS[0], INDEX], "model", (SHARDS[0], INDEX)),
        ([AUTOGPTQ, INDEX], AUTOGPTQ[:-12], (INDEX,)),
    ],
)
def test_the_file_that_is_the_model_is_read_and_what_was_left_out_is_told_once(tmp_path, files, names, taken, left_out):
    put(tmp_path, files, names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert open_checkpoint(tmp_path).quantized == (taken,)
    told = [f"{tmp_path}: the weights are those of {taken}.safetensors; left out: {', '.join(left_out)}"]
    assert [str(warning.message) for warning in caught] == (told if left_out else [])
    assert all(warning.filename == __file__ for warning in caught)


@pytest.mark.parametrize("field", ["model_file_base_name", "model_basename"])
@pytest.mark.parametrize("where", ["config", "quantize"])
def test_a_config_may_name_the_file(tmp_path, files, field, where):
    put(tmp_path, files, ["model.safetensors", "other.safetensors"], **{where: {field: "other"}})
    with pytest.warns(UserWarning, match=r"the weights are those of other\.safetensors; left out: model\.safetensors$"):
        assert open_gptq(tmp_path).quantized == ("other",)


@pytest.mark.parametrize("name", ["gone", "../other", "", 5, None])
def test_a_name_that_is_no_file_of_the_directory_says_nothing(tmp_path, files, name):
    put(tmp_path, files, ["model.safetensors"], config={"model_basename": name})
    assert open_gptq(tmp_path).quantized == ("model",)


def test_numbered_files_need_no_index_if_all_are_there(tmp_path, files):
    assert open_gptq(put(tmp_path, files, SHARDS)).quantized == tuple(Path(name).stem for name in SHARDS)
    (tmp_path / SHARDS[1]).unlink()
    save_file(module(Path(SHARDS[0]).stem), tmp_path / SHARDS[1])
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}: tensor \S+ must be in one file; {SHARDS[0]} has it too"):
        open_gptq(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["other.safetensors", "third.safetensors"],
            r"several .*; got other\.safetensors, third\.safetensors: name the",
        ),
        (["other.safetensors", SHARDS[0], SHARDS[1]], r"several safetensors files need an index"),
        (["adapter_model.safetensors"], r"found only adapter_model\.safetensors, an adapter: open the model"),
        ([INDEX], rf"{SHARDS[0]}: no such file"),
        ([SHARDS[0], INDEX], rf"{SHARDS[1]}: no such file"),
        (
            ["model.safetensors", *SHARDS, INDEX],
            rf"must have model\.safetensors or one index; got {INDEX}, model\.safe",
        ),
    ],
)
def test_what_no_rule_decides_is_refused_with_the_candidates(tmp_path, files, names, message):
    with pytest.raises(CheckpointError, match=message):
        open_gptq(put(tmp_path, files, names))


@pytest.mark.parametrize("opens", [open_gptq, open_checkpoint])
@pytest.mark.parametrize("name", ["other", "third"])
def test_a_path_to_a_file_says_which_one_is_meant(tmp_path, files, opens, name):
    put(tmp_path, files, ["other.safetensors", "third.safetensors", "adapter_model.safetensors"])
    with pytest.warns(UserWarning, match=rf"are those of {name}\.safetensors; left out: "):
        checkpoint = opens(tmp_path / f"{name}.safetensors")
    assert (checkpoint.quantized, checkpoint.path) == ((name,), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.safetensors: must be a file with the weights of a model"
    ):
        opens(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_path_to_a_file_that_is_read_anyway_is_its_directory(tmp_path, files, name):
    put(tmp_path, files, ["model.safetensors"])
    assert open_checkpoint(str(tmp_path / name)).quantized == ("model",)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.bin: must be a directory, a hub id .*; got another file"):
        open_checkpoint(tmp_path / "model.bin")


def test_a_path_to_a_shard_is_the_whole_of_its_index(tmp_path, files):
    whole(put(tmp_path, files, SHARDS))
    assert len(open_checkpoint(tmp_path / SHARDS[1]).quantized) == 2


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 9\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "quantize_config.json", INDEX])
def test_a_pointer_of_git_lfs_is_told_with_the_way_out(tmp_path, name):
    if name == INDEX:
        write_sharded(tmp_path, {SHARDS[0]: module()})
    else:
        write(tmp_path, module())
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(
        CheckpointError, match=rf"{name}: must be the file itself; got a pointer of Git LFS: run `git lfs"
    ):
        open_gptq(tmp_path)


@pytest.mark.parametrize(
    ("modules", "allowed"),
    [
        ([{"K": 256, "group_size": 128}], (4, 128)),
        ([{"K": 64, "bits": 3, "group_size": 64}, {"K": 96, "bits": 3, "group_size": 64, "seed": 1}], (3, 64)),
        ([{"K": 64, "group_size": -1, "bits": 8}, {"K": 128, "group_size": -1, "bits": 8}], (8, -1)),
        ([{"K": 96, "group_size": 64, "bits": 2}], (2, 64)),
        ([{"K": 144, "group_size": 48}], (4, 64)),
        ([{"K": 192, "group_size": 48}], (4, 48)),
        ([{"K": 64, "group_size": 128}, {"K": 256, "group_size": 128}], (4, 128)),
    ],
)
def test_files_without_a_config_are_told_what_their_shapes_allow(tmp_path, modules, allowed):
    tensors = {key: value for i, kind in enumerate(modules) for key, value in module(f"m{i}", **kind).items()}
    write(tmp_path, tensors)
    (tmp_path / "config.json").write_text('{"quantization_config": {"sym": true}}')
    bits, size = allowed
    said = {"bits": bits, "group_size": size}
    told = f"the shapes allow bits={bits}, group_size={size}: pass --bits {bits} --group-size {size}"
    with pytest.raises(CheckpointError, match=re.escape(f"bits is missing; {told}, or quantization_config={said}")):
        open_checkpoint(tmp_path)
    assert len(open_checkpoint(tmp_path, quantization_config=said).quantized) == len(modules)


def test_shapes_that_do_not_tell_are_no_guess(tmp_path):
    tensors = {key: value for key, value in module().items() if key.endswith(("qweight", "scales"))}
    write(tmp_path, tensors)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="found neither; if its files are GPTQ's all the same, pass --bits and"):
        open_checkpoint(tmp_path)
    shutil.rmtree(tmp_path)
    write(tmp_path, module("a", bits=4) | module("b", bits=8), bits=...)
    with pytest.raises(CheckpointError, match="field bits is missing; if its files are"):
        open_checkpoint(tmp_path)


def test_the_shapes_are_those_of_the_file_that_is_meant(tmp_path):
    for name, bits in (("a", 2), ("b", 8)):
        write(tmp_path, module(bits=bits))
        (tmp_path / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the shapes allow bits=8, group_size=32"):
        open_checkpoint(tmp_path / "b.safetensors")


def test_a_model_that_is_not_quantized_is_told_so(tmp_path):
    write(tmp_path, {"m.weight": module()["m.q.scales"]})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"found neither; its files have no tensor NAME\.qweight, so they are not"
    ):
        open_checkpoint(tmp_path)


def test_the_group_size_alone_may_be_said(tmp_path):
    shutil.copytree(DATA / "tiny-w3g32-asym-act-v2", tmp_path / "model")
    for name in ("config.json", "quantize_config.json"):
        values = json.loads((tmp_path / "model" / name).read_text())
        del (values.get("quantization_config") or values)["group_size"]
        (tmp_path / "model" / name).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="field group_size is missing; the shapes allow bits=3, group_size=32"):
        open_checkpoint(tmp_path / "model")
    assert open_checkpoint(tmp_path / "model", quantization_config={"group_size": "32"}).config.bits == 3
