"""The comparison of decoding speeds, on a tiny checkpoint and without compiling."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import demo, genai, isa, other_checkout
from exllama_ops import ExllamaLinear, load_model
from exllama_ops.integrations import generation

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-w3g32-asym-act-v2"


def test_the_dense_model_has_the_same_weights_and_none_of_our_layers() -> None:
    ours, dense = load_model(CHECKPOINT, torch.float32), demo.dense(load_model(CHECKPOINT, torch.float32))
    assert not any(isinstance(module, ExllamaLinear) for module in dense.modules())
    assert dense.dtype == torch.float32
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.inference_mode():
        expected, found = dense(ids).logits, ours(ids).logits
    assert float((expected - found).norm() / expected.norm()) < 1e-3


def test_weights_with_an_activation_order_are_shared_orders_of_nearly_the_same_weights() -> None:
    before, after = load_model(CHECKPOINT, torch.float32), demo.with_act_order(load_model(CHECKPOINT, torch.float32))
    for name, layer in before.named_modules():
        if isinstance(layer, ExllamaLinear):
            ordered = after.get_submodule(name)
            assert isinstance(ordered, ExllamaLinear)
            assert ordered.act_order
            W, W_again = layer.dequantize(), ordered.dequantize()
            assert float((W_again - W).norm() / W.norm()) < 0.25  # 3 bits, rounded to nearest again
    attention = after.model.layers[0].self_attn
    assert attention.q_proj.perm is attention.k_proj.perm is attention.v_proj.perm
    assert attention.q_proj.perm is not attention.o_proj.perm


@pytest.mark.parametrize("act_order", [False, True])
def test_all_models_decode_in_turns_and_the_ratios_are_written(
    act_order: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("exllama_ops.integrations.demo.demo_checkpoint", lambda say: CHECKPOINT)
    monkeypatch.setattr(generation, "CompiledGenerator", partial(generation.CompiledGenerator, compile=False))
    monkeypatch.setattr(genai, "turns", lambda *args: lambda: 1.0)
    monkeypatch.setattr(isa, "hold_to_cores", lambda threads: None)
    threads = torch.get_num_threads()
    try:
        flags = ["--act-order"] if act_order else []
        assert demo.main(["--seconds", "0", "--dtype", "float32", "bfloat16", "--out", str(tmp_path), *flags]) == 0
    finally:
        torch.set_num_threads(threads)
    others = [demo.INDUCTOR, demo.WHOLE, demo.HEAD, demo.DENSE, demo.GENAI]
    stem, compared = "demo-1thread", {demo.OURS: others, demo.HEAD: others[3:]}
    if act_order:
        stem = "demo-act-order-1thread"
        others.remove(demo.HEAD)
        compared = {demo.FROZEN: [demo.OURS, *others], demo.OURS: others}
    models = json.loads((tmp_path / f"{stem}.json").read_text())["models"]
    assert [(model["dtype"], model["turns"]) for model in models] == [("float32", 1), ("bfloat16", 1)]
    for model in models:
        ms = {kind: spread["median"] for kind, spread in model["ms_per_token"].items()}
        assert {kind: list(others) for kind, others in model["times_faster"].items()} == compared
        for kind, others in model["times_faster"].items():
            for other, ratio in others.items():
                assert ratio["median"] == pytest.approx(ms[other] / ms[kind])
    captured = capsys.readouterr()
    assert (tmp_path / f"{stem}.md").read_text() == captured.out
    assert ("activation orders folded" in captured.err) is act_order


def test_models_decode_in_another_order_each_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exllama_ops.integrations.demo.demo_checkpoint", lambda say: CHECKPOINT)
    monkeypatch.setattr(generation, "CompiledGenerator", partial(generation.CompiledGenerator, compile=False))
    decoded: list[int] = []

    def decode_ms(generator: object) -> float:
        decoded.append(id(generator))
        return 1.0

    monkeypatch.setattr(demo, "decode_ms", decode_ms)
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=partial(next, iter(range(100)))))
    kinds = [demo.OURS, demo.WHOLE, demo.DENSE]
    assert demo._measure("float32", seconds=8, act_order=False, wanted=kinds)["turns"] == 8
    turns = [tuple(decoded[i : i + 3]) for i in range(0, len(decoded), 3)]
    assert {len(set(turn)) for turn in turns} == {3}
    assert len(set(turns)) > 1


def test_a_peer_that_is_missing_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("exllama_ops.integrations.demo.demo_checkpoint", lambda say: CHECKPOINT)
    monkeypatch.setattr(generation, "CompiledGenerator", partial(generation.CompiledGenerator, compile=False))
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    measured = demo._measure("float32", seconds=0, act_order=False, wanted=[demo.OURS, demo.GENAI])
    assert list(measured["ms_per_token"]) == [demo.OURS]
    assert "OpenVINO GenAI: left out: " in capsys.readouterr().err


def test_another_checkout_decodes_in_a_process_of_its_own_which_ends_with_the_stack(tmp_path: Path) -> None:
    package = tmp_path / "exllama_ops" / "integrations"
    package.mkdir(parents=True)
    (tmp_path / "exllama_ops" / "__init__.py").write_text("def load_model(*args, **options): return None")
    (package / "__init__.py").touch()
    (package / "generation.py").write_text(
        """
import pathlib, torch

class CompiledGenerator:
    def __init__(self, model, **options): self.steps = 0
    def warm_up(self): pass
    def prefill(self, prompt, new_tokens): self.wanted = [len(prompt), new_tokens]
    def decode(self, token):
        self.steps += 1
        pathlib.Path(__file__).with_name("seen").write_text(f"{self.wanted} {self.steps} {torch.get_num_threads()}")
        return torch.zeros(2)
"""
    )
    with ExitStack() as stack:
        turn = other_checkout.turns(stack, tmp_path, CHECKPOINT, "float32", 16, 8, 1)
        assert turn() > 0
        assert (package / "seen").read_text() == "[16, 10] 9 1"
        assert turn() > 0
    with pytest.raises((ValueError, RuntimeError)):
        turn()
