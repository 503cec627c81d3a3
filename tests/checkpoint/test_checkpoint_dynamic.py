"""The rules of `dynamic` decide as `re.match` does, and whatever they say, an answer comes."""

from __future__ import annotations

import re
import sys

import pytest

from checkpoint.builder import module, quantization, write
from exllama_ops.checkpoint import CheckpointError, dynamic, open_gptq
from exllama_ops.checkpoint.config import parse_config
from exllama_ops.checkpoint.dynamic import first_matches

pytestmark = pytest.mark.usefixtures("no_hang")

NAMES = [
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.10.mlp.experts.3.up_proj",
    "model.layers.18.mlp.gate_proj",
    "model.layers.18.mlp.shared_expert_gate",
    "visual.blocks.1.attn.qkv",
    "a.b\n",
]
# What GPTQModel's documents and published configs have, and what else `re` knows.
EXPRESSIONS = [
    r".*\.18\..*gate.*",
    r".*\.(0|1)\..*(q|k|v|o)_proj",
    r".*down_proj",
    r"lm_head",
    r"^lm_head$",
    r"^model\.layers\.1\.mlp\.down_proj$",
    r"^a\.b$",
    r"^a.b$",
    r"model\.layers\.1",
    r"visual",
    r"",
    r"^$",
    r".*shared_expert",
    r"^(?!.*(experts|visual)).*proj$",
    r".*layers\.\d+\.mlp\.(?:up|down|gate)_proj",
    r".*layers\.(?P<layer>1\d?)\..*_proj\Z",
    r".*layers\.[0-9]{2}\.",
    r"(?i).*LAYERS\.0",
    r"(?s:.*)b.$",
    r".*(?<=layers\.1)8\b",
    r"(.)(.*)\1",
    r"model\.layers\.(1[0-8]|[3-9])\..*",
    r"[^v].*?attn",
    r"\w+(\.\w+){4,}",
]
SLOW = r"((a{1,100}){1,100}){1,100}x"
LONG_NAME = "a" * 40 + "yx"


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("prefix", ["", "+:", "-:"])
def test_a_rule_matches_what_re_matches(prefix, expression):
    rule = prefix + expression
    assert first_matches([rule], NAMES) == {name: rule for name in NAMES if re.match(expression, name)}


def test_the_first_rule_decides_whoever_matches_it():
    rules = [r"^lm_head$", r".*head", r"-:(?!model).*", r".*\.1\.", r"^model\.layers\.1\.mlp\.down_proj$"]
    expected = {name: next((rule for rule in rules if re.match(rule.removeprefix("-:"), name)), None) for name in NAMES}
    assert len(set(expected.values())) == 4
    assert first_matches(rules, NAMES) == {name: rule for name, rule in expected.items() if rule}


def test_for_module_and_for_modules_agree():
    rules = {r".*\.18\.": {"bits": 8}, r"-:(visual|a)+": {}, r"^lm_head$": {"bits": 3, "group_size": 64}}
    config = parse_config(quantization(dynamic=rules), "test")
    configs = config.for_modules(NAMES)
    assert configs == {name: config.for_module(name) for name in NAMES}
    assert [None if kind is None else kind.bits for kind in configs.values()] == [3, 4, 4, 4, 8, 8, None, None]


@pytest.mark.parametrize("rule", [r"-:(a+)+$x", r"-:(a|a)*$", r"-:(a|aa)+$b", r"-:(.*)*,", r"-:(?:a?){25}a{25}$"])
def test_rules_that_take_re_for_ever_are_answered_or_refused(tmp_path, monkeypatch, rule):
    monkeypatch.setattr(dynamic, "MATCH_SECONDS", 0.05)
    name = "a" * 40 + "b"
    directory = write(tmp_path, module(name), dynamic={rule: {}})
    try:
        answered = open_gptq(directory).quantized == (name,)
    except CheckpointError as error:
        answered = "takes too long" in str(error)
    assert answered


def test_a_match_that_takes_too_long_is_refused_with_rule_module_and_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic, "MATCH_SECONDS", 0.05)
    message = rf"dynamic rule '-:{re.escape(SLOW)}' against module '{LONG_NAME}': takes too long: a match has 0\.05 s"
    directory = write(tmp_path, module(LONG_NAME), dynamic={f"-:{SLOW}": {}})
    with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path))}: {message}"):
        open_gptq(directory)
    with pytest.raises(CheckpointError, match=message):
        parse_config(quantization(dynamic={f"-:{SLOW}": {}}), "test").for_module(LONG_NAME)


