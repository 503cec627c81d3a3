"""The tests of the checkout on the device, counted by outcome; what lacks a module or a second GPU is named."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.gpu_hour.part import Options
from tools.gpu_hour.records import Result

ROOT = Path(__file__).resolve().parents[3]
_CONFORMANCE = "tests/conformance"
_ENVIRONMENTS = {
    "conformance_cuda": {},
    "conformance_overlapping": {"EXLLAMA_OPS_CUDA_OVERLAP": "1"},
    "conformance_triton": {"EXLLAMA_OPS_BACKEND": "triton"},
}
_SHOWN = 20


def run(what: str, options: Options) -> Result:
    """Run the GPU's tests, or the conformance tests by a backend."""
    if options.dry:
        return _collect([*marked_files(), _CONFORMANCE]) if what == "gpu" else _not_walked([_CONFORMANCE])
    if what == "gpu":
        return run_files(marked_files(), options, workers=4)
    return run_files([_CONFORMANCE], options, workers=12, environment=_ENVIRONMENTS[what])


def marked_files() -> list[str]:
    """The files with tests for a GPU, but for those of the conformance tests."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    names = [path.relative_to(ROOT).as_posix() for path in files if "mark.gpu" in path.read_text()]
    return [name for name in names if not name.startswith(_CONFORMANCE)]


def run_files(
    files: Sequence[str], options: Options, *, workers: int = 1, environment: Mapping[str, str] | None = None
) -> Result:
    """Run the tests for a GPU of some files.

    Args:
        files: files or folders.
        options: of the part.
        workers: processes, if pytest-xdist is installed.
        environment: variables to add.
    """
    if options.dry:
        return _not_walked(files)
    if importlib.util.find_spec("pytest") is None:
        return Result("skipped", "pytest is not installed")
    command = [*_command(files), "-q", "--tb=short", "--durations=10"]
    variables = {**os.environ, **(environment or {})}
    workers = min(workers, os.cpu_count() or 1)
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    with TemporaryDirectory() as scratch:
        xml = Path(scratch) / "results.xml"
        status = subprocess.run([*command, f"--junitxml={xml}"], cwd=ROOT, env=variables, check=False).returncode
        if not xml.is_file():
            return Result("failed", f"pytest ended by exit status {status} and wrote no results")
        return result_of(xml.read_text(), status)


def _command(files: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pytest", "-m", "gpu", *files, "-p", "no:cacheprovider"]


def _collect(files: Sequence[str]) -> Result:
    """What pytest finds, of this part and of those that run others of the files."""
    command = [*_command(files), "--collect-only", "-q"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = (ended.stdout.strip().splitlines() or ["nothing was printed"])[-1]
    if ended.returncode:
        print(ended.stdout, ended.stderr)
    return Result("failed" if ended.returncode else "passed", last, not_walked=["the tests: each needs a device"])


def _not_walked(files: Sequence[str]) -> Result:
    missing = [name for name in files if not (ROOT / name).exists()]
    summary = f"not there: {', '.join(missing)}" if missing else f"{', '.join(files)}, collected by tests.gpu"
    return Result("failed" if missing else "passed", summary, not_walked=["the tests: each needs a device"])


def result_of(xml: str, status: int) -> Result:
    """What pytest's results say.

    Args:
        xml: of its option ``--junitxml``.
        status: its exit status.
    """
    counts: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    bad: list[str] = []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        kind = "passed" if outcome is None else outcome.tag
        counts[kind] += 1
        message = " ".join((outcome.get("message") or "").split())[:240] if outcome is not None else ""
        if kind == "skipped":
            skipped[message] += 1
        elif kind != "passed":
            bad.append(f"{case.get('classname')}.{case.get('name')}: {message}")
    lines = bad[:_SHOWN] + ([f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else [])
    lines += [f"skipped {count}: {reason}" for reason, count in skipped.most_common()]
    summary = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "no tests"
    ended_well = status == 0 and counts["passed"] and not bad
    return Result("passed" if ended_well else "failed", summary, lines, data=dict(counts))
