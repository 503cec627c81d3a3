"""`exllama-ops convert`: the result on stdout, everything else on stderr, and one line for an error."""

from __future__ import annotations

import json

import pytest

from checkpoint.builder import DATA
from exllama_ops.cli import main

SOURCE = DATA / "writers" / "autoawq-gemm"


def test_the_result_is_one_line_and_all_of_stdout(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(SOURCE), str(out)]) == 0
    written = capsys.readouterr()
    assert written.out == f"{out}: gptq_v2, 6 quantized modules and 7 other tensors in 0.0 MB\n"
    assert "converting awq to gptq_v2" in written.err


def test_json_says_what_was_written(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(SOURCE), str(out), "--format", "gptq", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "source": str(SOURCE),
        "path": str(out),
        "checkpoint_format": "gptq",
        "modules": 6,
        "tensors": 7,
        "files": 1,
        "files_kept": 0,
        "num_bytes": 34208,
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([str(SOURCE), str(SOURCE)], "must be new or empty, or have a conversion that was stopped"),
        ([str(SOURCE), str(SOURCE / "inner")], "must lie outside of the checkpoint that is read"),
        (["owner/name", str(SOURCE)], "must be new or empty"),
        (["/no/such/folder", "out"], "must be an existing directory or a hub id"),
        ([str(DATA), "out"], "no checkpoint format takes it"),
        ([str(SOURCE), "out", "--revision", "main"], "revision is for hub ids"),
        (["none.gguf", "out"], "none.gguf: must be a GGUF file; there is none"),
        (["none.gguf", "out", "--revision", "main"], "a GGUF file must be given without --revision"),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    line = written.err.splitlines()[-1]
    assert line.startswith("exllama-ops: error: ")
    assert text in line
    assert "Traceback" not in written.err
