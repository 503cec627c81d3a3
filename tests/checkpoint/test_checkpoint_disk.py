"""Files that are no files, JSON that is none, and headers by an attacker: every one is a `CheckpointError`."""

from __future__ import annotations

import json
import os
import random
import stat
import struct

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from checkpoint.builder import module, quantization, write, write_sharded
from exllama_ops.checkpoint import CheckpointError, disk, files, open_gptq

pytestmark = pytest.mark.usefixtures("no_hang")

SHARD, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
SINGLE_FILES = ("config.json", "quantize_config.json", "model.safetensors")
SHARDED_FILES = ("config.json", INDEX, SHARD)
DEEP = '{"x":' * 200_000 + "1" + "}" * 200_000


def checkpoint(directory, sharded=False):
    if sharded:
        return write_sharded(directory, {SHARD: module()})
    write(directory, module())
    (directory / "quantize_config.json").write_text(json.dumps(quantization()))
    return directory


def fifo(path):
    """A FIFO with a writer, so that code which opens it fails a test, and does not wait for ever."""
    os.mkfifo(path)
    os.open(path, os.O_RDWR)


def link(target):
    return lambda path: path.symlink_to(target)


def link_to_fifo(path):
    fifo(path.with_name("fifo"))
    path.symlink_to("fifo")


IRREGULAR = {
    "FIFO": (fifo, "must be a regular file; got a FIFO"),
    "link to a FIFO": (link_to_fifo, "must be a regular file; got a FIFO"),
    "socket": (lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), "must be a regular file; got a socket"),
    "device": (link("/dev/zero"), "must be a regular file; got a character device"),
    "directory": (os.mkdir, "must be a regular file; got a directory"),
    "dangling link": (link("nothing"), "no such file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize(
    ("sharded", "name"), [(False, name) for name in SINGLE_FILES] + [(True, name) for name in SHARDED_FILES]
)
def test_what_is_no_regular_file_is_refused_by_name(tmp_path, sharded, name, kind):
    checkpoint(tmp_path, sharded)
    make, message = IRREGULAR[kind]
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: {message}"):
        open_gptq(tmp_path)


@pytest.mark.parametrize("kind", IRREGULAR)
def test_a_file_that_becomes_something_else_after_opening_is_refused(tmp_path, kind):
    opened = open_gptq(checkpoint(tmp_path))
    make, message = IRREGULAR[kind]
    (tmp_path / "model.safetensors").unlink()
    make(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors: {message}"):
        opened.read("m.q")


@pytest.mark.parametrize("name", SINGLE_FILES)
def test_what_is_no_regular_file_is_not_even_opened(tmp_path, monkeypatch, name):
    """Opening starts some devices."""
    checkpoint(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    opened = []
    system = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(os.fspath(path)) or system(path, *rest))
    with pytest.raises(CheckpointError, match="got a character device"):
        open_gptq(tmp_path)
    assert str(tmp_path / name) not in opened


def test_a_fifo_that_takes_the_place_of_a_checked_file_is_refused_without_waiting(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "f")
    monkeypatch.setattr(disk, "file_type", lambda path: stat.S_IFREG)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match="f: must be a regular file; got a FIFO"):
        disk.open_file(tmp_path / "f")
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_library_looks_at_the_file_that_was_checked(tmp_path, monkeypatch):
    write(tmp_path, module())
    safe_open = safetensors.safe_open

    def swap_and_open(name, **options):
        save_file(module("other"), tmp_path / "model.safetensors.new")
        (tmp_path / "model.safetensors.new").replace(tmp_path / "model.safetensors")
        return safe_open(name, **options)

    monkeypatch.setattr(safetensors, "safe_open", swap_and_open)
    opened = open_gptq(tmp_path)
    assert opened.quantized == ("m.q",)
    with pytest.raises(CheckpointError, match=r"tensor m\.q\.qweight is not what it was when"):
        opened.read("m.q")


