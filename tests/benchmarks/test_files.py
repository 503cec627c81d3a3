"""Each CPU has a folder of results, named after what the machine says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import files


@pytest.mark.parametrize(
    ("cpu", "flags", "title", "folder"),
    [
        ("AMD EPYC (cpu family 25, model 17, stepping 1)", ["avx512f"], "AMD Zen 4 AVX-512", "amd-zen-4-avx-512"),
        (
            "Intel(R) Xeon(R) Processor (cpu family 6, model 167, stepping 1)",
            ["avx2", "avx512f", "amx_int8"],
            "Intel Xeon 6/167 AMX",
            "intel-xeon-6-167-amx",
        ),
        (
            "Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz (cpu family 6, model 158, stepping 10)",
            ["avx2"],
            "Intel Core i7-8700 6/158 AVX2",
            "intel-core-i7-8700-6-158-avx2",
        ),
        ("aarch64 (CPU implementer 0x41, CPU part 0xd40)", ["i8mm"], "Arm Neoverse V1 i8mm", "arm-neoverse-v1-i8mm"),
        ("aarch64 (CPU implementer 0x61, CPU part 0x022)", ["asimd"], "Arm 0x61/0x022 NEON", "arm-0x61-0x022-neon"),
        ("unknown ()", [], "unknown", "unknown"),
    ],
)  # fmt: skip
def test_a_cpu_has_a_title_and_a_folder(cpu: str, flags: list[str], title: str, folder: str) -> None:
    machine = {"cpu": cpu, "cpu_flags": flags}
    assert files.title(machine) == title
    assert files.folder_of(machine) == files.RESULTS / folder


def test_a_gpu_has_no_folder_since_its_files_have_its_name() -> None:
    assert files.folder_of({"gpu": "a GPU", "cpu": "AMD EPYC ()"}) == files.RESULTS


def test_every_result_lies_in_the_folder_of_its_machine() -> None:
    for path in files.RESULTS.rglob("*.json"):
        machine = json.loads(path.read_text()).get("machine")
        assert path.parent == (files.RESULTS if machine is None else files.folder_of(machine)), path


def test_a_result_goes_to_its_machine_or_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    result = {"machine": {"cpu": "A B (cpu family 1, model 2)", "cpu_flags": []}}
    assert files.write_result(None, "name", result, "table") == tmp_path / "results" / "a-b-1-2"
    assert files.write_result(tmp_path / "other", "name", result, "table") == tmp_path / "other"
    for folder in (tmp_path / "results" / "a-b-1-2", tmp_path / "other"):
        assert json.loads((folder / "name.json").read_text()) == result
        assert (folder / "name.md").read_text() == "table"
