"""Weights lie in memory that asks for huge pages, and that memory goes back to the system with them."""

from __future__ import annotations

import copy
import io
import itertools
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from exllama_ops import ExllamaLinear, huge_pages, prepare, quantize
from exllama_ops.huge_pages import clone_in_huge_pages, empty_in_huge_pages

HUGE_BYTES = 2 << 20

needs_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="needs a Linux with huge pages"
)


def asks_for_huge_pages(tensor: Tensor) -> bool:
    """Whether the kernel has noted, of the mapping where the tensor lies, that it asked."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        limits = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if limits:
            inside = int(limits[1], 16) <= tensor.data_ptr() < int(limits[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the tensor is in no mapping")


@pytest.fixture
def words() -> Tensor:
    return torch.randint(-(2**31), 2**31, (64, 1024), dtype=torch.int32)


@needs_huge_pages
@pytest.mark.parametrize("parameter", [False, True])
def test_a_clone_asks_for_huge_pages_and_is_equal(words: Tensor, parameter: bool) -> None:
    cloned = clone_in_huge_pages(nn.Parameter(words, requires_grad=False) if parameter else words)
    assert type(cloned) is Tensor
    assert asks_for_huge_pages(cloned)
    assert not asks_for_huge_pages(words)
    assert torch.equal(cloned, words)


def test_a_clone_of_columns_is_contiguous(words: Tensor) -> None:
    columns = words[:, 16:1000]
    cloned = clone_in_huge_pages(columns)
    assert cloned.is_contiguous()
    assert torch.equal(cloned, columns)


def test_clones_lie_one_after_another_on_lines_of_the_cache(words: Tensor) -> None:
    odd = words.view(torch.uint8).view(-1)[: (64 << 10) + 1]
    clones = [clone_in_huge_pages(odd) for _ in range(3)]
    for first, second in itertools.pairwise(clones):
        assert second.data_ptr() == first.data_ptr() + (64 << 10) + 64
    assert clones[0].data_ptr() % 64 == 0
    for cloned in clones:
        assert torch.equal(cloned, odd)
        cloned.zero_()


def test_a_clone_is_saved_without_what_lies_beside_it(words: Tensor) -> None:
    clone_in_huge_pages(words)
    file = io.BytesIO()
    torch.save(clone_in_huge_pages(words), file)
    assert len(file.getvalue()) < words.nbytes + 4096
    file.seek(0)
    assert torch.equal(torch.load(file), words)
    assert torch.equal(copy.deepcopy(clone_in_huge_pages(words)), words)


def test_memory_goes_back_with_its_last_tensor(words: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_shared", None)  # the present one may have tensors of other tests
    clones = [clone_in_huge_pages(words) for _ in range(2)]
    assert huge_pages._shared is not None
    shared = huge_pages._shared
    del clones[0]
    assert shared() is not None
    assert torch.equal(clones[0], words)
    del clones
    assert shared() is None


def test_threads_get_memory_of_their_own() -> None:
    clones: dict[int, list[Tensor]] = {}

    def clone(value: int) -> None:
        source = torch.full((20000,), value, dtype=torch.int32)
        clones[value] = [clone_in_huge_pages(source) for _ in range(20)]

    threads = [threading.Thread(target=clone, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value, tensors in clones.items():
        assert all(bool((tensor == value).all()) for tensor in tensors)


@needs_huge_pages
def test_the_variable_opts_out(words: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_HUGE_PAGES", "0")
    assert not asks_for_huge_pages(clone_in_huge_pages(words))
    assert not asks_for_huge_pages(empty_in_huge_pages(2 * HUGE_BYTES))


def test_a_system_that_gives_no_mapping_gets_an_ordinary_copy(words: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_bytes: int) -> None:
        raise OSError(f"no {num_bytes} bytes")

    monkeypatch.setattr(huge_pages, "_shared", None)
    monkeypatch.setattr(huge_pages._Mapping, "of", refuse)
    assert torch.equal(clone_in_huge_pages(words), words)
    assert empty_in_huge_pages(2 * HUGE_BYTES).shape == (2 * HUGE_BYTES,)


def test_other_tensors_are_cloned_as_ever(words: Tensor) -> None:
    assert clone_in_huge_pages(words.to("meta")).device.type == "meta"
    with FakeTensorMode() as mode:
        fake = clone_in_huge_pages(mode.from_tensor(words))
    assert type(fake) is not Tensor
    assert fake.shape == words.shape
    with torch.device("meta"):
        assert torch.equal(clone_in_huge_pages(words), words)
        assert empty_in_huge_pages(2 * HUGE_BYTES).device.type == "cpu"


@needs_huge_pages
def test_bytes_to_read_into_have_a_mapping_of_their_own() -> None:
    read = empty_in_huge_pages(2 * HUGE_BYTES + 3)
    assert read.shape == (2 * HUGE_BYTES + 3,)
    assert read.dtype == torch.uint8
    assert read.data_ptr() % HUGE_BYTES == 0
    assert asks_for_huge_pages(read)
    assert empty_in_huge_pages(7).shape == (7,)


@needs_huge_pages
def test_weights_of_layers_ask_for_huge_pages() -> None:
    weight = quantize(torch.randn(512, 512), bits=4, group_size=32)
    assert asks_for_huge_pages(prepare(weight).qweight)
    loaded = ExllamaLinear(512, 512, 4, 32)
    assert asks_for_huge_pages(loaded.qweight)
    assert not loaded.qweight.any()
