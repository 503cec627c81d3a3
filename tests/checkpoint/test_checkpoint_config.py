"""Parsing of quantization configs."""

from __future__ import annotations

import json
import re
import warnings

import pytest

from checkpoint.builder import module, quantization, write
from exllama_ops.checkpoint import CheckpointError, GptqConfig, ModuleConfig, open_gptq
from exllama_ops.checkpoint.config import parse_config, read_config
from exllama_ops.layout.formats import SUPPORTED_BITS


def put(directory, config=None, quantize_config=None):
    if config is not None:
        (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    if quantize_config is not None:
        (directory / "quantize_config.json").write_text(json.dumps(quantize_config))
    return directory


def test_every_field_is_read():
    raw = {
        "quant_method": "gptq",
        "bits": 3,
        "group_size": -1,
        "sym": False,
        "desc_act": True,
        "static_groups": True,
        "lm_head": True,
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
        "dynamic": {"lm_head": {"bits": 8}},
        "damp_percent": 0.1,
    }
    assert parse_config(raw, "test") == GptqConfig(
        bits=3,
        group_size=-1,
        sym=False,
        desc_act=True,
        static_groups=True,
        lm_head=True,
        checkpoint_format="gptq_v2",
        dynamic={"lm_head": {"bits": 8}},
    )


def test_missing_fields_have_the_defaults_of_the_other_tools():
    assert parse_config({"bits": 4, "group_size": 128}, "test") == GptqConfig(
        bits=4, group_size=128, sym=True, desc_act=False, static_groups=False, lm_head=False, checkpoint_format="gptq"
    )


@pytest.mark.parametrize("name", ["checkpoint_format", "format"])
def test_both_names_of_the_format_are_read(name):
    assert parse_config(quantization(**{name: "gptq_v2"}), "test").checkpoint_format == "gptq_v2"


def test_static_groups_may_stand_in_meta():
    assert parse_config(quantization(meta={"static_groups": True}), "test").static_groups


@pytest.mark.parametrize("file", ["config", "quantize_config"])
def test_either_file_is_enough(tmp_path, file):
    assert read_config(put(tmp_path, **{file: quantization(bits=8)})).bits == 8


def test_config_json_wins_and_a_contradiction_is_told(tmp_path):
    put(tmp_path, quantization(desc_act=True), quantization(bits=8))
    with pytest.warns(UserWarning, match=r"config.json: .*quantize_config.json contradict.*bits is 4 and 8"):
        config = read_config(tmp_path)
    assert (config.bits, config.desc_act) == (4, True)


def test_a_field_that_config_json_lacks_comes_from_quantize_config_json(tmp_path):
    put(tmp_path, quantization(), quantization(format="gptq_v2", dynamic={"a": {"bits": 8}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = read_config(tmp_path)
    assert (config.checkpoint_format, config.dynamic) == ("gptq_v2", {"a": {"bits": 8}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, r"test: quant_method must be 'gptq'; got 'awq'"),
        ({"quant_method": ..., "method": "qqq"}, r"quant_method must be 'gptq'; got 'qqq'"),
        ({"method": "awq"}, r"quant_method and method must agree; got .*'gptq'.*'awq'"),
        ({"pack_dtype": "int64"}, r"pack_dtype must be int32.*; got 'int64'"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format must be one of .*; got 'marlin'"),
        ({"is_marlin_format": True}, r"checkpoint_format must be one of .*; got 'marlin'"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, r"checkpoint_format and format must agree; got"),
        ({"bits": 5}, rf"bits must be one of {re.escape(str(SUPPORTED_BITS))}; got 5"),
        ({"bits": "5"}, rf"bits must be one of {re.escape(str(SUPPORTED_BITS))}; got 5"),
        ({"bits": "four"}, r"bits must be one of .*; got 'four'"),
        ({"bits": 4.5}, r"bits must be one of .*; got 4\.5"),
        ({"wbits": 8}, r"bits and wbits must agree; got bits=4, wbits=8"),
        ({"bits": ...}, r"field bits is missing"),
        ({"group_size": ...}, r"field group_size is missing"),
        ({"group_size": 0}, r"group_size must be at least 1 and below 2\*\*31, or -1 .*; got 0"),
        ({"group_size": True}, r"group_size must be at least 1 and .*; got True"),
        ({"group_size": 2**31}, r"group_size must be .* below 2\*\*31.*; got 2147483648"),
        ({"group_size": [10**30] * 9}, r"group_size must be at least 1 .*; got \[.*, \.\.\.\]"),
        ({"sym": 1}, r"sym must be true or false; got 1"),
        ({"desc_act": "no"}, r"desc_act must be true or false; got 'no'"),
        ({"dynamic": ["a"]}, r"dynamic must be a JSON object of rules; got \['a'\]"),
        ({"dynamic": {"+:(": {}}}, r"dynamic rule '\+:\(': must be a regular expression"),
        ({"dynamic": {"a": 8}}, r"dynamic rule 'a': must map to a JSON object; got 8"),
        ({"dynamic": {"a": {"bits": 6}}}, r"dynamic rule 'a': bits must be one of .*; got 6"),
        ({"dynamic": {"a": {"pack_dtype": "int8"}}}, r"dynamic rule 'a': pack_dtype must be int32.*; got 'int8'"),
        ({"dynamic": {"a": {"sym": "maybe"}}}, r"dynamic rule 'a': sym must be true or false; got 'maybe'"),
        ({"dynamic": {"a": {"format": "gptq_v2"}}}, r"dynamic rule 'a': format must be the same for all modules"),
    ],
)
def test_unsupported_or_contradicting_fields_are_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        parse_config(quantization(**changes), "test")


@pytest.mark.parametrize(
    ("changes", "same_as"),
    [
        ({"bits": "4", "group_size": "32"}, {}),
        ({"bits": 4.0, "group_size": 32.0}, {}),
        ({"bits": " 8.0 ", "group_size": "-1"}, {"bits": 8, "group_size": -1}),
        ({"sym": "False", "desc_act": "true", "lm_head": "TRUE"}, {"sym": False, "desc_act": True, "lm_head": True}),
        ({"sym": None, "desc_act": None, "lm_head": None, "dynamic": None, "pack_dtype": None}, {"sym": True}),
        ({"bits": ..., "wbits": 8, "group_size": ..., "groupsize": "64"}, {"bits": 8, "group_size": 64}),
        ({"desc_act": ..., "act_order": True}, {"desc_act": True}),
        ({"wbits": "4", "quant_method": "GPTQ"}, {}),
        (
            {"dynamic": {"a": {"bits": "8", "group_size": None, "quant_method": "gptq", "format": "gptq"}}},
            {"dynamic": {"a": {"bits": 8}}},
        ),
    ],
)
def test_fields_are_read_as_what_they_say(changes, same_as):
    assert parse_config(quantization(**changes), "test") == parse_config(quantization(**same_as), "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json: must be JSON"),
        ("[]", r"config\.json: must hold a JSON object; got list"),
        ('{"quantization_config": 4}', r"config\.json: quantization_config: must be a JSON object; got int"),
        ('{"model_type": "llama"}', r"not a GPTQ checkpoint"),
    ],
)
def test_broken_config_json_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_first_dynamic_rule_that_matches_from_the_start_decides():
    config = parse_config(
        quantization(
            dynamic={
                r"-:.*\.7\.": None,
                r"-:.*\.0\.": {},
                r"+:.*\.(0|1)\.mlp": {"bits": 8, "group_size": 64, "mse": 2.4},
                r".*\.1\.": {"bits": 3, "sym": False, "desc_act": True},
                r"head": {"bits": 2},
            }
        ),
        "test",
    )
    plain = ModuleConfig(bits=4, group_size=32, sym=True, desc_act=False)
    assert config.for_module("model.layers.0.mlp.up_proj") is None
    assert config.for_module("model.layers.7.mlp.up_proj") is None
    assert config.for_module("model.layers.1.mlp.up_proj") == ModuleConfig(bits=8, group_size=64)
    assert config.for_module("model.layers.1.attn.q") == ModuleConfig(bits=3, group_size=32, sym=False, desc_act=True)
    assert config.for_module("lm_head") == plain  # matched from the start of the name, not anywhere in it
    assert config.for_module("head.x") == ModuleConfig(bits=2, group_size=32)
    assert config.for_module("model.layers.2.mlp.up_proj") == plain


def test_dynamic_rules_reach_the_weights(tmp_path):
    tensors = module("a.q") | module("a.head", bits=8, group_size=16) | module("b.q", bits=3, sym=False)
    rules = {r"+:.*head$": {"bits": 8, "group_size": 16}, r"b\.": {"bits": 3, "sym": False}}
    checkpoint = open_gptq(write(tmp_path, tensors, dynamic=rules))
    kinds = {name: (weight.bits, weight.group_size) for name, weight in checkpoint.weights().items()}
    assert kinds == {"a.q": (4, 32), "a.head": (8, 16), "b.q": (3, 32)}


def test_a_skipped_module_may_be_dense_but_not_quantized(tmp_path):
    tensors = module("a.q") | {"b.q.weight": tensors_of_b()}
    assert open_gptq(write(tmp_path / "dense", tensors, dynamic={"-:b": {}})).dense == ("b.q.weight",)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor a\.q\.qweight must not exist: the quantization config says"
    ):
        open_gptq(write(tmp_path / "quantized", tensors, dynamic={"-:a": {}}))


def tensors_of_b():
    return module("b")["b.scales"]
