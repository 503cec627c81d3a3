"""`exllama-ops info`: what is there, and why what is not there is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import exllama_ops
from exllama_ops import backends
from exllama_ops.backends import cpu
from exllama_ops.cli import main


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["info", "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_it_says_versions_settings_and_who_serves_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "secret")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(bytes(7))
    before = exllama_ops.get_cpu_matmul_precision()
    exllama_ops.set_cpu_matmul_precision("medium")
    try:
        result = told(capsys)
    finally:
        exllama_ops.set_cpu_matmul_precision(before)
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"]["exllama_ops"] == exllama_ops.__version__
    assert (result["threads"], result["cpu_matmul_precision"]) == (torch.get_num_threads(), "medium")
    assert result["cache"] == {"folder": str(tmp_path), "bytes": 7}
    assert result["variables"]["EXLLAMA_OPS_CACHE"] == str(tmp_path)
    assert "secret" not in json.dumps(result)
    assert [(entry["device"], entry["op"], entry["backend"]) for entry in result["backends"]] == [
        (choice.dispatch_key, choice.op, choice.backend.name) for choice in backends.report()
    ]


def test_people_get_a_line_for_each_library_and_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for begins in ("versions:", "system:", "CPU library:", "CUDA library:", "precision:", "cache:"):
        assert sum(line.startswith(begins) for line in out.splitlines()) == 1
    assert str(backends.report()) in out


def test_a_library_that_is_not_there_is_told_with_the_reason_and_none_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(tmp_path / "nothing"))
    monkeypatch.setattr(cpu.BACKEND, "library", None)
    monkeypatch.setattr("exllama_ops.backends.native.cache.packaged", lambda recipe: None)
    assert told(capsys)["libraries"]["cpu"] == {
        "path": None,
        "reason": "not built yet; the first call does it, or `exllama-ops build`",
    }
    monkeypatch.setattr(cpu.BACKEND, "failure", ["there is no compiler"])
    assert told(capsys)["libraries"]["cpu"]["reason"] == "there is no compiler"
    assert not (tmp_path / "nothing").exists()