def test_data_is_read_of_the_file_that_was_checked(tmp_path, monkeypatch):
    tensors = module()
    opened = open_gptq(write(tmp_path, tensors))

    def open_and_swap(path):
        file = disk.open_file(path)
        save_file(module(seed=1), tmp_path / "model.safetensors.new")
        (tmp_path / "model.safetensors.new").replace(tmp_path / "model.safetensors")
        return file

    monkeypatch.setattr(files, "open_file", open_and_swap)
    assert torch.equal(opened.read("m.q").qweight, tensors["m.q.qweight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be JSON in UTF-8: Expecting value"),
        (b"{", "must be JSON in UTF-8: "),
        (b'{"bits": "\xff"}', "must be JSON in UTF-8: 'utf-8' codec can't decode"),
        (json.dumps(quantization()).encode("utf-16"), "must be JSON in UTF-8: 'utf-8' codec can't decode"),
        (b'{"bits": 1' + b"0" * 5000 + b"}", "must be JSON in UTF-8: Exceeds the limit"),
        (DEEP.encode(), "must be JSON in UTF-8: maximum recursion depth"),
        (b'{"x": ' * 65 + b"1" + b"}" * 65, "must be JSON in at most 64 levels; got more"),
        (b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}", "must be JSON in at most 64 levels; got more"),
        (b"[]", "must hold a JSON object; got list"),
        (b'{"bits": NaN, "group_size": 32, "weight_map": NaN}', "must be .*; got nan"),
    ],
    ids=lambda value: repr(value)[:20],
)
@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", INDEX])
def test_what_is_no_json_object_is_refused_by_name(tmp_path, name, content, message):
    checkpoint(tmp_path, sharded=name == INDEX)
    if name != INDEX:
        (tmp_path / ({"config.json", "quantize_config.json"} - {name}).pop()).unlink()
    if name == "config.json" and b"NaN" in content:
        content = b'{"quantization_config": ' + content + b"}"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: .*{message}"):
        open_gptq(tmp_path)


def test_json_of_64_levels_is_read(tmp_path):
    (tmp_path / "f").write_bytes(b'{"x": ' * 64 + b"1" + b"}" * 64)
    assert list(disk.read_json(tmp_path / "f")) == ["x"]


