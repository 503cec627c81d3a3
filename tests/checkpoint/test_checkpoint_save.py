"""Writing checkpoints, and reading them back."""

from __future__ import annotations

import errno
import json
import resource
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from checkpoint.builder import DATA, module, words_to_v1, write
from exllama_ops.checkpoint import CheckpointError, open_gptq, read_gptq, save_gptq
from exllama_ops.layout import GptqWeight
from exllama_ops.layout.formats import SUPPORTED_BITS


def weight(**options) -> GptqWeight:
    tensors = module("m", fmt="gptq_v2", **options)
    size = options.get("group_size", 32)
    return GptqWeight(
        qweight=tensors["m.qweight"],
        qzeros=tensors["m.qzeros"],
        scales=tensors["m.scales"],
        g_idx=tensors["m.g_idx"] if options.get("act") else None,
        bits=options.get("bits", 4),
        group_size=options.get("K", 64) if size == -1 else size,
        bias=tensors.get("m.bias"),
    )


def assert_same(got: GptqWeight, want: GptqWeight) -> None:
    assert (got.bits, got.group_size) == (want.bits, want.group_size)
    for name in ("qweight", "qzeros", "scales", "g_idx", "bias"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act", [False, True])
def test_round_trip_is_bit_exact(tmp_path, bits, checkpoint_format, act):
    weights = {
        "a.q": weight(bits=bits, sym=False, act=act, bias=True),
        "a.k": weight(bits=bits, sym=False, act=act, K=96, group_size=32, seed=1),
    }
    dense = {"norm.weight": torch.randn(7).bfloat16()}
    save_gptq(tmp_path, weights, dense, sym=False, desc_act=act, checkpoint_format=checkpoint_format)
    checkpoint = open_gptq(tmp_path)
    assert set(checkpoint.quantized) == set(weights)
    for name, want in weights.items():
        assert_same(checkpoint.read(name), want)
    assert torch.equal(checkpoint.read_tensor("norm.weight"), dense["norm.weight"])
    config = checkpoint.config
    assert (config.checkpoint_format, config.sym, config.desc_act, config.bits) == (checkpoint_format, False, act, bits)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_words_on_disk_are_those_of_the_declared_format(tmp_path, checkpoint_format):
    want = weight(bits=2, sym=False)
    save_gptq(tmp_path, {"m": want}, sym=False, desc_act=False, checkpoint_format=checkpoint_format)
    stored = load_file(tmp_path / "model.safetensors")["m.qzeros"]
    assert torch.equal(stored, words_to_v1(want.qzeros, 2) if checkpoint_format == "gptq" else want.qzeros)


@pytest.mark.parametrize("name", ["smol1-w2g32-asym-act", "tiny-w3g32-asym-act-v2", "tiny-w4g64-lmhead"])
def test_saving_a_checkpoint_of_another_tool_writes_its_tensors_again(tmp_path, name):
    """Word for word, read lazily and split into shards, also when the tool declared `dynamic` rules."""
    source = open_gptq(DATA / name)
    dense = {tensor: source.read_tensor(tensor) for tensor in source.dense}
    config = json.loads((DATA / name / "config.json").read_text())
    save_gptq(
        tmp_path,
        source.weights(),
        dense,
        sym=source.config.sym,
        desc_act=source.config.desc_act,
        checkpoint_format=source.config.checkpoint_format,
        config=config,
        max_shard_bytes=300_000,
    )
    saved = {}
    for file in tmp_path.glob("*.safetensors"):
        saved |= load_file(file)
    original = load_file(DATA / name / "model.safetensors")
    assert set(saved) == set(original)
    for tensor, want in original.items():
        assert torch.equal(saved[tensor], want), tensor
    copy = open_gptq(tmp_path)
    assert (copy.config.bits, copy.config.group_size) == (source.config.bits, source.config.group_size)
    assert copy.config.lm_head == source.config.lm_head
    for module_name in source.quantized:
        assert_same(copy.read(module_name), source.read(module_name))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {k: v for k, v in stored.items() if k != "quantization_config"} == {
        k: v for k, v in config.items() if k != "quantization_config"
    }
    assert json.loads((tmp_path / "quantize_config.json").read_text()) == stored["quantization_config"]


def test_differing_widths_become_dynamic_rules(tmp_path):
    weights = {
        "a.1": weight(),
        "a.10": weight(bits=8, group_size=16),
        "a.2": weight(),
        "b": weight(bits=2, K=96, group_size=96),
    }
    save_gptq(tmp_path, weights, sym=True, desc_act=False)
    config = json.loads((tmp_path / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"]) == (4, 32)
    assert config["dynamic"] == {
        r"+:^a\.10$": {"bits": 8, "group_size": 16},
        r"+:^b$": {"bits": 2, "group_size": 96},
    }
    for name, got in read_gptq(tmp_path, progress=False).items():
        assert_same(got, weights[name])


def test_one_group_per_column_everywhere_is_group_size_minus_1(tmp_path):
    weights = {"a": weight(group_size=-1), "b": weight(K=96, group_size=-1)}
    save_gptq(tmp_path, weights, sym=True, desc_act=False)
    config = json.loads((tmp_path / "quantize_config.json").read_text())
    assert (config["group_size"], "dynamic" in config) == (-1, False)
    for name, got in read_gptq(tmp_path, progress=False).items():
        assert_same(got, weights[name])


def test_shards_are_bounded_indexed_and_marked_as_torch(tmp_path):
    weights = {f"m{i}": weight(seed=i) for i in range(4)}
    save_gptq(tmp_path, weights, {"big": torch.zeros(3000)}, sym=True, desc_act=False, max_shard_bytes=4000)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    sizes = []
    for name in files:
        with safe_open(tmp_path / name, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            assert {index["weight_map"][tensor] for tensor in handle.keys()} == {name}  # noqa: SIM118
        tensors = load_file(tmp_path / name)
        sizes.append(sum(t.nbytes for t in tensors.values()))
        assert sizes[-1] <= 4000 or set(tensors) == {"big"}
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(sizes) == open_gptq(tmp_path).weight_bytes


def test_other_tools_find_a_g_idx_in_every_module(tmp_path):
    save_gptq(tmp_path, {"m": weight(K=96, group_size=64)}, sym=True, desc_act=False)
    g_idx = load_file(tmp_path / "model.safetensors")["m.g_idx"]
    assert g_idx.dtype == torch.int32
    assert g_idx.tolist() == [0] * 64 + [1] * 32


def test_tensors_that_share_memory_or_are_views_are_saved(tmp_path):
    shared = weight(sym=False, act=True)
    table = torch.arange(12.0).reshape(3, 4)
    dense = {"tied": table, "embed": table, "turned": table.t(), "part": table[1]}
    save_gptq(tmp_path, {"q": shared, "k": shared}, dense, sym=False, desc_act=True)
    checkpoint = open_gptq(tmp_path)
    assert_same(checkpoint.read("k"), shared)
    for name, tensor in dense.items():
        assert torch.equal(checkpoint.read_tensor(name), tensor)


def test_a_former_checkpoint_is_replaced_and_other_files_stay(tmp_path):
    many = {f"m{i}": weight(seed=i) for i in range(4)}
    save_gptq(tmp_path, many, sym=True, desc_act=False, max_shard_bytes=4000)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_gptq(tmp_path, {"m": weight()}, sym=True, desc_act=False)
    names = {"model.safetensors", "config.json", "quantize_config.json", "tokenizer.json"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert open_gptq(tmp_path).quantized == ("m",)
    save_gptq(tmp_path, many, sym=True, desc_act=False, max_shard_bytes=4000)
    assert set(open_gptq(tmp_path).quantized) == set(many)


def test_a_directory_can_be_saved_over_itself(tmp_path):
    write(tmp_path, module("m", sym=False, act=True), sym=False, desc_act=True)
    before = read_gptq(tmp_path, progress=False)["m"]
    save_gptq(tmp_path, open_gptq(tmp_path).weights(), sym=False, desc_act=True)
    assert_same(read_gptq(tmp_path, progress=False)["m"], before)


def test_a_failed_save_leaves_the_former_checkpoint_and_no_litter(tmp_path):
    save_gptq(tmp_path, {"m": weight()}, sym=True, desc_act=False)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    broken = {"a": weight(), "b": weight(sym=False)}
    with pytest.raises(CheckpointError, match="those of b are not"):
        save_gptq(tmp_path, broken, sym=True, desc_act=False, max_shard_bytes=100)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_config_json_appears_last(tmp_path, monkeypatch):
    """An interruption at any rename leaves no directory that opens as a checkpoint but is not whole."""
    renamed = []
    replace = Path.replace

    def spy(self, target):
        assert not (tmp_path / "config.json").exists()
        renamed.append(Path(target).name)
        return replace(self, target)

    save_gptq(tmp_path, {"m": weight()}, sym=True, desc_act=False)
    monkeypatch.setattr(Path, "replace", spy)
    save_gptq(tmp_path, {"m": weight(seed=1)}, sym=True, desc_act=False)
    assert renamed == ["model.safetensors", "quantize_config.json", "config.json"]


@pytest.mark.parametrize(
    ("weights", "tensors", "options", "message"),
    [
        ({}, {}, {}, r"weights must hold at least one module; got none"),
        ({"m": {}}, {}, {"checkpoint_format": "marlin"}, r"checkpoint_format must be .*; got 'marlin'"),
        ({"m": {"act": True}}, {}, {}, r"module m has a g_idx \(activation order\), but desc_act=False"),
        ({"m": {"sym": False}}, {}, {}, r"sym=True says that all zero points are 8; those of m are not"),
        ({"m": {}}, {"m.scales": torch.ones(1)}, {}, r"tensor m\.scales: m is quantized and has its own"),
        ({"m": {}}, {"m.weight": torch.ones(1)}, {}, r"tensor m\.weight: m is quantized and has its own"),
    ],
)
def test_contradicting_arguments_are_refused(tmp_path, weights, tensors, options, message):
    made = {name: weight(**kind) for name, kind in weights.items()}
    with pytest.raises(CheckpointError, match=message):
        save_gptq(tmp_path, made, tensors, **({"sym": True, "desc_act": False} | options))
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_a_weight_is_refused(tmp_path):
    whole = weight(act=True)
    shard = GptqWeight(whole.qweight[:4], whole.qzeros, whole.scales, whole.g_idx[:32], 4, 32)
    with pytest.raises(CheckpointError, match=r"scales of m must have ceil\(K / group_size\) = 1 rows.*got 2"):
        save_gptq(tmp_path, {"m": shard}, sym=True, desc_act=True)


def test_every_file_is_as_readable_as_any_that_the_process_makes(tmp_path):
    """safetensors makes files for their owner alone."""
    path = tmp_path / "checkpoint"
    save_gptq(path, {"layer": weight(sym=False)}, sym=False, desc_act=False)
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


@pytest.fixture
def _small_files():
    """No file of this process may exceed 100 kB, as if a disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("_small_files")
@pytest.mark.parametrize(
    ("tensors", "config"),
    [({"big": torch.zeros(50_000)}, {}), ({}, {"big": "x" * 200_000})],
    ids=["tensors", "config"],
)
def test_a_full_disk_is_a_checkpoint_error_that_leaves_the_former_checkpoint(tmp_path, tensors, config):
    save_gptq(tmp_path, {"m": weight()}, sym=True, desc_act=False)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(
        CheckpointError, match=f"save_gptq: {tmp_path}.*: cannot be written: .*(File too large|os error)"
    ):
        save_gptq(tmp_path, {"m": weight()}, tensors, sym=True, desc_act=False, config=config, max_shard_bytes=4000)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_path_that_cannot_be_made_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/below", "x" * 5000, "a\0b"):
        with pytest.raises(CheckpointError, match=r"save_gptq: .*cannot be written: "):
            save_gptq(tmp_path / name, {"m": weight()}, sym=True, desc_act=False)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_directory_in_the_place_of_a_file_is_refused_before_anything_is_written(tmp_path, name):
    save_gptq(tmp_path, {"m": weight()}, sym=True, desc_act=False)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    before = {file.name for file in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=f"{name}: must be a file, to be replaced; got a directory"):
        save_gptq(tmp_path, {"m": weight()}, sym=True, desc_act=False)
    assert {file.name for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("function", ["replace", "chmod"])
def test_a_failure_while_publishing_is_a_checkpoint_error_without_litter(tmp_path, monkeypatch, function):
    save_gptq(tmp_path, {"m": weight()}, sym=True, desc_act=False)

    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, function, refuse)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*Read-only file system"):
        save_gptq(tmp_path, {"m": weight()}, sym=True, desc_act=False)
    assert not [file.name for file in tmp_path.iterdir() if file.name.endswith(".tmp")]


@pytest.mark.parametrize("value", [{1, 2}, object()], ids=["set", "object"])
def test_a_config_that_is_no_json_is_a_checkpoint_error(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be written: .*not JSON serializable"):
        save_gptq(tmp_path, {"m": weight()}, sym=True, desc_act=False, config={"x": value})
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_weights_themselves_is_their_own(tmp_path):
    class Broken(dict):
        def items(self):
            raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        save_gptq(tmp_path, Broken(m=weight()), sym=True, desc_act=False)


@pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": []}])
def test_a_config_without_architectures_is_told(tmp_path, config):
    with pytest.warns(UserWarning, match=r"architectures=\[type\(model\)\.__name__\], which servers ask for") as seen:
        save_gptq(tmp_path, {"m": weight()}, sym=True, desc_act=False, config=config)
    assert [warning.filename for warning in seen] == [__file__]


def test_a_config_with_architectures_and_none_at_all_are_quiet(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_gptq(tmp_path, {"m": weight()}, sym=True, desc_act=False, config={"architectures": ["A"]})
        save_gptq(tmp_path, {"m": weight()}, sym=True, desc_act=False)
