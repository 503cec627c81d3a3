"""`register`: what transformers loads, saves, places and splits by itself, without optimum and gptqmodel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exllama_ops.checkpoint import CheckpointError
from exllama_ops.nn import ExllamaLinear

transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')

import tokenizers  # noqa: E402 (transformers brings it)
from transformers.quantizers import auto  # noqa: E402 (as above)

from exllama_ops.integrations.transformers import load_model, register  # noqa: E402 (as above)
from integrations import families  # noqa: E402 (it needs transformers)

DATA = Path(__file__).parents[1] / "data"
CHECKPOINTS = ["tiny-w4g64-lmhead", "tiny-w3g32-asym-act-v2", "smol1-w2g32-asym-act", "smol1-w4g64-bf16"]
PACKED = ("qweight", "qzeros", "scales", "g_idx")
IDS = torch.arange(5, 25).reshape(1, -1)


@pytest.fixture(autouse=True)
def registered() -> Any:
    with register():
        yield


def from_pretrained(path: Path | str, **arguments: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **arguments)


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_logits_are_those_of_load_model_bit_for_bit(name: str) -> None:
    model = from_pretrained(DATA / name)
    assert torch.equal(logits(model), logits(load_model(DATA / name, progress=False)))
    assert any(isinstance(module, ExllamaLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("load", [from_pretrained, load_model])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_save_pretrained_gives_back_the_files(name: str, load: Any, tmp_path: Path) -> None:
    """Packed tensors bit for bit, v1 as v1, and the whole quantization config, `dynamic` and all."""
    model = load(DATA / name)
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (DATA / name, tmp_path))
    assert before.keys() == after.keys()
    for key in before:
        if key.rpartition(".")[2] in PACKED:
            assert before[key].dtype == after[key].dtype
            assert torch.equal(before[key], after[key]), key
    configs = [json.loads((folder / "config.json").read_text()) for folder in (DATA / name, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


def test_dequantize_gives_the_dense_model_which_saves_as_one(tmp_path: Path) -> None:
    families.write("mixtral", tmp_path / "packed")
    model = from_pretrained(tmp_path / "packed", dtype=torch.float32)
    expected = families.logits(model)
    dense = model.dequantize()
    assert not any(isinstance(module, ExllamaLinear) for module in dense.modules())
    assert (families.logits(dense) - expected).abs().max() <= 1e-4 * expected.abs().max()
    llama = from_pretrained(DATA / "tiny-w4g64-lmhead", dtype=torch.float32).dequantize()
    llama.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(from_pretrained(tmp_path / "dense", dtype=torch.float32)), logits(llama))


def test_a_model_with_a_rounded_head_is_saved_with_a_rule_for_it(tmp_path: Path) -> None:
    model = load_model(DATA / "tiny-w3g32-asym-act-v2", progress=False, lm_head_bits=8)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["dynamic"] == {"+:^lm_head$": {"bits": 8, "group_size": 128}}
    again = from_pretrained(tmp_path)
    assert isinstance(again.lm_head, ExllamaLinear)
    assert torch.equal(logits(again), logits(model))


def test_files_without_a_config_load_with_an_argument(tmp_path: Path) -> None:
    shutil.copytree(DATA / "tiny-w3g32-asym-act-v2", tmp_path, dirs_exist_ok=True)
    (tmp_path / "quantize_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = transformers.GPTQConfig(bits=3, group_size=32, sym=False, desc_act=True, format="gptq_v2")
    model = from_pretrained(tmp_path, quantization_config=said)
    assert torch.equal(logits(model), logits(load_model(DATA / "tiny-w3g32-asym-act-v2", progress=False)))


@pytest.mark.parametrize("method", ["nowhere", "null", "method"])
def test_folders_of_older_tools_load(method: str, tmp_path: Path) -> None:
    """The config in quantize_config.json alone, or without its method, and weights under another name."""
    shutil.copytree(DATA / "tiny-w3g32-asym-act-v2", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-3bit-32g.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    quantization.pop("method", None)
    if method != "nowhere":
        fields = {"null": {"quant_method": None}, "method": {"quant_method": None, "method": "GPTQ"}}[method]
        config["quantization_config"] = {**quantization, **fields}
        (tmp_path / "quantize_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = from_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(load_model(DATA / "tiny-w3g32-asym-act-v2", progress=False)))


@pytest.mark.parametrize("writer", sorted(path.parent.name for path in (DATA / "writers").glob("*/config.json")))
def test_checkpoints_of_other_writers_load_and_are_saved_as_gptq(writer: str, tmp_path: Path) -> None:
    model = from_pretrained(DATA / "writers" / writer)
    assert torch.equal(logits(model), logits(load_model(DATA / "writers" / writer, progress=False)))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


def test_files_without_packed_weights_are_refused(tmp_path: Path) -> None:
    """Nothing is quantized here, whatever the argument asks for."""
    transformers.AutoModelForCausalLM.from_config(families.CONFIGS["phi3"]()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"must have quantized modules, tensors NAME\.qweight; found none"):
        from_pretrained(tmp_path, quantization_config=transformers.GPTQConfig(bits=4, group_size=32))


def test_what_was_registered_is_undone_once_all_are_done(registered: None) -> None:
    ours = auto.AUTO_QUANTIZER_MAPPING["gptq"]
    with register() as inner:
        assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is ours
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is ours
    inner.__exit__(None, None, None)  # a second time changes nothing
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is ours


def test_transformers_is_as_it_was_after_the_last_registration() -> None:
    code = """
