"""Whatever a user can cause is one line on stderr, exit code 2 and nothing on stdout: one table for all commands."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exllama_ops.cli import main

pytest.importorskip("transformers", reason='needs the extra "hf"')

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 9\n"
QUICK = ("--no-compile", "--max-new-tokens", "1")

Change = Callable[[Path], None]


def text(name: str, content: str) -> Change:
    """Another text in a file, which may be new."""

    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).write_text(content)

    return change


def gone(*names: str) -> Change:
    def change(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return change


def edited(name: str, **fields: Any) -> Change:
    """Other fields in a JSON file; None takes one away."""

    def change(path: Path) -> None:
        values = json.loads((path / name).read_text()) | fields
        text(name, json.dumps({key: value for key, value in values.items() if value is not None}))(path)

    return change


def all_of(*changes: Change) -> Change:
    def change(path: Path) -> None:
        for one in changes:
            one(path)

    return change


def renamed(name: str, new: str) -> Change:
    return lambda path: (path / name).rename(path / new) and None


def as_is(path: Path) -> None:
    pass


MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_OF_TWO = text(INDEX, '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}')
NO_CONFIG = all_of(edited("config.json", quantization_config=None), gone("quantize_config.json"))
ANY = ("run", "chat", "inspect")
GENERATES = ("run", "chat")

# What happened to the checkpoint, the commands, their arguments after it, and a part of the line.
CASES: dict[str, tuple[Change, tuple[str, ...], tuple[str, ...], str]] = {
    "pointer of LFS: weights": (text(MODEL, POINTER), ANY, (), "got a pointer of Git LFS: run `git lfs pull`"),
    "pointer of LFS: config": (text("config.json", POINTER), ANY, (), "got a pointer of Git LFS"),
    "pointer of LFS: tokenizer": (
        text("tokenizer.json", POINTER),
        GENERATES,
        (),
        "tokenizer.json: must be the file its",
    ),
    "no quantization config": (NO_CONFIG, ANY, (), "the shapes allow bits=4, group_size=32: pass --bits 4 --group"),
    "half a quantization config": (NO_CONFIG, ANY, ("--bits", "4"), "field group_size is missing; the shapes allow"),
    "config is no JSON": (text("config.json", "{"), ANY, (), "config.json: must be JSON"),
    "weights are no safetensors": (text(MODEL, "no"), ANY, (), "must be a complete safetensors file"),
    "missing shard": (all_of(gone(MODEL), INDEX_OF_TWO), ANY, (), "model-00001-of-00002.safetensors: no such file"),
    "pickles alone": (renamed(MODEL, "pytorch_model.bin"), ANY, (), "only pickle files, which can run code"),
    "several candidates": (
        all_of(renamed(MODEL, "a.safetensors"), text("b.safetensors", "")),
        *(ANY, (), "got a.safetensors, b.safetensors: name the one that is meant"),
    ),
    "unknown family": (edited("config.json", model_type="evil"), ("run", "inspect"), QUICK[:0], "evil"),
    "revision of a directory": (as_is, ANY, ("--revision", "main"), "revision is for hub ids"),
    "bits": (as_is, ANY, ("--bits", "5"), "bits must be one of (2, 3, 4, 8); got 5"),
    "group size": (as_is, ANY, ("--group-size", "0"), "group_size must be at least 1"),
    "format": (as_is, ANY, ("--checkpoint-format", "marlin"), "checkpoint_format must be one of"),
    "bits that contradict the shapes": (as_is, ANY, ("--bits", "8"), "must have shape"),
    "tokenizer gone": (gone("tokenizer.json", "tokenizer_config.json"), ("run", "chat", "inspect"), (), "tokenizer"),
    "tokenizer broken": (text("tokenizer.json", "{}"), GENERATES, (), "must hold a tokenizer"),
    "template that raises": (
        text("chat_template.jinja", "{{ raise_exception('no') }}"),
        *(GENERATES, (), "the chat template refuses messages of user: no"),
    ),
    "template that does not parse": (
        text("chat_template.jinja", "{% for %}"),
        GENERATES,
        (),
        "the chat template refuses",
    ),
    "template of a wrong type": (edited("tokenizer_config.json", chat_template=5), GENERATES, (), "template"),
    "no template": (as_is, ("chat",), (), "has no chat template"),
    "generation config is no JSON": (text("generation_config.json", "{"), ("run",), QUICK, "generation_config.json"),
    "generation config is a list": (text("generation_config.json", "[]"), ("run",), QUICK, "must hold a JSON object"),
    "generation config of wrong types": (
        text("generation_config.json", '{"pad_token_id": "z"}'),
        *(("run",), QUICK, "generation_config.json"),
    ),
    "stop tokens of wrong types": (
        text("generation_config.json", '{"eos_token_id": [["a"]]}'),
        *(("run",), QUICK, "eos_token_id must be the number of a token, or a list of them; got [['a']]"),
    ),
    "prompt too long": (as_is, ("run",), ("--prompt", "a" * 200, "--no-compile"), "128 positions; got 201 tokens"),
    "device": (as_is, GENERATES, ("--device", "no-such-device"), "--device no-such-device: must be a device"),
    "head bits": (as_is, ("run",), ("--lm-head-bits", "5"), "lm_head_bits must be None or one of"),
    "seed alone": (as_is, ("run",), ("--seed", "1"), "--seed: is for tokens that are drawn"),
    "stdin twice": (as_is, ("run",), ("--prompt", "-", "--prompt", "-"), "stdin can be read once"),
    "stdin is no text": (as_is, ("run",), ("--prompt", "-"), "can't decode byte"),
}


def refused(capsys: pytest.CaptureFixture[str], command: str, *arguments: str | Path) -> str:
    """The one line of a command that is refused."""
    assert main([command, *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" or command == "inspect"
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("exllama-ops: error: ")]
    assert lines == captured.err.splitlines()[-1:]
    return lines[0]


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_with_a_checkpoint_or_a_flag_is_one_line(
    case: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, commands, arguments, part = CASES[case]
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    change(tmp_path)
    for command in commands:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
        assert part in refused(capsys, command, tmp_path, *arguments)


@pytest.mark.parametrize("command", ANY)
def test_what_is_no_checkpoint_at_all_is_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "README.md").write_text("no model")
    (tmp_path / "empty").mkdir()
    assert "found neither" in refused(capsys, command, tmp_path / "empty")
    assert "must be a directory, a hub id" in refused(capsys, command, tmp_path / "README.md")
    assert "it is neither" in refused(capsys, command, tmp_path / "nowhere")
    assert "got an empty one" in refused(capsys, command, "")
    assert "could not be downloaded from the hub" in refused(capsys, command, "nobody/nothing")
    assert "MODEL: must be given with" in refused(capsys, command, "--bits", "4")

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", denied)  # permission bits do not hold for root
    assert "cannot be read: Permission denied" in refused(capsys, command, tmp_path / "empty")


def test_nothing_of_a_repository_runs_unless_it_is_trusted(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in checkpoint.iterdir():
        (model / file.name).symlink_to(file)
    evidence = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(evidence)!r}, 'w')\n")
    edited("config.json", model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(model)
    edited("tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["evil.T", None]})(model)
    for command in ("run", "chat", "inspect"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
        line = refused(capsys, command, model)
        assert "needs code of its own repository (auto_map of " in line
        assert "--trust-remote-code" in line
    assert sys.stdin.readline() == "y\n"  # nobody asked
    assert not evidence.exists()
    refused(capsys, "run", model, "--trust-remote-code")
    assert evidence.exists()
