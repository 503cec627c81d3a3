"""`exllama-ops build`: build the native CPU library before it is needed, and say what it is."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from exllama_ops.backends.cpu import cache
from exllama_ops.backends.cpu.native import LoadError, NativeLibrary
from exllama_ops.cli.output import CliError, emit, say


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "build",
        help="build the native CPU kernels into the cache",
        description="Build the native CPU kernels into the cache, unless they are built or were installed with the "
        "package. Without this command they are built when they are first called.",
    )
    parser.add_argument("--force", action="store_true", help="build into the cache even if there is a library")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the text")
    parser.set_defaults(command=build)


def build(args: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
        CliError: whatever a user can cause.
    """
    try:
        result = _find_or_build(force=args.force)
        library = NativeLibrary(Path(result["library"]))
    except (cache.BuildError, LoadError) as error:
        raise CliError(f"build: {error}") from error
    isas = library.isas()
    result |= {"isas": isas, "isa_in_use": library.isa_in_use()}
    if result["isa_in_use"] is None:
        available = ", ".join(name for name, has in isas.items() if has)
        raise CliError(
            f"build: EXLLAMA_OPS_CPU_ISA must name an instruction set of this CPU, one of {available}; got "
            f"{os.environ.get('EXLLAMA_OPS_CPU_ISA')}"
        )
    if args.json:
        emit(json.dumps(result, ensure_ascii=False) + "\n")
        return
    lines = {
        "library": f"{result['library']} ({result['origin']})",
        "compiler": result["compiler"],
        "flags": " ".join(result["flags"]),
        "ISAs": ", ".join(
            name + (" (in use)" if name == result["isa_in_use"] else "" if has else " (not on this CPU)")
            for name, has in isas.items()
        ),
    }
    for name, value in lines.items():
        emit(f"{name + ':':10}{value}\n")


def _find_or_build(*, force: bool) -> dict[str, Any]:
    packaged = cache.packaged()
    if packaged is not None and not force:
        built, origin = cache.read(packaged.parent), "packaged"
        if built is None:
            raise CliError(f"build: {packaged} is damaged; install the package anew")
    else:
        built = cache.find_or_build(say, force=force)
        origin = "built" if built.fresh else "cached"
    return {
        "library": str(built.path),
        "origin": origin,
        "compiler": built.compiler,
        "flags": built.flags,
        "seconds": built.seconds,
    }