from transformers import modeling_utils
from transformers.quantizers import auto
finds = modeling_utils.get_hf_quantizer
before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
from exllama_ops.integrations.transformers import register
with register(), register():
    assert auto.AUTO_QUANTIZER_MAPPING != before[0] and auto.AUTO_QUANTIZATION_CONFIG_MAPPING != before[1]
assert (dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)) == before
assert modeling_utils.get_hf_quantizer is finds
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_read_here_stays_with_transformers() -> None:
    configs = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert type(configs["awq"].from_dict({"bits": 4, "version": "gemv"})) is transformers.AwqConfig
    assert configs["awq"].from_dict({"bits": 4, "version": "gemm"}).to_dict() == {"bits": 4, "version": "gemm"}


def layers_on(device: str) -> dict[str, str]:
    """A map of the two-layer checkpoint: its first layer on a device, all else on the CPU."""
    rest = ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    return {**dict.fromkeys(rest, "cpu"), "model.layers.0": device}


@pytest.mark.parametrize("device_map", ["cpu", "auto", layers_on("disk")], ids=["cpu", "auto", "disk"])
def test_a_device_map_changes_no_bit(device_map: Any, tmp_path: Path) -> None:
    name = "tiny-w4g64-lmhead"
    model = from_pretrained(DATA / name, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(logits(model), logits(load_model(DATA / name, progress=False)))


def test_packed_weights_on_disk_are_read_for_each_call(tmp_path: Path) -> None:
    name = "tiny-w3g32-asym-act-v2"
    arguments = {"device_map": layers_on("disk"), "offload_folder": tmp_path, "offload_buffers": True}
    model = from_pretrained(DATA / name, **arguments)
    layer = model.model.layers[0].self_attn.q_proj
    expected = logits(load_model(DATA / name, progress=False))
    for _ in range(2):
        assert all(buffer.is_meta for buffer in layer.buffers())
        assert torch.equal(logits(model), expected)
    written = (tmp_path / "model.layers.0.self_attn.q_proj.qweight.dat").stat().st_size
    assert written == layer.qweight.numel() * 4


def test_sizes_that_accelerate_plans_with_are_those_of_the_files() -> None:
    """Else a map for a small GPU would put too much on it."""
    from transformers.integrations.accelerate import compute_module_sizes

    seen: list[int] = []
    quantizer = auto.AUTO_QUANTIZER_MAPPING["gptq"]
    before = quantizer._process_model_after_weight_loading

    def measure(self: Any, model: Any, **kwargs: Any) -> Any:
        seen.append(compute_module_sizes(model, self)[0][""])
        return before(self, model, **kwargs)

    quantizer._process_model_after_weight_loading = measure
    try:
        from_pretrained(DATA / "tiny-w3g32-asym-act-v2")
    finally:
        quantizer._process_model_after_weight_loading = before
    files = load_file(DATA / "tiny-w3g32-asym-act-v2" / "model.safetensors")
    assert abs(seen[0] - sum(tensor.nbytes for tensor in files.values())) < 0.02 * seen[0]


def test_generate_compiles_one_graph_without_breaks() -> None:
    model = from_pretrained(DATA / "tiny-w4g64-lmhead")
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(graph)
        return graph

    config = transformers.CompileConfig(fullgraph=True, dynamic=None, backend=backend)
    config._compile_all_devices = True
    arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(IDS, **arguments)
    compiled = model.generate(IDS, **arguments, cache_implementation="static", compile_config=config)
    assert torch.equal(eager, compiled)
    calls = sum("gptq_gemm" in str(node.target) for node in graphs[0].graph.nodes)
    assert calls == sum(isinstance(module, ExllamaLinear) for module in model.modules())


def test_a_pipeline_answers_what_load_model_does(tmp_path: Path) -> None:
    families.write("phi3", tmp_path)
    words = {f"w{i}": i for i in range(families.VOCABULARY)}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="w0").save_pretrained(tmp_path)
    answer = transformers.pipeline("text-generation", model=str(tmp_path))(
        "w5 w6 w7", max_new_tokens=4, do_sample=False, return_full_text=False
    )
    model = load_model(tmp_path, progress=False)
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0, 3:]
    assert answer[0]["generated_text"].split() == [f"w{token}" for token in expected.tolist()]


