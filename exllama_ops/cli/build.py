"""`exllama-ops build`: build a native library before it is needed, and say what it is."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from exllama_ops.backends.cpu.library import CpuLibrary
from exllama_ops.backends.cuda import BACKEND as CUDA_BACKEND
from exllama_ops.backends.cuda.library import CudaLibrary
from exllama_ops.backends.native import LoadError, cache
from exllama_ops.backends.native.compile import ALL, CPU, CUDA, SCHEMA, Recipe, codes_for
from exllama_ops.cli.output import CliError, emit
from exllama_ops.progress import Screen


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "build",
        help="build the native CPU or CUDA kernels into the cache",
        description="Build the native CPU kernels (with --cuda: the CUDA kernels, for which nvcc is needed and no GPU) "
        "into the cache, unless they are built or were installed with the package. Without this command they are built "
        "when they are first called. The schemas of the ops, which a program without Python loads, come with them.",
    )
    parser.add_argument("--cuda", action="store_true", help="build the CUDA kernels, not those of the CPU")
    parser.add_argument(
        "--arch",
        type=_codes,
        metavar="ARCHS",
        help="with --cuda: compute capabilities, as 8.0,9.0, or all; without it those of this machine's GPUs, or all "
        "if it has none",
    )
    parser.add_argument("--force", action="store_true", help="build into the cache even if there is a library")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the text")
    parser.set_defaults(command=build)


def _codes(text: str) -> tuple[str, ...]:
    """The device code that --arch asks for."""
    if text == "all":
        return ALL
    try:
        pairs = [tuple(map(int, capability.split("."))) for capability in text.split(",")]
        return codes_for(CUDA, [(major, minor) for major, minor in pairs])
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be all, or compute capabilities as 8.0,9.0; got {text!r}") from None


def build(args: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
        CliError: whatever a user can cause.
    """
    if args.arch and not args.cuda:
        raise CliError("build: --arch is for --cuda")
    try:
        if args.cuda:
            result = _find_or_build(CUDA, args.arch or CUDA_BACKEND.codes(), force=args.force)
        else:
            result = _find_or_build(CPU, (), force=args.force)
        result |= _cuda_details(result) if args.cuda else _cpu_details(result)
    except (cache.BuildError, LoadError) as error:
        raise CliError(f"build: {error}") from error
    result["schema_library"], reason = _schema_library(force=args.force)
    if args.json:
        emit(json.dumps(result, ensure_ascii=False) + "\n")
        return
    lines = {
        "library": f"{result['library']} ({result['origin']})",
        "compiler": result["compiler"],
        "flags": " ".join(result["flags"]),
        "schemas": result["schema_library"] or f"none: {reason}",
    }
    if not args.cuda:
        lines["ISAs"] = ", ".join(
            name + (" (in use)" if name == result["isa_in_use"] else "" if has else " (not on this CPU)")
            for name, has in result["isas"].items()
        )
    for name, value in lines.items():
        emit(f"{name + ':':10}{value}\n")


def _schema_library(*, force: bool) -> tuple[str | None, str]:
    """Its file, or None and why there is none: a packaged library is good without it."""
    try:
        return _find_or_build(SCHEMA, (), force=force)["library"], ""
    except cache.BuildError as error:
        return None, str(error)


def _cpu_details(result: dict[str, Any]) -> dict[str, Any]:
    library = CpuLibrary(Path(result["library"]))
    isas, in_use = library.isas(), library.isa_in_use()
    if in_use is None:
        available = ", ".join(name for name, has in isas.items() if has)
        raise CliError(
            f"build: EXLLAMA_OPS_CPU_ISA must name an instruction set of this CPU, one of {available}; got "
            f"{os.environ.get('EXLLAMA_OPS_CPU_ISA')}"
        )
    return {"isas": isas, "isa_in_use": in_use}


def _cuda_details(result: dict[str, Any]) -> dict[str, Any]:
    CudaLibrary(Path(result["library"]))  # it loads, on a machine without a GPU too
    return {}


def _find_or_build(recipe: Recipe, codes: tuple[str, ...], *, force: bool) -> dict[str, Any]:
    brought = None if force else cache.given(recipe) or cache.packaged(recipe)
    if brought is not None:
        built, origin = cache.read(recipe, brought.parent), cache.origin(recipe, brought)
        if built is None:
            raise CliError(f"build: {brought} is damaged; install the package anew")
    else:
        with Screen() as screen:
            built = cache.find_or_build(recipe, screen, codes, force=force)
        origin = "built" if built.fresh else "cached"
    return {
        "library": str(built.path),
        "origin": origin,
        "compiler": built.compiler,
        "flags": built.flags,
        "seconds": built.seconds,
    }
