"""The build backend: setuptools, and a wheel that carries the native libraries that can be compiled.

pip builds in an isolated environment. A build that asks for torch there gets gigabytes of one that need not be the
user's. A library needs only headers and a file to link with. They lie in the environment that pip installs into, where
the isolated build sees them on disk. So the build requires setuptools only.

The CPU's library needs a C++ compiler, and so does that of the schemas, for programs without Python. CUDA's needs nvcc
and a torch with CUDA, without which nobody calls it.

A wheel always carries the sources (``exllama_ops/_csrc``). The package compiles a library from them on first use if
the wheel has none. Without compilers or torch, or where compiling fails, the wheel is pure Python. An editable install
has no library of its own either: that of the cache is keyed by the sources, and follows every edit.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
import os
import site
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import build_meta as _setuptools
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_ROOT = Path(__file__).parents[1]
_CSRC = _ROOT / "csrc"


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Build setuptools' wheel, add the sources and, if it can be compiled, the library. Returns the file's name."""
    pure = Path(wheel_directory) / _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)
    added = {f"exllama_ops/_csrc/{path.relative_to(_CSRC).as_posix()}": path for path in _files(_CSRC)}
    with tempfile.TemporaryDirectory() as scratch:
        libraries = {f"exllama_ops/_native/{name}": path for name, path in _compile(Path(scratch)).items()}
        return _rewritten(pure, added | libraries, native=bool(libraries)).name


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _compile(scratch: Path) -> dict[str, Path]:
    """The libraries that can be compiled, in a folder each, and their records: files by their names in _native."""
    compiling = _package_module("exllama_ops/backends/native/compile.py")
    torch_directory = next((path for path in _torch_directories() if compiling.has_stable_headers(path)), None)
    made = {}
    for recipe in (compiling.CPU, compiling.SCHEMA, compiling.CUDA):
        compiler = compiling.find_compiler(recipe)
        if sys.platform != "linux":
            reason = f"there is none for {sys.platform}"
        elif torch_directory is None:
            reason = "no torch >= 2.10 in the environment that the package is built for"
        elif recipe is compiling.CUDA and not (torch_directory / "lib" / "libtorch_cuda.so").is_file():
            reason = f"the torch in {torch_directory} has no CUDA"
        elif compiler is None:
            reason = compiling.no_compiler(recipe)
        else:
            folder = scratch / recipe.device
            folder.mkdir()
            try:
                _say(recipe, f"compiling it with {compiler} for {torch_directory}")
                compiling.compile_library(
                    recipe, _CSRC, torch_directory, compiler, folder, functools.partial(_tell, recipe)
                )
                made |= {f"{recipe.device}/{name}": folder / name for name in (recipe.library, compiling.RECORD)}
                continue
            except compiling.CompileError as error:
                reason = f"the compiler failed:\n{error}"
        _say(recipe, f"the wheel is built without it: {reason}")
    return made


def _torch_directories() -> Iterator[Path]:
    """Where torch may lie in the target environment; pip's isolation leaves these paths as they are."""
    paths = sysconfig.get_paths()
    for folder in dict.fromkeys([paths["purelib"], paths["platlib"], *site.getsitepackages(), *sys.path]):
        yield Path(folder) / "torch"


def _package_module(path: str) -> ModuleType:
    """A module of the package by its file: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, _ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _rewritten(wheel: Path, added: dict[str, Path], *, native: bool) -> Path:
    """A wheel with more files in it, and with the platform in its tag if it is native; it replaces the old one."""
    name, version, *_ = wheel.stem.split("-")
    tag = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}" if native else "py3-none-any"
    result = wheel.with_name(f"{name}-{version}-{tag}.whl")
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel) as old:
        contents = {entry: old.read(entry) for entry in old.namelist()}
    if native:
        lines = contents[f"{information}/WHEEL"].decode().splitlines()
        kept = [line for line in lines if line and not line.startswith(("Root-Is-Purelib:", "Tag:"))]
        contents[f"{information}/WHEEL"] = "\n".join([*kept, "Root-Is-Purelib: false", f"Tag: {tag}", ""]).encode()
    contents |= {entry: path.read_bytes() for entry, path in added.items()}
    record = f"{information}/RECORD"
    contents.pop(record)
    lines = [f"{entry},{_hash(data)},{len(data)}" for entry, data in contents.items()]
    contents[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    wheel.unlink()
    with zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as new:
        for entry, data in contents.items():
            new.writestr(_entry(entry), data)
    return result


def _entry(name: str) -> zipfile.ZipInfo:
    """A file of a wheel: readable, and of a fixed date, so that the same sources give the same wheel."""
    information = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    information.external_attr = 0o100644 << 16
    information.compress_type = zipfile.ZIP_DEFLATED
    return information


def _hash(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _tell(recipe: Any, done: int, total: int, file: str) -> None:
    if done:
        _say(recipe, f"[{done}/{total}] {file}")


def _say(recipe: Any, line: str) -> None:
    sys.stderr.write(f"native {recipe.device.upper()} library: {line}{os.linesep}")
    sys.stderr.flush()
