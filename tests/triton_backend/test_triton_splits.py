"""Sums of a K that is split, by the last program of a tile or by a kernel; and whose tickets are whose."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from conformance.weights import Case, build, build_experts, experts_args
from exllama_ops.backends.triton import gemm, ops, tickets, tiles
from exllama_ops.backends.triton.tickets import User
from exllama_ops.layout.weight import Weight as Packed
from ptx_emulator.emulator import reasons_against
from triton_backend.emulated import A100, EmulatedDriver

CPU = torch.device("cpu")
is_interpreting = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
emulated = pytest.mark.skipif(
    is_interpreting or bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}"
)
ORDERS = [("ascending", 0), ("descending", 0), ("random", 1), ("random", 2)]


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> dict[str, User | None]:
    """Who launches, as a driver would tell; sets are those of this test."""
    current: dict[str, User | None] = {"": User(0, 7)}
    monkeypatch.setattr(tickets, "user_of", lambda device: current[""])
    monkeypatch.setattr(tickets, "_sets", {})
    return current


@emulated
@pytest.mark.parametrize(("form", "M", "dtype"), [("gemv", 1, torch.float32), ("dot", 5, torch.float16)])
def test_any_program_may_be_the_last_of_its_tile(
    device: EmulatedDriver,
    user: dict[str, User | None],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    M: int,
    dtype: torch.dtype,
) -> None:
    weight = build(Case(4, 2048, 96, 128))
    x = torch.randn(M, 2048, generator=torch.Generator().manual_seed(1)).to(dtype)
    plan = tiles.plan_gemm(M, Packed.of(*weight.args), x.dtype, A100, False)
    assert plan.form == form
    assert plan.splits > 4
    results = []
    for device.order in ORDERS:
        results.append(ops.gptq_gemm(x, *weight.args))
        assert not tickets._sets[CPU]._tickets.any(), "the next launch finds tickets that were taken"
    assert device.launches == [f"{form}_kernel"] * len(ORDERS)
    monkeypatch.setattr(gemm, "tickets_for", lambda device, tiles: None)  # as on an AMD GPU
    results.append(ops.gptq_gemm(x, *weight.args))
    assert device.launches[-2:] == [f"{form}_kernel", "add_splits_kernel"]
    assert all(torch.equal(result, results[0]) for result in results)


@emulated
def test_experts_have_tickets_for_their_tiles(device: EmulatedDriver, user: dict[str, User | None]) -> None:
    experts = build_experts(Case(4, 1024, 96, 128), 3)
    x = torch.randn(22, 1024, generator=torch.Generator().manual_seed(1)).half()
    arguments = experts_args(experts, (1, 2, 2, 21))
    results = []
    for device.order in ORDERS[:3]:
        results.append(ops.gptq_moe_gemm(x, *arguments))
        assert not tickets._sets[CPU]._tickets.any()
    assert device.launches == ["dot_kernel"] * 3
    assert all(torch.equal(result, results[0]) for result in results)


def test_no_two_users_share_tickets(user: dict[str, User | None]) -> None:
    users = [User(0, 1), User(0, 2), User(1, 1), User(1, 2), User(2, 1)]
    addresses = []
    for user[""] in users:
        found = [tickets.tickets_for(CPU, 3) for _ in range(2)]
        assert all(of_user is not None and of_user.numel() == tickets.TICKETS for of_user in found)
        assert len({of_user.data_ptr() for of_user in found if of_user is not None}) == 1
        addresses += [of_user.data_ptr() for of_user in found[:1] if of_user is not None]
    apart = [later - earlier for earlier, later in zip(sorted(addresses), sorted(addresses)[1:], strict=False)]
    assert min(apart) >= 4 * tickets.TICKETS


@pytest.mark.parametrize("capture", [0, 1])
def test_where_no_set_is_left_a_launch_has_tickets_of_its_own(user: dict[str, User | None], capture: int) -> None:
    user[""] = User(0, 0)
    tickets.tickets_for(CPU, 1)
    sets = tickets._sets[CPU]
    for number in range(1, tickets.SETS):
        user[""] = User(capture * number, number)
        of_user = tickets.tickets_for(CPU, 1)
        assert of_user is not None
        if of_user.numel() == 1:
            break
    assert number == (tickets.SETS - tickets.SETS_OF_STREAMS + 1 if capture else tickets.SETS_OF_STREAMS)
    assert not of_user.any()
    user[""] = User(0, 0)
    assert tickets.tickets_for(CPU, 1) is sets.of_user(User(0, 0))


def test_a_launch_with_many_tiles_has_tickets_of_its_own(user: dict[str, User | None]) -> None:
    most, own = (tickets.tickets_for(CPU, tickets.TICKETS + more) for more in (0, 1))
    assert most is not None
    assert own is not None
    assert own.shape == (tickets.TICKETS + 1,)
    assert most.data_ptr() == tickets._sets[CPU].of_user(User(0, 7)).data_ptr()  # type: ignore[union-attr]


def test_a_capture_allocates_no_sets(user: dict[str, User | None]) -> None:
    """They would be memory of its graph, and be filled with zeros at its replays."""
    user[""] = User(5, 1)
    of_capture = tickets.tickets_for(CPU, 3)
    assert of_capture is not None
    assert of_capture.shape == (3,)
    assert not tickets._sets


def test_what_a_driver_tells(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("needs a C compiler")
    library = tmp_path / "driver.so"
    source = Path(__file__).parent / "driver.c"
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    driver = tickets.driver_of(str(library))
    assert driver is not None
    told = [tickets.user_of_stream(driver, stream) for stream in (0, 1, 2**40, 5, 6, 7)]
    assert told == [User(0, 100), User(0, 101), User(2**40 + 10, 2**40 + 100), User(15, 105), None, None]
    assert tickets.driver_of("no_driver.so") is None
    assert tickets.user_of(CPU) is None
