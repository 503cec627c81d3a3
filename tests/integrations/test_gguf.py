"""GGUF files of Q4_0 and Q8_0, against what transformers makes of them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from checkpoint.builder import decode

gguf = pytest.importorskip("gguf", reason='needs the extra "hf"')
transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')

from exllama_ops import CheckpointError, load_model, open_gptq  # noqa: E402
from exllama_ops.cli import main  # noqa: E402
from exllama_ops.integrations.gguf import GgufCheckpoint  # noqa: E402

Kind = gguf.GGMLQuantizationType
HIDDEN, WIDE, HEADS, KV_HEADS, VOCABULARY = 64, 96, 4, 2, 40
TEMPLATE = "{{ messages[0].content }}"


def write_gguf(path, *, kinds=(), bias=False, output=Kind.Q8_0, leave_out=(), extra=(), seed=0):
    """A llama of one layer, every matrix Q4_0 but those of ``kinds``: (part of a name, type)."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("gpt2")
    tokens = [chr(33 + i) for i in range(VOCABULARY - 3)] + ["!!", "<s>", "</s>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (VOCABULARY - 2) + [3, 3])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(seed)
    kv = KV_HEADS * HIDDEN // HEADS
    shapes = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (kv, HIDDEN),
        "blk.0.attn_v.weight": (kv, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (WIDE, HIDDEN),
        "blk.0.ffn_up.weight": (WIDE, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, WIDE),
        "output_norm.weight": (HIDDEN,),
    }
    if output is not None:
        shapes["output.weight"] = (VOCABULARY, HIDDEN)
    shapes |= dict(extra)
    chosen = {"output.": output, **dict(kinds)}
    for name, shape in shapes.items():
        if name in leave_out:
            continue
        kind = (
            Kind.F32
            if len(shape) == 1
            else next((k for part, k in chosen.items() if f".{part}" in f".{name}"), Kind.Q4_0)
        )
        values = random.standard_normal(shape, np.float32)
        data = values.astype(np.float16) if kind is Kind.F16 else values
        if kind not in (Kind.F32, Kind.F16):
            data = gguf.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Q4_0 with a Q8_0 and an F16 layer, an embedding of Q5_0, and what transformers makes of it."""
    path = tmp_path_factory.mktemp("gguf") / "mixed.gguf"
    write_gguf(path, kinds=[("attn_q.", Kind.Q8_0), ("ffn_up", Kind.F16), ("token_embd", Kind.Q5_0)])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(gguf_file=path.name, dequantize=True),
    )
    return path, model.eval()


def test_weights_are_bit_for_bit_what_transformers_dequantizes(mixed):
    path, model = mixed
    checkpoint = GgufCheckpoint(path)
    state = model.state_dict()
    bits = {}
    for name in checkpoint.quantized:
        weight, summary = checkpoint.read(name), checkpoint.summary(name)
        assert torch.equal(decode(weight).float().t(), state[f"{name}.weight"]), name
        assert (summary.in_features, summary.out_features) == (weight.in_features, weight.out_features)
        assert (summary.bits, summary.group_size, summary.num_groups) == (weight.bits, 32, weight.scales.shape[0])
        assert summary.sym
        bits[name.rpartition(".")[2]] = weight.bits
    assert bits == dict.fromkeys(("k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"), 4) | {
        "q_proj": 8,
        "lm_head": 8,
    }
    # What GPTQ has no weight for is dense. Blocks are rounded to float16 once.
    assert len(checkpoint.dense) == 5
    for name in checkpoint.dense:
        tensor = checkpoint.read_tensor(name)
        assert (checkpoint.tensor_shape(name), checkpoint.tensor_dtype(name)) == (tensor.shape, tensor.dtype)
        want = state[name].half() if "embed_tokens" in name else state[name]
        assert torch.equal(tensor.float(), want.float()), name


@pytest.mark.parametrize("checkpoint_format", ["gptq_v2", "gptq"])
def test_a_converted_file_runs_with_its_tokenizer(mixed, tmp_path, capsys, checkpoint_format):
    path, model = mixed
    assert main(["convert", str(path), str(tmp_path / "out"), "--format", checkpoint_format, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["modules"], result["tensors"]) == (7, 5)
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        logits = load_model(tmp_path / "out", torch.float32, progress=False)(ids).logits
        want = model(ids).logits
    assert ((logits - want).norm() / want.norm()).item() < 1e-3  # the embedding is float16
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("!!")["input_ids"] == [VOCABULARY - 3]
    assert tokenizer.chat_template == TEMPLATE
    assert open_gptq(tmp_path / "out").config.sym
    assert str(path.parent) not in (tmp_path / "out" / "config.json").read_text()


def test_a_head_of_another_type_is_dense(tmp_path):
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "a.gguf", output=Kind.Q4_1))
    assert "lm_head.weight" in checkpoint.dense
    assert checkpoint.read_tensor("lm_head.weight").dtype == torch.float16


def test_a_tied_head_is_in_no_tensor(tmp_path):
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "a.gguf", output=None))
    assert checkpoint.model_config["tie_word_embeddings"]
    assert not [name for name in (*checkpoint.dense, *checkpoint.quantized) if "lm_head" in name]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"kinds": [("ffn_down", Kind.Q4_1)]},
            r"tensor blk\.0\.ffn_down\.weight \(model\.layers\.0\.mlp\.down_proj\.weight\) must be one of Q4_0, "
            r"Q8_0, F32, F16, BF16, which .*; got Q4_1: quantize the model by `llama-quantize --pure` to Q4_0 or Q8_0",
        ),
        (
            {"leave_out": ["blk.0.attn_k.weight"]},
            r"1 tensors .* is missing is model\.layers\.0\.self_attn\.k_proj\.weight",
        ),
    ],
)
def test_what_gptq_cannot_hold_is_refused_by_its_tensor(tmp_path, changes, text):
    path = write_gguf(tmp_path / "a.gguf", **changes)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: {text}$"):
        GgufCheckpoint(path)


def test_a_tensor_that_the_model_has_no_place_for_is_left_out_with_a_warning(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", extra=[("other.weight", (8,))])
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM has no place for other\.weight; left out"):
        GgufCheckpoint(path)


def test_scaled_positions_need_the_config_of_the_model_beside_the_file(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", extra=[("rope_freqs.weight", (8,))])
    with pytest.raises(CheckpointError, match=r"tensor rope_freqs\.weight changes .*: put config\.json of the model"):
        GgufCheckpoint(path)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_attention_heads": HEADS, "vocab_size": VOCABULARY}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=KV_HEADS, num_hidden_layers=1, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no place for rope_freqs"):
        checkpoint = GgufCheckpoint(path)
    assert checkpoint.model_config["rope_parameters"] == rope
    config.hidden_size = 2 * HIDDEN
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"token_embd\.weight must have shape \(40, 128\), .*; got \(40, 64\)"):
        GgufCheckpoint(path)


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"nothing of the kind"])
def test_what_is_no_gguf_file_is_refused_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "a.gguf"
    if content is not None:
        path.write_bytes(content)
    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"exllama-ops: error: {path}: ")
    assert not (tmp_path / "out").exists()


def test_scales_that_are_not_finite_are_refused(tmp_path):
    path = write_gguf(tmp_path / "a.gguf")
    offset = next(t.data_offset for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    with path.open("rb+") as file:
        file.seek(offset)
        file.write(np.float16(np.inf).tobytes())
    checkpoint = GgufCheckpoint(path)
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.ffn_up\.weight must have finite scales"):
        checkpoint.read("model.layers.0.mlp.up_proj")