PARALLEL = """
import json, os, sys, torch, torch.distributed
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import exllama_ops
from exllama_ops.integrations.transformers import register
exllama_ops.set_cpu_matmul_precision("highest")
register()
torch.distributed.init_process_group("gloo")
ids = torch.arange(5, 25).reshape(1, -1)
found = []
for path in sys.argv[2:]:
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    split = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, distributed_config=DistributedConfig(tp_size=2)
    )
    with torch.inference_mode():
        expected, got = whole(input_ids=ids).logits, split(input_ids=ids).logits
    error = (got - expected).abs().max() / expected.abs().max()
    layer = split.model.layers[-1].self_attn.o_proj
    result = {"path": path, "error": float(error)}
    result["halved"] = layer.in_features * 2 == whole.model.layers[-1].self_attn.o_proj.in_features
    try:
        split.save_pretrained(path + "-saved")
    except ValueError as refusal:
        result["refusal"] = str(refusal)
    found.append(result)
with open(os.path.join(sys.argv[1], os.environ["RANK"] + ".json"), "w") as file:
    json.dump(found, file)
torch.distributed.barrier()
# A thread of gloo may free a tensor while Python ends, which aborts the process (PyTorch 2.13). So it ends at once.
os._exit(0)
"""


def test_two_processes_hold_half_of_each_layer(tmp_path: Path) -> None:
    """Act-order with biases, a quantized head whose outputs are gathered, and experts, cut by transformers' plan."""
    families.write("mixtral", tmp_path / "mixtral")
    paths = [DATA / "tiny-w3g32-asym-act-v2", DATA / "tiny-w4g64-lmhead", tmp_path / "mixtral"]
    copies = [shutil.copytree(path, tmp_path / f"copy-{path.name}") for path in paths]
    (tmp_path / "run.py").write_text(PARALLEL)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(tmp_path / "run.py")]
    result = subprocess.run(
        [sys.executable, *command, str(tmp_path), *map(str, copies)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    # A file for each process, as lines of two on one output may run into each other.
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [one["path"] for one in found] == list(map(str, copies))
        for one in found:
            assert one["error"] < 1e-4, one
            assert one["halved"], one
            assert one["refusal"].startswith("save_pretrained: under tensor parallelism"), one
