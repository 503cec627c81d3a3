"""`convert_checkpoint`: exact, resumed after any interruption, and never over what it reads."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint.builder import DATA, module, write
from checkpoint.test_open_checkpoint import assert_equal
from checkpoint.test_writers import FOLDERS, WRITERS
from exllama_ops import CheckpointError, open_checkpoint
from exllama_ops.checkpoint.convert import convert_checkpoint

SHARD_BYTES = 8_000
SOURCE = WRITERS / "compressed-tensors-0.12.2"


def contents(directory):
    """Every file and what it holds; of config.json and the like what it says."""
    files = {path.name: path for path in directory.iterdir()}
    return {
        name: load_file(path) if path.suffix == ".safetensors" else path.read_bytes() for name, path in files.items()
    }


def assert_same(one, other):
    a, b = contents(one), contents(other)
    assert set(a) == set(b)
    for name, value in a.items():
        if isinstance(value, dict):
            assert set(value) == set(b[name])
            assert all(torch.equal(tensor, b[name][key]) for key, tensor in value.items())
        else:
            assert value == b[name], name


@pytest.mark.parametrize("checkpoint_format", ["gptq_v2", "gptq"])
@pytest.mark.parametrize("folder", [*(f"writers/{name}" for name in FOLDERS), "smol1-w2g32-asym-act"])
def test_what_was_converted_is_exact(tmp_path, folder, checkpoint_format):
    source = open_checkpoint(DATA / folder)
    conversion = convert_checkpoint(source, tmp_path / "out", checkpoint_format=checkpoint_format)
    converted = open_checkpoint(tmp_path / "out")
    assert converted.format == "gptq"
    assert converted.config.checkpoint_format == checkpoint_format == conversion.checkpoint_format
    assert set(converted.quantized) == set(source.quantized)
    assert set(converted.dense) == set(source.dense)
    assert (conversion.modules, conversion.tensors) == (len(source.quantized), len(source.dense))
    for name, weight in source.weights().items():
        assert_equal(converted.read(name), weight)
    for name in source.dense:
        assert torch.equal(converted.read_tensor(name), source.read_tensor(name))
    assert converted.config.desc_act == any(w.g_idx is not None for w in source.weights().values())
    assert converted.config.sym == all((w.qzeros == w.qzeros[0, 0]).all() for w in source.weights().values())


def test_config_says_which_layers_of_a_block_stay_dense(tmp_path):
    convert_checkpoint(open_checkpoint(WRITERS / "autoawq-gemm"), tmp_path)
    dynamic = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["dynamic"]
    assert dynamic == {r"-:^model\.layers\.0\.self_attn\.o_proj$": {}}


def test_files_of_the_tokenizer_are_copied_and_those_of_the_quantization_are_not(tmp_path):
    source = write(tmp_path / "in", module())
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "merges.txt", "LICENSE"):
        (source / name).write_text(name)
    for name in ("quantize_config.json", "quant_config.json", "model.safetensors.index.json.bak", "model.bin"):
        (source / name).write_text("{}")
    convert_checkpoint(open_checkpoint(source), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("tokenizer.json", "chat_template.jinja", "generation_config.json", "merges.txt", "LICENSE"),
        *("config.json", "quantize_config.json", "model.safetensors"),
    }
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges.txt"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "test"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "out"
    conversion = convert_checkpoint(open_checkpoint(SOURCE), path, max_shard_bytes=SHARD_BYTES)
    assert conversion.files > 3
    assert conversion.files_kept == 0
    return path


class Killed(BaseException):
    """What ends a process at once."""


def test_a_conversion_that_was_stopped_anywhere_leaves_no_checkpoint_and_goes_on(tmp_path, monkeypatch, whole):
    """Each file is put in place by a rename: the process ends at the first one, at the second one, and so on."""
    replace = Path.replace
    left = 0

    def counted(self, target):
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", counted)
    source = open_checkpoint(SOURCE)
    for renames in range(1000):
        out = tmp_path / str(renames)
        left = renames
        try:
            convert_checkpoint(source, out, max_shard_bytes=SHARD_BYTES)
        except Killed:
            pass
        else:
            break
        assert not (out / "config.json").exists()
        if (out / "quantize_config.json").exists():
            assert {path.name for path in whole.iterdir()} - {path.name for path in out.iterdir()} == {"config.json"}
        else:
            with pytest.raises(CheckpointError):
                open_checkpoint(out)
        left = 1000
        resumed = convert_checkpoint(source, out, max_shard_bytes=SHARD_BYTES)
        assert resumed.files_kept == min(max(renames - 1, 0) // 2, resumed.files)
        assert_same(out, whole)
    assert renames > 2 * len(list(whole.glob("*.safetensors"))) + 3


def test_a_killed_process_leaves_what_the_next_one_goes_on_from(tmp_path, whole):
    out = tmp_path / "out"
    code = f"""
