"""From tensors in a file to `GptqWeight`, and every way in which they can be wrong."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from checkpoint.builder import decode, module, pack, unpack, write
from exllama_ops.checkpoint import CheckpointError, open_gptq, read_gptq
from exllama_ops.layout.formats import SUPPORTED_BITS

BITS = SUPPORTED_BITS


def read(directory, tensors, **changes):
    return open_gptq(write(directory, tensors, **changes)).read("m.q")


@pytest.mark.parametrize(
    ("bits", "fmt"), [(b, f) for b in BITS for f in ("gptq", "gptq_v2", "gptq_p") if (b, f) != (3, "gptq_p")]
)
@pytest.mark.parametrize("sym", [True, False])
def test_zero_points_of_every_format_are_read_as_v2(tmp_path, bits, fmt, sym):
    # A partial last group: K = 96, group_size = 64.
    wanted = module(K=96, bits=bits, group_size=64, sym=sym, fmt="gptq_v2")
    tensors = module(K=96, bits=bits, group_size=64, sym=sym, fmt=fmt)
    weight = read(tmp_path, tensors, bits=bits, group_size=64, sym=sym, checkpoint_format=fmt)
    assert torch.equal(weight.qzeros, wanted["m.q.qzeros"])
    assert torch.equal(weight.qweight, wanted["m.q.qweight"])
    assert torch.equal(weight.scales, wanted["m.q.scales"])
    assert (weight.bits, weight.group_size, weight.in_features, weight.out_features) == (bits, 64, 96, 32)
    assert weight.g_idx is None
    assert weight.bias is None


def test_3_bit_gptq_p_is_refused_by_name(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"module m\.q: checkpoint_format gptq_p is supported for 2, 4 and 8 bits"
    ):
        open_gptq(write(tmp_path, module(bits=3), bits=3, checkpoint_format="gptq_p"))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("declared", ["gptq", "gptq_v2"])
def test_symmetric_zeros_of_the_other_format_are_read_right_and_told_once(tmp_path, bits, declared):
    actual = "gptq_v2" if declared == "gptq" else "gptq"
    tensors = (
        module("a", bits=bits, fmt=actual) | module("b", bits=bits, fmt=declared) | module("c", bits=bits, fmt=actual)
    )
    checkpoint = open_gptq(write(tmp_path, tensors, bits=bits, checkpoint_format=declared))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = dict(checkpoint.weights())
    for weight in weights.values():
        assert (unpack(weight.qzeros.t(), bits) == 2 ** (bits - 1)).all()
    (warning,) = caught
    assert f"checkpoint_format {declared} is declared" in str(warning.message)
    assert f"read as {actual}" in str(warning.message)


def test_asymmetric_zeros_are_never_guessed(tmp_path):
    """All stored 8 in a v1 file: in an asymmetric checkpoint they are zero points of 9."""
    tensors = module(fmt="gptq_v2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight = read(tmp_path, tensors, sym=False, checkpoint_format="gptq")
    assert (unpack(weight.qzeros.t(), 4) == 9).all()


@pytest.mark.parametrize("bits", BITS)
def test_absent_zeros_of_a_symmetric_module_are_made_up(tmp_path, bits):
    tensors = module(bits=bits)
    whole = read(tmp_path / "whole", tensors, bits=bits)
    del tensors["m.q.qzeros"]
    assert torch.equal(read(tmp_path / "absent", tensors, bits=bits).qzeros, whole.qzeros)


def test_absent_zeros_of_an_asymmetric_module_are_an_error(tmp_path):
    tensors = module()
    del tensors["m.q.qzeros"]
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor m\.q\.qzeros is missing: only sym=true"):
        open_gptq(write(tmp_path, tensors, sym=False))


def test_group_size_minus_1_is_all_rows(tmp_path):
    for act in (False, True):
        weight = read(tmp_path / str(act), module(K=96, group_size=-1, act=act), group_size=-1, desc_act=act)
        assert (weight.group_size, weight.g_idx) == (96, None)


def test_a_group_size_beyond_K_is_one_group(tmp_path):
    weight = read(tmp_path, module(K=64, group_size=128), group_size=128)
    assert (weight.group_size, weight.scales.shape[0], weight.g_idx) == (128, 1, None)


@pytest.mark.parametrize("desc_act", [False, True])
def test_act_order_is_kept_as_it_is_whatever_the_config_says(tmp_path, desc_act):
    tensors = module(K=96, group_size=64, act=True)
    weight = read(tmp_path, tensors, group_size=64, desc_act=desc_act)
    assert torch.equal(weight.g_idx, tensors["m.q.g_idx"])


@pytest.mark.parametrize("kind", ["trivial", "zero"])
def test_a_g_idx_without_order_is_none(tmp_path, kind):
    tensors = module(K=96, group_size=64)
    if kind == "zero":
        tensors["m.q.g_idx"].zero_()
    assert read(tmp_path, tensors, group_size=64, desc_act=True).g_idx is None


@pytest.mark.parametrize(
    ("changes", "valid"),
    [
        ({"desc_act": False}, True),
        ({"desc_act": True}, False),
        ({"desc_act": True, "static_groups": True}, True),
        ({"desc_act": True, "group_size": -1}, True),
    ],
)
def test_g_idx_may_be_absent_unless_it_alone_has_the_order(tmp_path, changes, valid):
    tensors = module(group_size=changes.get("group_size", 32))
    del tensors["m.q.g_idx"]
    write(tmp_path, tensors, **changes)
    if valid:
        assert open_gptq(tmp_path).read("m.q").g_idx is None
    else:
        with pytest.raises(CheckpointError, match=r"tensor m\.q\.g_idx is missing.*desc_act=true and group_size=32"):
            open_gptq(tmp_path)


def test_bias_is_read(tmp_path):
    tensors = module(bias=True)
    checkpoint = open_gptq(write(tmp_path, tensors))
    assert torch.equal(checkpoint.read("m.q").bias, tensors["m.q.bias"])
    assert checkpoint.dense == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype(tmp_path, dtype):
    tensors = module()
    tensors["m.q.scales"] = tensors["m.q.scales"].to(dtype)
    assert read(tmp_path, tensors).scales.dtype == dtype


def edited(name, change):
    return lambda tensors: tensors.update({f"m.q.{name}": change(tensors[f"m.q.{name}"])})


def removed(name):
    return lambda tensors: tensors.pop(f"m.q.{name}")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (removed("qweight"), r"tensor m\.q\.qweight is missing"),
        (removed("scales"), r"tensor m\.q\.scales is missing"),
        (edited("qweight", lambda t: t.long()), r"tensor m\.q\.qweight must have dtype I32; got I64"),
        (edited("qzeros", lambda t: t.short()), r"tensor m\.q\.qzeros must have dtype I32; got I16"),
        (edited("g_idx", lambda t: t.long()), r"tensor m\.q\.g_idx must have dtype I32; got I64"),
        (edited("scales", lambda t: t.double()), r"tensor m\.q\.scales must have dtype F16 or BF16 or F32; got F64"),
        (edited("bias", lambda t: t.int()), r"tensor m\.q\.bias must have dtype F16 or BF16 or F32; got I32"),
        (edited("qweight", lambda t: t[0]), r"tensor m\.q\.qweight must have shape \(K\*bits/32, N\).*got \(32,\)"),
        (edited("qweight", lambda t: t[:0]), r"tensor m\.q\.qweight must have shape .*got \(0, 32\)"),
        (
            edited("qweight", lambda t: t[:, :31].contiguous()),
            r"m\.q\.qweight must have N, a multiple of 8 for bits=4, columns; got 31",
        ),
        (
            edited("qweight", lambda t: t[:7].contiguous()),
            r"m\.q\.g_idx must have shape \(K,\) = \(56,\) for K=56, N=32, bits=4, group_size=32; got \(64,\)",
        ),
        (edited("g_idx", lambda t: t[:63].contiguous()), r"m\.q\.g_idx must have shape \(K,\) = \(64,\).*got \(63,\)"),
        (
            edited("scales", lambda t: t[:1].contiguous()),
            r"m\.q\.scales must have shape \(ceil\(K/group_size\), N\) = \(2, 32\).*got \(1, 32\)",
        ),
        (
            edited("qzeros", lambda t: t[:, :3].contiguous()),
            r"m\.q\.qzeros must have shape \(ceil\(K/group_size\), N\*bits/32\) = \(2, 4\).*got \(2, 3\)",
        ),
        (edited("bias", lambda t: t[:16].contiguous()), r"m\.q\.bias must have shape \(N,\) = \(32,\).*got \(16,\)"),
    ],
)
def test_wrong_headers_are_refused_when_opening_naming_file_and_tensor(tmp_path, edit, message):
    tensors = module(bias=True)
    edit(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_gptq(write(tmp_path, tensors))
    assert str(caught.value).startswith(str(tmp_path / "model.safetensors"))


def test_3_bit_rows_come_in_runs_of_three_words(tmp_path):
    tensors = module(bits=3)
    tensors["m.q.qweight"] = tensors["m.q.qweight"][:5].contiguous()
    with pytest.raises(CheckpointError, match=r"rows in runs of 3 for bits=3; got \(5, 32\)"):
        open_gptq(write(tmp_path, tensors, bits=3))


def test_a_wrong_width_is_seen_from_the_shapes(tmp_path):
    with pytest.raises(CheckpointError, match=r"qzeros must have shape .* = \(1, 8\) for K=32, N=32, bits=8"):
        open_gptq(write(tmp_path, module(bits=4), bits=8))


@pytest.mark.parametrize("value", [-1, 2, 1000])
def test_g_idx_out_of_range_is_refused(tmp_path, value):
    tensors = module(act=True)
    tensors["m.q.g_idx"][5] = value
    with pytest.raises(
        CheckpointError, match=r"safetensors: tensor m\.q\.g_idx must lie in \[0, G\) = \[0, 2\); got"
    ) as e:
        read(tmp_path, tensors, desc_act=True)
    assert str(value) in str(e.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_not_finite_are_refused(tmp_path, value):
    tensors = module()
    tensors["m.q.scales"][1, 7] = value
    with pytest.raises(CheckpointError, match=rf"tensor m\.q\.scales must be finite; got {value} at \[1, 7\]"):
        read(tmp_path, tensors)


def test_a_weight_beside_a_quantized_one_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"tensor m\.q\.weight must not exist beside m\.q\.qweight"):
        open_gptq(write(tmp_path, module() | {"m.q.weight": torch.ones(2)}))


def test_a_checkpoint_without_quantized_modules_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"must have quantized modules, tensors NAME\.qweight; found none"):
        open_gptq(write(tmp_path, {"a.weight": torch.ones(2), "scales": torch.ones(2), "b.scales": torch.ones(2)}))


def test_names_that_do_not_exist_are_refused(tmp_path):
    checkpoint = open_gptq(write(tmp_path, module()))
    with pytest.raises(CheckpointError, match=r"no quantized module 'x'; there are 1"):
        checkpoint.read("x")
    with pytest.raises(CheckpointError, match=r"no tensor 'x'; there are 4"):
        checkpoint.read_tensor("x")
    weights = checkpoint.weights()
    with pytest.raises(KeyError, match="x"):
        weights["x"]
    assert "x" not in weights
    assert list(weights) == ["m.q"]
    assert len(weights) == 1


def test_weights_is_lazy_and_a_broken_module_does_not_hide_the_others(tmp_path):
    tensors = module("a") | module("b")
    tensors["a.scales"][0, 0] = float("nan")
    weights = open_gptq(write(tmp_path, tensors)).weights()
    assert weights["b"].bits == 4
    with pytest.raises(CheckpointError, match=r"a\.scales"):
        weights["a"]


def test_dense_tensors_keep_their_values(tmp_path):
    dense = {"norm.weight": torch.arange(5).bfloat16(), "emb.weight": torch.randn(3, 4), "flag": torch.tensor([True])}
    checkpoint = open_gptq(write(tmp_path, module() | dense))
    assert set(checkpoint.dense) == set(dense)
    assert checkpoint.weight_bytes == sum(t.nbytes for t in (module() | dense).values())
    for name, tensor in dense.items():
        assert torch.equal(checkpoint.read_tensor(name), tensor)


def test_what_is_read_survives_the_file(tmp_path):
    """No tensor maps the file: overwriting it in place changes nothing and does not crash."""
    tensors = module(bias=True, act=True)
    checkpoint = open_gptq(write(tmp_path, tensors, desc_act=True))
    weight, raw = checkpoint.read("m.q"), checkpoint.read_tensor("m.q.scales")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    for name in ("qweight", "scales", "g_idx", "bias"):
        assert torch.equal(getattr(weight, name), tensors[f"m.q.{name}"])
    assert torch.equal(raw, tensors["m.q.scales"])


def test_read_gptq_reads_all_and_is_silent_off_a_terminal(tmp_path, capfd):
    directory = write(tmp_path, module("a") | module("b"))
    weights = read_gptq(directory)
    assert list(weights) == ["a", "b"]
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_progress_goes_to_stderr_of_a_terminal_unless_switched_off(tmp_path, capsys, monkeypatch):
    directory = write(tmp_path, module("a"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    read_gptq(directory, progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    read_gptq(directory)
    captured = capsys.readouterr()
    assert "Reading" in captured.err
    assert captured.out == ""


def test_the_weight_decodes_to_scale_times_q_minus_z(tmp_path):
    gen = torch.Generator().manual_seed(3)
    q, z = torch.randint(0, 8, (96, 32), generator=gen), torch.randint(0, 8, (3, 32), generator=gen)
    scales = torch.rand(3, 32, generator=gen).half()
    g_idx = torch.randint(0, 3, (96,), generator=gen).int()
    tensors = {"m.q.qweight": pack(q, 3), "m.q.qzeros": pack(z.t(), 3).t().contiguous(), "m.q.scales": scales}
    weight = read(
        tmp_path, tensors | {"m.q.g_idx": g_idx}, bits=3, sym=False, desc_act=True, checkpoint_format="gptq_v2"
    )
    assert torch.equal(decode(weight), scales.double()[g_idx.long()] * (q - z[g_idx.long()]).double())


def test_meta_device_is_where_it_is_asked_for(tmp_path):
    checkpoint = open_gptq(write(tmp_path, module(bias=True, act=True), desc_act=True))
    weight = checkpoint.read("m.q", "meta")
    assert {t.device.type for t in (weight.qweight, weight.qzeros, weight.scales, weight.g_idx, weight.bias)} == {
        "meta"
    }
