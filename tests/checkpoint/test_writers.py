"""Checkpoints of AutoRound, AutoAWQ and compressed-tensors, against what these tools dequantize."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.builder import DATA, decode, module, write
from exllama_ops import CheckpointError, open_checkpoint

WRITERS = DATA / "writers"
FOLDERS = {
    "autoawq-gemm": "awq",
    "autoround-asym": "auto-round",
    "autoround-awq": "auto-round",
    "autoround-gptq": "auto-round",
    "autoround-gptq-asym": "auto-round",
    "compressed-tensors": "compressed-tensors",
    "compressed-tensors-0.12.2": "compressed-tensors",
}
DOWN, UP, K_PROJ = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj"


def changed(directory, folder, config=None, tensors=None):
    """A copy of a folder, with other fields in its quantization config and other tensors; None takes one away."""
    shutil.copytree(WRITERS / folder, directory, dirs_exist_ok=True)
    path = directory / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"] = {
        key: value for key, value in (values["quantization_config"] | (config or {})).items() if value is not None
    }
    path.write_text(json.dumps(values))
    if tensors:
        stored = load_file(directory / "model.safetensors") | tensors
        save_file({k: v for k, v in stored.items() if v is not None}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("folder", FOLDERS)
def test_weights_are_bit_for_bit_what_the_tool_dequantizes(folder):
    checkpoint = open_checkpoint(WRITERS / folder)
    assert checkpoint.format == FOLDERS[folder]
    reference = load_file(WRITERS / folder / "ref" / "reference.safetensors")
    assert len(reference) >= 3
    for key, want in reference.items():
        name = key.removesuffix(".w_dequant")
        weight, summary = checkpoint.read(name), checkpoint.summary(name)
        # Exact in float64, then the one rounding that the tool has too.
        assert torch.equal(decode(weight).to(want.dtype), want), name
        assert (summary.in_features, summary.out_features) == tuple(want.shape)
        assert (summary.bits, summary.group_size) == (weight.bits, weight.group_size)
        assert (summary.num_groups, summary.bias) == (weight.scales.shape[0], weight.bias is not None)
        assert summary.act_order == (weight.g_idx is not None)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_tensor_is_of_a_module_or_dense(folder):
    checkpoint = open_checkpoint(WRITERS / folder)
    stored = load_file(WRITERS / folder / "model.safetensors")
    kept = {name for name in checkpoint.dense if name.endswith(("norm.weight", "embed_tokens.weight"))}
    linear = {name.rpartition(".")[0] for name in set(checkpoint.dense) - kept}
    assert len(kept) == 4
    assert linear | set(checkpoint.quantized) == {name.rpartition(".")[0] for name in set(stored) - kept}
    assert not linear & set(checkpoint.quantized)
    assert checkpoint.weight_bytes == sum(tensor.nbytes for tensor in stored.values())
    for name in checkpoint.dense:
        assert torch.equal(checkpoint.read_tensor(name), stored[name])
        assert (checkpoint.tensor_shape(name), checkpoint.tensor_dtype(name)) == (
            stored[name].shape,
            stored[name].dtype,
        )


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_quantization_config_is_kept_as_the_file_has_it(folder):
    raw = json.loads((WRITERS / folder / "config.json").read_text())["quantization_config"]
    assert open_checkpoint(WRITERS / folder).quantization == raw


def test_a_name_in_extra_config_decides_before_expressions_and_matches_nothing_else(tmp_path):
    tensors = module("m.gate") | module("m.gate_proj", bits=8) | module("m.up", bits=2)
    extra = {
        ".*gate.*": {"bits": 8},
        "m.gate": {"bits": 4},
        "u[pq]$": {"bits": 2},
        "gate_proj": {},
        "gone": {"bits": 16},
    }
    path = write(tmp_path, tensors, quant_method="auto-round", extra_config=extra)
    checkpoint = open_checkpoint(path)
    assert {name: checkpoint.summary(name).bits for name in checkpoint.quantized} == {
        "m.gate": 4,
        "m.gate_proj": 8,
        "m.up": 2,
    }


def test_alternatives_in_extra_config_are_found_anywhere_in_a_name(tmp_path):
    tensors = module("m.one", bits=8) | module("m.two", bits=8) | module("m.three")
    path = write(tmp_path, tensors, quant_method="auto-round", extra_config={"one|two": {"bits": 8}})
    checkpoint = open_checkpoint(path)
    assert [checkpoint.summary(name).bits for name in ("m.one", "m.two", "m.three")] == [8, 8, 4]


@pytest.mark.parametrize(("packing", "zeros"), [("auto_round", "gptq_v2"), ("auto_round:auto_gptq", "gptq")])
def test_the_packing_format_says_how_zero_points_are_stored(tmp_path, packing, zeros):
    tensors = module(sym=False, fmt=zeros)
    checkpoint = open_checkpoint(write(tmp_path, tensors, quant_method="auto-round", sym=False, packing_format=packing))
    assert checkpoint.summary("m.q").zero_format == zeros
    want = module(sym=False, fmt="gptq_v2")["m.q.qzeros"]
    assert torch.equal(checkpoint.read("m.q").qzeros, want)


def test_names_decide_before_expressions_and_these_before_linear(tmp_path):
    def group(bits, *targets):
        weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
        return {"targets": list(targets), "weights": weights, "input_activations": None}

    groups = {"a": group(4, "Linear", "re:model"), "b": group(3, UP), "c": group(2, "re:.*down"), "d": None}
    groups["d"] = group(8, "re:.*k_proj") | {
        "weights": {"num_bits": 8, "symmetric": False, "strategy": "channel", "type": "int"}
    }
    groups["a"]["weights"]["symmetric"] = True
    groups["e"] = group(8, "re:.*gate_proj") | {"weights": {"num_bits": 8, "group_size": -1}}
    checkpoint = open_checkpoint(changed(tmp_path, "compressed-tensors", {"config_groups": groups}))
    original = open_checkpoint(WRITERS / "compressed-tensors")
    for name in original.quantized:
        assert checkpoint.summary(name) == original.summary(name)


def test_an_order_that_was_never_filled_in_means_runs_of_rows(tmp_path):
    stored = load_file(WRITERS / "compressed-tensors-0.12.2" / "model.safetensors")
    unfilled = torch.full_like(stored[f"{DOWN}.weight_g_idx"], -1)
    path = changed(tmp_path, "compressed-tensors-0.12.2", tensors={f"{DOWN}.weight_g_idx": unfilled})
    weight, ordered = (open_checkpoint(folder).read(DOWN) for folder in (path, WRITERS / "compressed-tensors-0.12.2"))
    assert weight.g_idx is None
    assert torch.equal(weight.qweight, ordered.qweight)


def test_a_quantized_cache_is_left_out_with_a_warning(tmp_path):
    scale = {"model.layers.0.self_attn.k_scale": torch.ones(1), "model.layers.0.self_attn.v_scale": torch.ones(1)}
    path = changed(tmp_path, "compressed-tensors", {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, scale)
    with pytest.warns(UserWarning, match="kv_cache_scheme is left out") as seen:
        checkpoint = open_checkpoint(path)
    assert [warning.filename for warning in seen] == [__file__]
    assert checkpoint.dense == open_checkpoint(WRITERS / "compressed-tensors").dense


def test_old_files_of_compressed_tensors_have_a_compression_config(tmp_path):
    path = changed(tmp_path, "compressed-tensors") / "config.json"
    path.write_text(path.read_text().replace("quantization_config", "compression_config"))
    assert open_checkpoint(tmp_path).format == "compressed-tensors"


def test_what_is_said_of_a_config_is_for_gptq_alone(tmp_path):
    with pytest.raises(CheckpointError, match=r"is a checkpoint of awq, .* give the folder alone; got group_size$"):
        open_checkpoint(WRITERS / "autoawq-gemm", quantization_config={"group_size": 32})


AWQ, AUTOROUND, GROUPS = "autoawq-gemm", "autoround-gptq", "compressed-tensors"


def grouped(weights=None, **changes):
    settings = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"config_groups": {"g": {"targets": ["Linear"], "weights": settings | (weights or {})} | changes}}


@pytest.mark.parametrize(
    ("folder", "config", "text"),
    [
        (AWQ, {"version": "gemv"}, "version must be 'gemm', the one layout of AutoAWQ that is read here; got 'gemv'."),
        (AWQ, {"bits": 8}, "bits must be 4 in the layout of AutoAWQ; got 8"),
        (AWQ, {"zero_point": "yes"}, "zero_point must be true or false; got 'yes'"),
        (AWQ, {"group_size": None}, "field group_size is missing"),
        (AUTOROUND, {"packing_format": "auto_round:fp8"}, "packing_format must be one of .*; got 'auto_round:fp8'"),
        (AUTOROUND, {"data_type": "mx_fp"}, "data_type must be int, the numbers that GPTQ has; got 'mx_fp'"),
        (AUTOROUND, {"act_bits": 8}, "act_bits must be 16, activations as they are; got 8"),
        (AUTOROUND, {"super_bits": 6}, "super_bits must be absent, as GPTQ has no such thing; got 6"),
        (AUTOROUND, {"bits": 5}, r"bits must be one of \(2, 3, 4, 8\); got 5"),
        (AUTOROUND, {"extra_config": {"a(": {"bits": 2}}}, "extra_config: rule .* must be a regular expression"),
        (AUTOROUND, {"extra_config": {"a": 2}}, "extra_config of 'a': must be a JSON object; got 2"),
        (AUTOROUND, {"extra_config": {"a": {"act_bits": 8}}}, "extra_config of 'a': act_bits must be 16"),
        (GROUPS, {"config_groups": {}}, "config_groups must be a JSON object of groups; got {}"),
        (GROUPS, {"format": "nvfp4-pack-quantized"}, "format must be 'pack-quantized', .*; got 'nvfp4-pack-quantized'"),
        (GROUPS, grouped(format="float-quantized"), "of 'g': format must be .*; got 'float-quantized'"),
        (GROUPS, grouped(input_activations={"num_bits": 8}), "input_activations must be null, activations as they are"),
        (GROUPS, grouped({"num_bits": 6}), r"num_bits must be one of \(2, 3, 4, 8\); got 6"),
        (GROUPS, grouped({"type": "float"}), "type must be 'int'; got 'float'"),
        (GROUPS, grouped({"strategy": "tensor"}), "strategy must be 'group' or 'channel', .*; got 'tensor'"),
        (GROUPS, grouped({"group_size": None}), "group_size must be at least 1 and below .*; got None"),
        (GROUPS, grouped({"dynamic": True}), "dynamic must be false; got True"),
        (GROUPS, grouped({"actorder": "any"}), "actorder must be null or one of .*; got 'any'"),
        (GROUPS, {"ignore": "lm_head"}, "ignore must be a JSON array of names; got 'lm_head'"),
        (GROUPS, {"ignore": ["re:("]}, "rule .* must be a regular expression"),
        (GROUPS, {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config must be absent"),
        (GROUPS, {"transform_config": {"config_groups": {"u": {}}}}, "transform_config must be absent"),
    ],
)
def test_a_config_that_is_not_read_is_refused_by_its_field(tmp_path, folder, config, text):
    path = changed(tmp_path, folder, config)
    start = rf"^{re.escape(str(path))}: no checkpoint format takes it\. {FOLDERS[folder]}: [^|]*config\.json"
    with pytest.raises(CheckpointError, match=rf"{start}: quantization_config[^|]*{text}[^|]*$"):
        open_checkpoint(path)


INT, HALF = torch.int32, torch.float16


@pytest.mark.parametrize(
    ("folder", "tensors", "text"),
    [
        (AWQ, {f"{UP}.scales": None}, f"tensor {UP}.scales is missing"),
        (AWQ, {f"{UP}.qzeros": None}, f"tensor {UP}.qzeros is missing: only zero_point=false"),
        (AWQ, {f"{UP}.weight": torch.zeros(96, 64)}, f"tensor {UP}.weight must not exist beside {UP}.qweight"),
        (AWQ, {f"{UP}.qweight": torch.zeros(64, 12)}, f"tensor {UP}.qweight must have dtype I32; got F32"),
        (AWQ, {f"{UP}.qweight": torch.zeros(60, 12, dtype=INT)}, r"must have shape \(K, N/8\), K a multiple of 8; got"),
        (
            AWQ,
            {f"{UP}.scales": torch.zeros(3, 96, dtype=HALF)},
            r"scales must have shape .* = \(2, 96\) for K=64",
        ),
        (GROUPS, {f"{UP}.weight_scale": None}, f"tensor {UP}.weight_scale is missing"),
        (GROUPS, {f"{UP}.weight_zero_point": None}, "weight_zero_point is missing: symmetric is false"),
        (GROUPS, {f"{UP}.weight_packed": torch.zeros(2, 96, 6, dtype=INT)}, "one layer; got"),
        (GROUPS, {f"{UP}.weight_packed": torch.zeros(96, 5, dtype=INT)}, r"= \(96, 6\) or \(96, 7\) for K=64"),
        (GROUPS, {f"{DOWN}.weight_zero_point": torch.zeros(5, 3, dtype=INT)}, r"= \(4, 3\) for K=96, N=64, bits=2"),
        (
            GROUPS,
            {f"{UP}.weight_shape": torch.tensor([95, 64])},
            r"must be \(N, K\) with N=96; got \(95, 64\)",
        ),
        (
            GROUPS,
            {f"{UP}.weight_shape": torch.tensor([96, 63])},
            "cannot be stored as GPTQ: K must .* of 32, the",
        ),
        (
            GROUPS,
            {"lm_head.weight": None, "lm_head.weight_packed": torch.zeros(32, 8, dtype=INT)},
            "must not exist: the q",
        ),
    ],
)
def test_headers_that_contradict_are_refused_before_data_is_read(tmp_path, folder, tensors, text):
    path = changed(tmp_path, folder, tensors=tensors)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}/model\.safetensors: .*{text}"):
        open_checkpoint(path)


def test_a_module_that_no_target_fits_is_refused_by_name(tmp_path):
    groups = grouped(targets=["FalconLinear"])
    path = changed(tmp_path, "compressed-tensors", groups)
    with pytest.raises(CheckpointError, match=r"module 'model\..*' must have a target: .*; got 'FalconLinear'$"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("folder", "tensor", "value", "text"),
    [
        (AWQ, f"{UP}.scales", float("inf"), r"must be finite; got inf at \[0, 0\]"),
        (GROUPS, f"{UP}.weight_scale", float("nan"), r"must be finite; got nan at \[0, 0\]"),
        ("compressed-tensors-0.12.2", f"{DOWN}.weight_g_idx", 3, r"must lie in \[0, G\) = \[0, 3\)"),
    ],
)
def test_data_that_is_wrong_is_told_with_the_name_in_the_file(tmp_path, folder, tensor, value, text):
    stored = load_file(WRITERS / folder / "model.safetensors")[tensor]
    stored.view(-1)[0] = value
    checkpoint = open_checkpoint(changed(tmp_path, folder, tensors={tensor: stored}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {re.escape(tensor)} {text}"):
        checkpoint.read(tensor.rpartition(".")[0])


def test_symmetric_weights_of_autoawq_may_lack_zero_points(tmp_path):
    stored = load_file(WRITERS / AWQ / "model.safetensors")
    zeros = {name: None for name in stored if name.endswith(".qzeros")}
    checkpoint = open_checkpoint(changed(tmp_path, AWQ, {"zero_point": False}, zeros))
    assert checkpoint.summary(UP).sym
    assert (checkpoint.read(UP).qzeros == -2004318072).all()  # 0x88888888


def test_zero_points_that_a_file_has_are_read_whatever_its_config_says(tmp_path):
    stored = load_file(WRITERS / AWQ / "model.safetensors")
    sevens = torch.full_like(stored[f"{UP}.qzeros"], 0x77777777)  # which symmetric GPTQ files of v1 have for 8
    weight = open_checkpoint(changed(tmp_path, AWQ, {"zero_point": False}, {f"{UP}.qzeros": sevens})).read(UP)
    assert torch.equal(weight.qzeros, sevens)


@pytest.mark.parametrize("name", ["model.gguf", ""])
def test_gguf_files_are_sent_to_convert(tmp_path, name):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"`exllama-ops convert FILE\.gguf DST` writes a GPTQ checkpoint"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("folder", ["autoround-gptq", "autoawq-gemm", "compressed-tensors-0.12.2"])
def test_a_loaded_model_computes_what_the_dequantized_one_computes(folder):
    transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')
    from exllama_ops import load_model

    checkpoint = open_checkpoint(WRITERS / folder)
    config = json.loads((WRITERS / folder / "config.json").read_text())
    del config["quantization_config"]
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float()
    state = {name: checkpoint.read_tensor(name).float() for name in checkpoint.dense}
    for name, weight in checkpoint.weights().items():
        state[f"{name}.weight"] = decode(weight).float().t().contiguous()
        if weight.bias is not None:
            state[f"{name}.bias"] = weight.bias.float()
    dense.load_state_dict(state)
    ids = torch.arange(3, 11).unsqueeze(0)
    with torch.no_grad():
        want = dense(ids).logits
        logits = load_model(WRITERS / folder, torch.float32, progress=False)(ids).logits
    assert ((logits - want).norm() / want.norm()).item() < 1e-4
