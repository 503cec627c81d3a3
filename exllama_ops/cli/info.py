"""`exllama-ops info`: what is installed, built and in use, and which backend serves which op and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import exllama_ops
from exllama_ops import backends
from exllama_ops.backends import cpu, cuda
from exllama_ops.backends.cpu.library import CpuLibrary
from exllama_ops.backends.native import NativeBackend, cache
from exllama_ops.cache import cache_folder
from exllama_ops.cli.output import CliError, emit

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "peft")
_VARIABLES = ("EXLLAMA_OPS_", "OMP_", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "HF_HUB_OFFLINE")
_ARCH = re.compile(r"\b(?:sm|compute)_\d+")


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "info",
        help="say what is installed and built, and which kernels serve which op",
        description="Say which versions are installed, which native libraries there are, what is in use, and for each "
        "device which backend serves which op and why others do not. Nothing is built.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the text")
    parser.set_defaults(command=info)


def info(args: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
        CliError: the cache folder cannot be found.
    """
    report = backends.report()
    try:
        folder = cache_folder()
    except OSError as error:
        raise CliError(f"info: {error}; set EXLLAMA_OPS_CACHE") from error
    result = {
        "versions": {"exllama_ops": exllama_ops.__version__, "python": platform.python_version(), **_versions()},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "libraries": {backend.name: _library(backend) for backend in (cpu.BACKEND, cuda.BACKEND)},
        "cpu_matmul_precision": exllama_ops.get_cpu_matmul_precision(),
        "batch_invariant": exllama_ops.is_batch_invariant(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
        "cache": {"folder": str(folder), "bytes": _size(folder)},
        "backends": [
            {"device": choice.dispatch_key, "op": choice.op, "backend": choice.backend.name, "why": choice.why}
            for choice in report
        ],
    }
    if args.json:
        emit(json.dumps(result, ensure_ascii=False) + "\n")
        return
    for name, value in _facts(result).items():
        emit(f"{name + ':':17}{value}\n")
    emit(f"\n{report}\n")


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _devices() -> list[str]:
    """The GPUs that this torch can use, by name."""
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return []


def _library(backend: NativeBackend[Any]) -> dict[str, Any]:
    """A native library: where it is and how it was made, and why it is not used or not there."""
    backend.find()
    path, reason = _path(backend), "; ".join(backend.failure)
    if path is None:
        return {"path": None, "reason": reason or "not built yet; the first call does it, or `exllama-ops build`"}
    built = cache.read(backend.recipe, path.parent)
    found: dict[str, Any] = {
        "path": str(path),
        "origin": cache.origin(backend.recipe, path),
        "reason": reason,
        "compiler": None if built is None else built.compiler,
    }
    if isinstance(backend.library, CpuLibrary):
        found |= {"isas": backend.library.isas(), "isa_in_use": backend.library.isa_in_use()}
    if backend is cuda.BACKEND:
        found["archs"] = sorted(set(_ARCH.findall(" ".join(built.flags if built else ()))))
    return found


def _path(backend: NativeBackend[Any]) -> Path | None:
    """The file of a library, which may be there although no device asks for it."""
    if backend.library is not None:
        path: Path = backend.library.path
        return path
    try:
        return (
            cache.given(backend.recipe) or cache.packaged(backend.recipe) or cache.find(backend.recipe, backend.codes())
        )
    except (OSError, cache.BuildError):
        return None  # a cache that cannot be read is as good as an empty one, and so is a library that will not do


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; what vanishes meanwhile or may not be read does not count."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(Path(parent) / name).st_size
            except OSError:
                continue
    return total


def _facts(result: dict[str, Any]) -> dict[str, str]:
    """The result for people, but for the table of backends."""
    return {
        "versions": ", ".join(f"{name} {version or 'not installed'}" for name, version in result["versions"].items()),
        "system": f"{result['system']}, {result['cpus']} CPUs, {result['threads']} threads of torch",
        "GPUs": ", ".join(result["devices"]) or "none that this torch can use",
        **{f"{name.upper()} library": _told(library) for name, library in result["libraries"].items()},
        "precision": f"{result['cpu_matmul_precision']} on a CPU",
        "batch invariant": "yes" if result["batch_invariant"] else "no",
        "variables": ", ".join(f"{name}={value}" for name, value in result["variables"].items()) or "none set",
        "cache": f"{result['cache']['folder']}, {result['cache']['bytes'] / 1e6:.1f} MB",
    }


def _told(library: dict[str, Any]) -> str:
    if library["path"] is None:
        return f"none: {library['reason']}"
    parts = [f"{library['origin']}, {library['path']}", f"by {library['compiler'] or 'an unknown compiler'}"]
    if library["reason"]:
        parts.append(f"not used: {library['reason']}")
    if "isas" in library:
        isas = [
            name + (" (in use)" if name == library["isa_in_use"] else "" if has else " (not on this CPU)")
            for name, has in library["isas"].items()
        ]
        parts.append(f"ISAs {', '.join(isas)}")
    if "archs" in library:
        parts.append(f"built for {', '.join(library['archs']) or 'what is not recorded'}")
    return "; ".join(parts)