@pytest.mark.parametrize(("rules", "names"), [(1, 1000), (1000, 0)])
def test_all_rules_and_modules_together_have_a_limit(monkeypatch, rules, names):
    """By a clock that goes on a second when it is asked."""
    clock = iter(range(10_000))
    monkeypatch.setattr(dynamic.time, "monotonic", lambda: next(clock))
    with pytest.raises(CheckpointError, match=r"^rule 'x.*takes too long: .* together have 30 s"):
        first_matches([f"x{i}" for i in range(rules)], [f"y{i}" for i in range(names)])
    assert next(clock) == 32


def test_rules_that_name_one_module_are_looked_up(monkeypatch):
    """`save_gptq` writes one for each module that differs: matching all by all would be the square of their number."""
    monkeypatch.setattr(dynamic, "_compile", lambda *_: pytest.fail("compiled"))
    names = [f"model.layers.{i}.mlp.up-proj" for i in range(20_000)]
    rules = [f"+:^{re.escape(name)}$" for name in names]
    assert first_matches(rules, names) == dict(zip(names, rules, strict=True))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("a" * 1001, r"must have at most 1000 characters, and 20000 with.*; got 1001 characters"),
        ("a{1000000000}", r"20000 with its repetitions spelt out"),
        ("(?:(?:a{1000}){1000}){1000}", r"20000 with its repetitions spelt out"),
        ("(?:" * 30 + "a" + "){1,9}" * 30, r"20000 with its repetitions spelt out"),
        ("(?:" * 30 + "a" + ")+" * 30, r"20000 with its repetitions spelt out"),
        ("(?:" + "()" * 450 + "){1000}", r"20000 with its repetitions spelt out"),
        ("(?x)a{ 1 0000000000 }", r"must have no flag x.*; got '\(\?x'"),
        ("(?i)b(?isx:a)", r"must have no flag x.*; got '\(\?isx'"),
        ("(?:a+){e<=9}", r"no brace but around a count.*; got '\{'"),
        ("[[:alpha:]]*", r"no \[:class:\]; got '\[:'"),
        ("(?R)?a", r"must be a regular expression: unknown extension \?R"),
        (r"\p{L}", r"must be a regular expression: bad escape"),
        ("a{99999999999999999999}", r"20000 with its repetitions spelt out"),
        ("a{,99999999999999999999}", r"must be a regular expression: the repetition number is too large"),
        ("(?a)(?u)b", r"must be a regular expression: .*incompatible"),
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.filterwarnings("ignore:Possible nested set")
def test_rules_beyond_the_limits_are_refused_by_name(expression, message):
    with pytest.raises(CheckpointError, match=rf"^test: dynamic rule '\+:.*{message}"):
        parse_config(quantization(dynamic={f"+:{expression}": {}}), "test")


def test_an_expression_nested_beyond_the_stack_of_python_is_refused():
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # which hypothesis raises for a whole process
    try:
        with pytest.raises(CheckpointError, match=r"must be a regular expression: .*recursion"):
            first_matches(["(" * 400 + "a" + ")" * 400], ())
    finally:
        sys.setrecursionlimit(limit)


def test_a_name_beyond_the_limit_is_refused_by_the_rule_that_would_match_it():
    name = "a" * 1001
    assert first_matches([f"^{name}$"], [name]) == {name: f"^{name}$"}
    with pytest.raises(CheckpointError, match=r"^rule '\.\*x': a module's name must have at most 1000.*; got 1001"):
        first_matches([".*x"], [name])


def test_only_expressions_that_need_the_extra_ask_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "regex", None)
    first_matches([r".*\.18\..*gate.*", r"^lm_head$", "a.b"], NAMES)
    for expression in (".*.*.*.*", "(a)", "a+", "a?", "a|b", "[a]", "a{2}", "a*"):
        with pytest.raises(ImportError, match=r"regex is needed here and not installed: pip install .*\[hf\]"):
            first_matches([expression], NAMES)
