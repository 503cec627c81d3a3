"""`compile.packages`: graphs that a later process finds, and entries that are broken, old or of another model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from exllama_ops.compile import packages
from exllama_ops.compile.packages import Graph, PackageError

MODEL, VERSIONS, NOTES = "a model", {"torch": "1", "machine": "this one"}, {"layers": [0, 1]}
X, W = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]])


class Product(torch.nn.Module):
    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor]:
        return ((weight * x).sum(-1),)


def graphs() -> dict[str, Graph]:
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(Product(), (X, W), dynamic_shapes=({}, {0: tokens}), strict=False)
    return {"product": Graph(program, {"size_asserts": False}, False, "a product")}


class Told(list[str]):
    """The steps that were told."""

    def __call__(self, step: str, done: int | None = None, total: int | None = None, detail: str = "") -> None:
        self.append(step if done is None else f"{step} {done}/{total} {detail}".strip())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the entry."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXLLAMA_OPS_CACHE", str(folder))
        told = Told()
        assert packages.find(MODEL, VERSIONS, told) is None
        assert told == []
        entry = packages.make(MODEL, VERSIONS, graphs(), NOTES, told)
        assert told[0] == "compiling the graphs 0/1 a product"
        assert told[-1] == "compiling the graphs 1/1"
        assert entry.notes == NOTES
        check(entry.runs["product"])
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the cache folder."""
    copied = tmp_path / "cache"
    shutil.copytree(made, copied)
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(copied))
    return copied


def check(run: packages.Run) -> None:
    for weight in (W, W[:, [2, 0, 1]].repeat(3, 1)):
        (result,) = run([X, weight])
        assert result.tolist() == (weight @ X).tolist()


def entry_of(cache: Path) -> Path:
    (record,) = cache.rglob("record.json")
    return record.parent


def test_an_entry_is_found_with_its_notes_and_computes(cache: Path) -> None:
    told = Told()
    entry = packages.find(MODEL, VERSIONS, told)
    assert entry is not None
    assert entry.notes == NOTES
    check(entry.runs["product"])
    assert told == ["loading the compiled graphs"]


def test_nothing_is_left_beside_an_entry(cache: Path) -> None:
    assert sorted(path.name for path in entry_of(cache).iterdir()) == ["product.pt2", "record.json"]
    assert {path.name for path in entry_of(cache).parent.iterdir()} <= {entry_of(cache).name, ".lock"}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def move(folder: Path, model: str) -> None:
    """Let an entry of another model stand in the place of this one."""
    record = json.loads((folder / "record.json").read_text())
    record = packages._signed({**record, "model": model})
    (folder / "record.json").write_text(json.dumps(record))


