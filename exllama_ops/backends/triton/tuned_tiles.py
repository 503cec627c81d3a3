"""The tiles that were found fastest on a device, by `tune`: what may be chosen, and the files that keep the choices.

A choice replaces the tile of a finished plan, whose form, step and split came of the table's tile. It is a neighbour of
that tile with the same matrix instructions, so no bit of a result depends on it. There is a file for each name of a
device, version of Triton and text of the kernels, so that none goes stale. It is read when a first plan asks.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from exllama_ops.backends.triton.arguments import groups_of
from exllama_ops.backends.triton.tiles import DxPlan, Plan, Tile, bucket_of, device_of
from exllama_ops.cache import WHAT_TO_DO, cache_folder, publishing_file
from exllama_ops.layout import formats
from exllama_ops.layout.weight import Weight

# What reading a file of other content raises.
_UNUSABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)

_choices: dict[torch.device, dict[Problem, Tile]] = {}
# Held while choices are read from a file, or one is added.
_lock = threading.RLock()


# A plan keeps its type when its tile is replaced.
AnyPlan = TypeVar("AnyPlan", Plan, DxPlan)


class Problem(NamedTuple):
    """What a choice is for: a plan without the number of its splits, for the M of a bucket, and a weight's sizes."""

    form: str
    bits: int
    K: int
    N: int
    bucket: int | None
    step: int
    groups_of: str
    is_split: bool
    tile: Tile

    @classmethod
    def of(cls, plan: Plan | DxPlan, M: int, weight: Weight) -> Problem:
        if isinstance(plan, DxPlan):
            how = (plan.step, groups_of(weight, plan.tile.block_n), False)
        else:
            how = (plan.block_b, plan.groups_of, plan.splits > 1)
        return cls(plan.form, weight.bits, weight.K, weight.N, bucket_of(M), *how, plan.tile)


def candidates(form: str, arch: str, tile: Tile) -> list[Tile]:
    """The table's tile and its neighbours, one number larger or smaller, that give every sum the same bits."""
    m, n, warps, stages = tile
    found = [tile]
    if form != "gemv":
        found += [tile._replace(block_m=size) for size in (m // 2, 2 * m) if 16 <= size <= 128]
    found += [tile._replace(block_n=size) for size in (n // 2, 2 * n) if 32 <= size <= 256]
    # wgmma and tcgen05 need groups of four warps.
    found += [tile._replace(num_warps=size) for size in (warps // 2, 2 * warps) if 4 <= size <= 8]
    found += [tile._replace(num_stages=size) for size in (stages - 1, stages + 1) if 1 <= size <= 4]
    return [other for other in found if _order_of_K(form, arch, other) == _order_of_K(form, arch, tile)]


def _order_of_K(form: str, arch: str, tile: Tile) -> Any:
    """Equal for tiles in which a sum takes its products in the same order: by the same kind of matrix instruction."""
    if arch == "other":
        return tile
    if arch == "cdna" and form != "gemv":
        return min(tile.block_m, tile.block_n) >= 32  # MFMA of 32 x 32, else of 16 x 16 with a longer K
    if arch in ("sm90", "sm100") and form == "dot":
        return tile.block_m >= 64  # wgmma or tcgen05, else mma.sync
    return "one"


def tuned(plan: AnyPlan, M: int, weight: Weight, device: torch.device) -> AnyPlan:
    """The plan with the tile that was chosen for it on this device, if one was."""
    choices = choices_of(device)
    tile = choices.get(Problem.of(plan, M, weight)) if choices else None
    return plan if tile is None else replace(plan, tile=tile)


def choices_of(device: torch.device) -> dict[Problem, Tile]:
    """The choices for a device, from its file at first; a file that cannot be used is ignored, with a warning."""
    if device not in _choices:
        with _lock:
            if device not in _choices:
                _choices[device] = _read_or_warn(device)
    return _choices[device]


def _read_or_warn(device: torch.device) -> dict[Problem, Tile]:
    try:
        return _read(device)
    except (FileNotFoundError, NotADirectoryError):  # nothing was kept
        return {}
    except _UNUSABLE as error:
        warnings.warn(
            f"exllama_ops: the tuned tiles in {path_of(device)} are ignored, and the table serves: {error!r}",
            stacklevel=3,
        )
        return {}


def keep(device: torch.device, problem: Problem, tile: Tile) -> None:
    """Serve a tile from now on, and write it to the device's file, beside what other processes wrote there."""
    choices = choices_of(device)
    with _lock:
        choices[problem] = tile
        with suppress(*_UNUSABLE):  # `choices_of` has said it; the file is replaced
            choices.update({**_read(device), **choices})
        try:
            _write(device, choices)
        except OSError as error:
            warnings.warn(f"exllama_ops: tuned tiles serve this process alone: {error}; {WHAT_TO_DO}", stacklevel=2)


def _write(device: torch.device, choices: dict[Problem, Tile]) -> None:
    path = path_of(device)
    record = {"for": _identity(device), "choices": [[*key[:-1], list(key.tile), list(choices[key])] for key in choices]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with publishing_file(path, prefix=f"{path.name}.") as file:
        file.write_text(json.dumps(record, indent=0))


def path_of(device: torch.device) -> Path:
    """The file of a device, which may not be there."""
    identity = "-".join(_identity(device).values())
    return cache_folder() / "triton" / f"{re.sub('[^A-Za-z0-9.]+', '-', identity)}.json"


def _read(device: torch.device) -> dict[Problem, Tile]:
    record = json.loads(path_of(device).read_text())
    if record["for"] != _identity(device):
        raise ValueError(f"it is for {record['for']}")
    choices = {}
    for *fields, table_tile, tile in record["choices"]:
        problem = Problem._make([*fields, Tile(*table_tile)])
        if Tile(*tile) not in candidates(problem.form, device_of(device).arch, problem.tile):
            raise ValueError(f"{tile} is no tile for {problem}")
        choices[problem] = Tile(*tile)
    return choices


@functools.cache
def _identity(device: torch.device) -> dict[str, str]:
    name = "host" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)
    return {"device": name, "triton": triton.__version__, "source": _source()}


@functools.cache
def _source() -> str:
    """A digest of what the kernels and the table are made from."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(formats.__file__)]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]