def test_a_json_file_of_any_size_is_not_read(tmp_path):
    checkpoint(tmp_path)
    os.truncate(tmp_path / "config.json", 10**12)
    with pytest.raises(CheckpointError, match=r"config\.json: must be JSON of at most 100000000 bytes; got 10{12}$"):
        open_gptq(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", INDEX])
def test_a_byte_order_mark_is_read_over(tmp_path, name):
    checkpoint(tmp_path, sharded=name == INDEX)
    if name == "quantize_config.json":
        (tmp_path / "config.json").unlink()
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert open_gptq(tmp_path).quantized == ("m.q",)


def entry(dtype="I32", shape=(4, 8), offsets=(0, 128), **more):
    return {"m.q.qweight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}, **more}


def safetensors_bytes(header, body=128, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(body)


def read_all(directory, content):
    (directory / "model.safetensors").write_bytes(content)
    opened = open_gptq(directory)
    for name in opened.quantized:
        opened.read(name)
    for name in opened.dense:
        opened.read_tensor(name)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 8,
        safetensors_bytes(DEEP.encode()),
        safetensors_bytes(entry(), length=2**64 - 1),
        safetensors_bytes(entry(), length=10**8),
        safetensors_bytes(entry(shape=(-4, 8))),
        safetensors_bytes(entry(shape=(2**62, 2**62))),
        safetensors_bytes(entry(shape=(2**64, 1))),
        safetensors_bytes(entry(shape=(0, 2**63), offsets=(0, 0)), 0),
        safetensors_bytes(entry(shape=(4.0, 8))),
        safetensors_bytes(entry(shape=("4", 8))),
        safetensors_bytes(entry(shape=(1,) * 100_000 + (4, 8))),
        safetensors_bytes(entry(dtype="X9")),
        safetensors_bytes(entry(dtype="F6_E2M3", offsets=(0, 24)), 24),
        safetensors_bytes(entry(offsets=(4, 132))),
        safetensors_bytes(entry(offsets=(128, 0))),
        safetensors_bytes(entry(offsets=(0, 2**64 - 1))),
        safetensors_bytes(entry(b={"dtype": "I32", "shape": [4, 8], "data_offsets": [0, 128]})),
        safetensors_bytes(entry(__metadata__={"a": 1})),
        safetensors_bytes(b'{"\\ud800":{"dtype":"I32","shape":[4,8],"data_offsets":[0,128]}}'),
        safetensors_bytes(b'{"\xff":{"dtype":"I32","shape":[4,8],"data_offsets":[0,128]}}'),
        safetensors_bytes({}, 0),
        safetensors_bytes([]),
    ],
    ids=range(22),
)
def test_hostile_headers_are_refused(tmp_path, content):
    write(tmp_path, module())
    with pytest.raises(CheckpointError, match=r"model\.safetensors|must have quantized modules"):
        read_all(tmp_path, content)


@pytest.mark.parametrize(
    ("dtype", "shape", "size"), [("F6_E2M3", (4, 8), 24), ("I32", (0, 2**63), 0), ("F4", (16, 16), 128)]
)
def test_a_tensor_that_the_library_cannot_make_is_refused_when_it_is_read(tmp_path, dtype, shape, size):
    """The header is fine; what is raised for the data is a TypeError, or nothing until the shape is compared."""
    tensors = module()
    offset = sum(tensor.nbytes for tensor in tensors.values())
    save_file(tensors, tmp_path / "tensors")
    content = (tmp_path / "tensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["odd"] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, offset + size)}
    write(tmp_path, tensors)
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + content[8 + length :] + bytes(size)
    (tmp_path / "model.safetensors").write_bytes(data)
    opened = open_gptq(tmp_path)
    assert torch.equal(opened.read("m.q").qweight, tensors["m.q.qweight"])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        opened.read_tensor("odd")


def test_data_that_begins_at_any_byte_is_read(tmp_path):
    """The library pads the headers that it writes, and reads others."""
    tensors = module()
    content = (write(tmp_path, tensors) / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length].rstrip()
    for spaces in range(5):
        text = header + b" " * spaces
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        read = open_gptq(tmp_path).read("m.q")
        assert torch.equal(read.qweight, tensors["m.q.qweight"])
        assert torch.equal(read.scales, tensors["m.q.scales"])


def test_every_mutated_header_is_read_or_refused(tmp_path):
    write(tmp_path, module(K=32, N=8))
    original = (tmp_path / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", original[:8])[0]
    draw = random.Random(0)
    pieces = (b"9", b"[", b"{", b'"', b"\\u0000", b"null", b"-1", b"18446744073709551615", b"1e999", b"\xff")
    refused = 0
    for _ in range(300):
        header = bytearray(original[8:end])
        for _ in range(draw.choice((1, 1, 2, 4))):
            at = draw.randrange(len(header))
            match draw.randrange(3):
                case 0:
                    header[at] ^= 1 << draw.randrange(8)
                case 1:
                    del header[at : at + draw.randrange(1, 8)]
                case 2:
                    header[at:at] = draw.choice(pieces)
        length = len(header) if draw.random() < 0.8 else draw.choice((0, 1, end, 2**31, 2**63, len(header) + 1))
        try:
            read_all(tmp_path, struct.pack("<Q", length) + header + original[end:])
        except CheckpointError:
            refused += 1
    assert 200 < refused < 300


def test_a_panic_of_the_library_is_a_checkpoint_error(tmp_path, monkeypatch):
    class PanicException(BaseException):
        """As pyo3 makes them."""

    def panic(*args, **kwargs):
        raise PanicException("index out of bounds")

    checkpoint(tmp_path)
    monkeypatch.setattr(safetensors, "safe_open", panic)
    with pytest.raises(CheckpointError, match="must be a complete safetensors file: index out of bounds"):
        open_gptq(tmp_path)


def test_an_interrupt_is_not_a_checkpoint_error(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    checkpoint(tmp_path)
    monkeypatch.setattr(safetensors, "safe_open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_gptq(tmp_path)
