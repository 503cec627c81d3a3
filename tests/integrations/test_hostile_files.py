"""Files that transformers would wait for, or fail on in its own ways: `load_model`, `exllama-ops run`, the demo."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from exllama_ops.checkpoint import CheckpointError
from exllama_ops.cli import main

transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')

from exllama_ops.integrations import demo  # noqa: E402
from exllama_ops.integrations.transformers import load_model  # noqa: E402 (it needs transformers)

SOURCE = Path(__file__).parents[1] / "data" / "tiny-w4g64-lmhead"
CONFIG = json.loads((SOURCE / "config.json").read_text())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for file in SOURCE.glob("*.*"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_a_byte_order_mark_is_read_over(checkpoint: Path) -> None:
    for name in ("config.json", "quantize_config.json", "generation_config.json"):
        (checkpoint / name).write_bytes(b"\xef\xbb\xbf" + (checkpoint / name).read_bytes())
    model = load_model(checkpoint)
    assert model.config.name_or_path == str(checkpoint)
    assert model.config.hidden_size == CONFIG["hidden_size"]
    assert model.generation_config.bos_token_id == CONFIG["bos_token_id"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be a regular file; got a FIFO"),
        ("{" * 3, "must be JSON in UTF-8"),
        ('{"x":' * 200_000 + "1" + "}" * 200_000, "must be JSON in UTF-8: maximum recursion depth"),
        ("[]", "must hold a JSON object; got list"),
        ('{"max_new_tokens": {"a": "b"}, "do_sample": [], "num_beams": "x"}', "must describe how to generate"),
    ],
    ids=range(5),
)
def test_a_generation_config_that_is_none_is_refused(checkpoint: Path, content: str | None, message: str) -> None:
    file = checkpoint / "generation_config.json"
    file.unlink()
    if content is None:
        os.mkfifo(file)
        os.open(file, os.O_RDWR)  # a writer, so that no reader waits
    else:
        file.write_text(content)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {message}"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"hidden_act": "nothing"},
        {"model_type": ["llama"]},
        {"architectures": 5, "rope_parameters": 7},
        {"vocab_size": -1},
        {"model_type": "unknown", "auto_map": {"AutoConfig": "code.Config"}},
        {"model_type": "t5", "auto_map": {"AutoModelForCausalLM": "code.Model"}},
        {"text_config": {"hidden_size": None}, "model_type": "llava"},
    ],
    ids=repr,
)
def test_a_config_that_transformers_fails_on_is_refused_and_nobody_asked(
    checkpoint: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(checkpoint)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "additional_chat_templates/a.jinja"])
def test_a_fifo_among_the_tokenizers_files_is_one_line(
    checkpoint: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    os.mkfifo(checkpoint / name)
    os.open(checkpoint / name, os.O_RDWR)
    assert main(["run", str(checkpoint), "--no-compile"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"exllama-ops: error: {checkpoint / name}: must be a regular file; got a FIFO"


def test_a_demo_wheel_without_permission_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Simulated: permission bits do not hold for root."""

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / demo.WHEEL).touch()
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(tmp_path))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert main(["run", "--no-compile"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"exllama-ops: error: {tmp_path / demo.WHEEL}: cannot be read: ")


@pytest.mark.parametrize(
    ("config", "tokenizer"),
    [
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {"model": {"type": "BPE", "vocab": 5}}),
        ({"tokenizer_class": 5}, {}),
    ],
    ids=["tokenizer", "config"],
)
def test_a_tokenizer_that_transformers_fails_on_is_one_line(
    checkpoint: Path, config: dict[str, object], tokenizer: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["run", str(checkpoint), "--no-compile"]) == 2
    assert "must hold a tokenizer" in capsys.readouterr().err.splitlines()[-1]