import os, signal
from pathlib import Path
from exllama_ops import open_checkpoint
from exllama_ops.checkpoint.convert import convert_checkpoint
def notify(step, done=None, total=None, detail=""):
    if done == 6:
        os.kill(os.getpid(), signal.SIGKILL)
convert_checkpoint(open_checkpoint({str(SOURCE)!r}), Path({str(out)!r}), max_shard_bytes={SHARD_BYTES}, notify=notify)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError):
        open_checkpoint(out)
    assert convert_checkpoint(open_checkpoint(SOURCE), out, max_shard_bytes=SHARD_BYTES).files_kept > 0
    assert_same(out, whole)


def stopped(tmp_path):
    """A conversion that stopped with two files written."""

    def stop(step, done=None, total=None, detail=""):
        if len(list((tmp_path / "out").glob(".convert-0*"))) == 2:
            raise Killed

    with pytest.raises(Killed):
        convert_checkpoint(open_checkpoint(SOURCE), tmp_path / "out", max_shard_bytes=SHARD_BYTES, notify=stop)
    return tmp_path / "out"


def test_a_file_that_was_damaged_since_is_written_again(tmp_path, whole):
    out = stopped(tmp_path)
    damaged = out / ".convert-00001"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert convert_checkpoint(open_checkpoint(SOURCE), out, max_shard_bytes=SHARD_BYTES).files_kept == 1
    assert_same(out, whole)


def test_another_source_or_other_options_do_not_go_on(tmp_path):
    out = stopped(tmp_path)
    for source, options in ((WRITERS / "autoawq-gemm", {}), (SOURCE, {"checkpoint_format": "gptq"})):
        with pytest.raises(CheckpointError, match=r"stopped with another source or other options\. Remove the folder"):
            convert_checkpoint(open_checkpoint(source), out, max_shard_bytes=SHARD_BYTES, **options)


@pytest.mark.parametrize("shards", [None, [1], [{"layers": {}}]])
def test_a_journal_that_nobody_wrote_is_refused(tmp_path, shards):
    journal = stopped(tmp_path) / ".convert.json"
    journal.write_text(json.dumps(json.loads(journal.read_text()) | {"shards": shards}))
    with pytest.raises(CheckpointError, match=r"\.convert\.json: must be as convert wrote it: remove the folder"):
        convert_checkpoint(open_checkpoint(SOURCE), tmp_path / "out", max_shard_bytes=SHARD_BYTES)


def copy_of_source(tmp_path):
    source = tmp_path / "source"
    return write(source, module())


@pytest.mark.parametrize("place", ["source", "source/inner", ".", "link", "link/inner"])
def test_a_destination_in_or_around_the_source_is_refused(tmp_path, place):
    source = copy_of_source(tmp_path)
    (tmp_path / "link").symlink_to(source)
    before = contents(source)
    with pytest.raises(CheckpointError, match="must lie outside of the checkpoint that is read"):
        convert_checkpoint(open_checkpoint(source), tmp_path / place)
    assert set(contents(source)) == set(before)


@pytest.mark.parametrize("name", ["config.json", "notes.txt"])
def test_a_folder_that_has_anything_else_is_refused(tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    text = f"convert: {out}: must be new or empty, or have a conversion that was stopped; it has {name}"
    with pytest.raises(CheckpointError, match=f"^{re.escape(text)}$"):
        convert_checkpoint(open_checkpoint(copy_of_source(tmp_path)), out)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    source = open_checkpoint(copy_of_source(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"^convert: .*file/out: cannot be written"):
        convert_checkpoint(source, tmp_path / "file" / "out")
    if os.path.exists("/proc/self/mounts"):
        with pytest.raises(CheckpointError, match=r"^convert: /proc/.*: cannot be written"):
            convert_checkpoint(source, "/proc/out")


def test_another_format_than_the_two_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint_format must be one of \('gptq_v2', 'gptq'\); got 'gptq_p'"):
        convert_checkpoint(open_checkpoint(copy_of_source(tmp_path)), tmp_path / "out", checkpoint_format="gptq_p")
