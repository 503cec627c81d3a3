"""A library that was built elsewhere and named by a variable: taken as it is, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from exllama_ops import backends
from exllama_ops.backends.cpu.library import CpuLibrary
from exllama_ops.backends.native import NativeBackend, cache
from exllama_ops.backends.native import compile as compiling
from exllama_ops.backends.native.compile import CPU, CUDA
from exllama_ops.cli import info

# The CPU's library, as if its recipe had a variable; that of CUDA needs nvcc.
RECIPE = CPU._replace(given="GIVEN_LIBRARY")


def record_sources(folder: Path, key: str) -> None:
    record = json.loads((folder / compiling.RECORD).read_text())
    (folder / compiling.RECORD).write_text(json.dumps({**record, "sources": key}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    backends.cpu.BACKEND.build()
    csrc = cache.csrc()
    assert csrc is not None
    if backends.cpu.BACKEND.library is None:
        pytest.skip(f"needs the native CPU library: {backends.cpu.BACKEND.failure[0].splitlines()[0]}")
    copied = shutil.copytree(backends.cpu.BACKEND.library.path.parent, tmp_path / "carried")
    record_sources(copied, compiling.source_key(CPU, csrc))
    monkeypatch.setenv("GIVEN_LIBRARY", str(copied))
    monkeypatch.setattr(cache, "find", lambda *args: pytest.fail("the cache was looked at"))
    return copied


def found() -> NativeBackend[CpuLibrary]:
    backend = NativeBackend(RECIPE, CpuLibrary)
    backend.find()
    return backend


def test_a_given_library_serves_and_no_other_is_looked_for(folder: Path) -> None:
    backend = found()
    assert backend.failure == []
    assert backend.library is not None
    assert backend.library.path == folder / CPU.library
    assert backend.detail("CPU") == f"given library {folder / CPU.library}"
    assert info._library(backend)["origin"] == "given"


def test_a_damaged_one_is_refused(folder: Path) -> None:
    library = folder / CPU.library
    library.write_bytes(library.read_bytes()[:-1])
    assert found().failure == [
        f"GIVEN_LIBRARY must name a folder with a whole {CPU.library} and its record; got '{folder}'"
    ]
    assert found().library is None


def test_one_of_other_sources_is_refused(folder: Path) -> None:
    record_sources(folder, "0" * 16)
    assert found().failure == [
        f"GIVEN_LIBRARY='{folder}' has a library that was built from other sources; build it anew"
    ]


def test_the_recipe_of_cuda_has_the_variable_of_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_LIBRARY", "nowhere")
    with pytest.raises(cache.BuildError, match="EXLLAMA_OPS_CUDA_LIBRARY must name a folder with a whole libexllama_c"):
        cache.given(CUDA)