BREAKS: dict[str, tuple[Any, str]] = {
    "a package that is cut": (lambda folder: cut(folder / "product.pt2"), "product.pt2 is damaged"),
    "a package that is gone": (lambda folder: (folder / "product.pt2").unlink(), "No such file"),
    "a record that is cut": (lambda folder: cut(folder / "record.json"), "cannot be used"),
    "no record": (lambda folder: (folder / "record.json").unlink(), "No such file"),
    "a record that is a list": (lambda folder: (folder / "record.json").write_text("[]"), "cannot be used"),
    "a record whose notes changed": (lambda folder: change(folder / "record.json", notes=[]), "record.json is damaged"),
    "a record of another model": (lambda folder: move(folder, "another"), "its record describes other graphs"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_entry_is_told_in_one_line_and_not_used(cache: Path, name: str) -> None:
    damage, reason = BREAKS[name]
    damage(entry_of(cache))
    told = Told()
    assert packages.find(MODEL, VERSIONS, told) is None
    assert len(told) == 1
    assert reason in told[0]
    assert told[0].endswith("they are compiled again")
    assert "\n" not in told[0]


def test_an_entry_of_other_versions_is_told_with_what_differs(cache: Path) -> None:
    told = Told()
    assert packages.find(MODEL, {**VERSIONS, "torch": "2"}, told) is None
    assert len(told) == 1
    assert "are of another version: torch 1, now 2; they are compiled again" in told[0]


def test_an_entry_of_another_model_is_no_entry(cache: Path) -> None:
    told = Told()
    assert packages.find("another model", VERSIONS, told) is None
    assert told == []


def fake_compilation(graphs: Any, folder: Path, notify: Any) -> None:
    for name in graphs:
        (folder / f"{name}.pt2").write_bytes(b"a package")


def test_a_broken_entry_is_replaced_and_old_ones_go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_compile", fake_compilation)
    monkeypatch.setattr(packages, "load", lambda path: path.read_bytes())
    first = entry_of(cache)
    cut(first / "product.pt2")
    assert packages.make(MODEL, VERSIONS, graphs(), [], Told()).runs == {"product": b"a package"}
    assert packages.find(MODEL, VERSIONS, Told()) is not None
    (first.parent / f".{first.name}-killed").mkdir()  # what a process that was killed has left
    for version in "23456":
        packages.make(MODEL, {"torch": version}, graphs(), [], Told())
    assert len([path for path in first.parent.iterdir() if path.is_dir()]) == 4
    assert packages.find(MODEL, {"torch": "6"}, Told()) is not None
    assert packages.find(MODEL, VERSIONS, Told()) is None


def test_a_process_that_waited_takes_what_the_other_has_compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*args: Any) -> None:
        raise AssertionError("it compiled")

    monkeypatch.setattr(packages, "_compile", compiled)
    told = Told()
    lock = FileLock(entry_of(cache).parent / ".lock")
    with ThreadPoolExecutor() as pool:
        with lock:
            making = pool.submit(packages.make, MODEL, VERSIONS, graphs(), NOTES, told)
            while not told:
                time.sleep(0.01)
            assert "waiting for another process" in told[0]
        check(making.result().runs["product"])


def test_where_nothing_can_be_kept_the_graphs_serve_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "_compile", fake_compilation)
    monkeypatch.setattr(packages, "load", lambda path: path.read_bytes())
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(blocked))
    with pytest.warns(UserWarning, match=r"compiled graphs are not kept: .*EXLLAMA_OPS_CACHE"):
        entry = packages.make(MODEL, VERSIONS, graphs(), [], Told())
    assert entry.runs == {"product": b"a package"}


def test_a_file_of_the_present_folder_is_no_module_of_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit('a file of the user')")
    (tmp_path / "tasks").write_text("[]")
    command = [sys.executable, "-c", packages._WORKER, str(tmp_path / "tasks"), "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_what_the_compiler_says_is_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(tmp_path))
    broken = {"product": graphs()["product"]._replace(options={"no such option": 1})}
    with pytest.raises(PackageError, match="no such option"):
        packages.make(MODEL, VERSIONS, broken, [], Told())
    assert not list(tmp_path.rglob("*.pt2"))


@pytest.mark.parametrize(
    ("said", "variable", "runs"),
    [
        ("unrecognized option -mamx", None, ["1", None]),
        ("InvalidCxxCompiler: none", None, ["1"]),
        ("unrecognized option -mamx", "0", [None]),
    ],
)
def test_a_compiler_that_knows_less_than_the_cpu_is_asked_what_it_can(
    said: str, variable: str | None, runs: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str | None] = []

    def run(commands: Any, scratch: Any, *, look: Any, environment: dict[str, str]) -> None:
        tried.append(environment.get("TORCHINDUCTOR_VEC_ISA_OK"))
        raise packages.CompileError(said)

    monkeypatch.setattr(packages, "run_commands", run)
    monkeypatch.setenv("EXLLAMA_OPS_CACHE", str(tmp_path))
    if variable:
        monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", variable)
    told = Told()
    with pytest.raises(PackageError, match=said):
        packages.make(MODEL, VERSIONS, graphs(), NOTES, told)
    assert tried == runs
    assert any("what the compiler can do" in step for step in told) == (len(runs) == 2)


def test_versions_name_all_that_machine_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = packages.versions()
    assert set(needed) == {"exllama_ops", "torch", "python", "machine", "settings"}
    assert torch.__version__ in needed["torch"]
    monkeypatch.setenv("TORCHINDUCTOR_CPP_MARCH", "x86-64-v2")
    assert packages.versions()["settings"] != needed["settings"]
    monkeypatch.setattr(packages, "files_digest", lambda paths: "other sources")
    assert packages.versions()["exllama_ops"] != needed["exllama_ops"]
