"""`exllama-ops serve`: transformers' own server, which finds this library's layers registered."""

from __future__ import annotations

import pytest

from exllama_ops.cli import main

pytest.importorskip("transformers", reason='needs the extra "hf"')
typer = pytest.importorskip("typer", reason="transformers' command line needs it")
serving = pytest.importorskip("transformers.cli.serve", reason="needs transformers' command line")

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING  # noqa: E402 (it needs transformers)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, int, str]]:
    """The arguments that transformers' server was started with, and whose layers it would have loaded then."""
    seen: list[tuple[str | None, int, str]] = []

    def Serve(force_model: str | None = typer.Argument(None), port: int = 8000) -> None:
        seen.append((force_model, port, AUTO_QUANTIZER_MAPPING["gptq"].__module__.partition(".")[0]))

    monkeypatch.setattr(serving, "Serve", Serve)
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    return seen


def test_it_registers_first_and_passes_every_argument_on(served: list[tuple[str | None, int, str]]) -> None:
    before = AUTO_QUANTIZER_MAPPING["gptq"]
    assert main(["serve", "--port", "8001", "a/model"]) == 0
    assert main(["serve", "a/model"]) == 0
    assert served == [("a/model", 8001, "exllama_ops"), ("a/model", 8000, "exllama_ops")]
    assert AUTO_QUANTIZER_MAPPING["gptq"] is before


def test_what_is_wrong_with_its_arguments_is_one_line(
    served: list[tuple[str | None, int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, text in ((["--nope"], "No such option"), (["--port", "x"], "Invalid value for '--port'")):
        assert main(["serve", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith(f"exllama-ops: error: serve: {text}")
    assert served == []


def test_without_its_packages_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", "a/model"]) == 2
    said = "exllama-ops: error: serve: needs fastapi, uvicorn and openai: pip install 'transformers[serving]'\n"
    assert capsys.readouterr().err == said
