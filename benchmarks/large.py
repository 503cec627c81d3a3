"""A model of the size of Llama-2-7B: ``python -m benchmarks.large``; README.md has the command.

Its weights are random words of 4 bits in groups of 128, with an activation order, 3.8 GB in shards. They are written to
a temporary folder, loaded, and decoded with, eagerly and compiled layer by layer, in turns. A token reads every weight
once, so its time is compared with the speed of DRAM around it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import isa
from benchmarks.files import OUT_HELP, write_result

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 4096, 11008, 32, 32000
BITS, GROUP_SIZE = 4, 128
LAYERS_OF_FILE = 8
PROMPT_TOKENS, TURN_TOKENS = 64, 8
EAGER, COMPILED = "eager", "compiled"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.large",
        description="Load a model of the size of Llama-2-7B with random words, and decode with it.",
    )
    add = parser.add_argument
    add("--threads", type=int, default=2, help="threads, and cores of the process (default: %(default)s)")
    add("--layers", type=int, default=32, help="of the model (default: %(default)s)")
    add("--rounds", type=int, default=5, help=f"turns of {TURN_TOKENS} tokens of each way (default: %(default)s)")
    add("--ways", nargs="+", choices=(EAGER, COMPILED), default=[EAGER, COMPILED], help="default: both")
    add("--folder", type=Path, help="where the checkpoint is, or will be kept (default: a temporary one)")
    add("--out", type=Path, metavar="DIR", help=OUT_HELP)
    args = parser.parse_args(arguments)
    try:
        isa.hold_to_cores(args.threads)
    except isa.HoldError as error:
        parser.error(str(error))
    from exllama_ops.cli.output import emit, say

    given = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "config.json").exists():
            say("writing the checkpoint")
            # In a process of its own, whose memory does not count.
            writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(folder, args.layers))
            writer.start()
            writer.join()
            if writer.exitcode:
                say(f"error: the checkpoint could not be written to {folder}")
                return 1
        result = {
            "command": " ".join(["python -m benchmarks.large", *given]),
            **measure(folder, args.threads, args.ways, args.rounds),
        }
    emit(table(result))
    write_result(args.out, f"large-{args.threads}thread{'' if args.threads == 1 else 's'}", result, table(result))
    return 0


def write_checkpoint(folder: Path, layers: int) -> None:
    """Write the checkpoint, in files of some layers each."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))

    def dense(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).half()

    ends = {"model.embed_tokens": dense(VOCABULARY, HIDDEN), "lm_head": dense(VOCABULARY, HIDDEN)}
    ends["model.norm"] = torch.ones(HIDDEN, dtype=torch.float16)
    save("ends.safetensors", {f"{name}.weight": tensor for name, tensor in ends.items()})
    for first in range(0, layers, LAYERS_OF_FILE):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(first, min(first + LAYERS_OF_FILE, layers)):
            prefix = f"model.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.float16)
            for K, projections in _inputs():
                g_idx = (torch.randperm(K, generator=generator) // GROUP_SIZE).to(torch.int32)
                for name, N in projections.items():
                    for part, value in _random_weight(K, N, generator).items():
                        tensors[f"{prefix}.{name}.{part}"] = value
                    tensors[f"{prefix}.{name}.g_idx"] = g_idx.clone()
        save(f"layers-{first}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(_config(layers)))


def _inputs() -> list[tuple[int, dict[str, int]]]:
    """The inputs of a layer's projections, each K long: their names and N. Those of one input share its order."""
    return [
        (HIDDEN, {f"self_attn.{name}_proj": HIDDEN for name in "qkv"}),
        (HIDDEN, {"self_attn.o_proj": HIDDEN}),
        (HIDDEN, {"mlp.gate_proj": INTERMEDIATE, "mlp.up_proj": INTERMEDIATE}),
        (INTERMEDIATE, {"mlp.down_proj": HIDDEN}),
    ]


def _random_weight(K: int, N: int, generator: Any) -> dict[str, Any]:
    """Random words, and scales with which the outputs are as large as the inputs."""
    import torch

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)

    # q - z has a standard deviation of 6.5, where both are drawn from 16 values.
    scales = torch.full((K // GROUP_SIZE, N), 1 / (6.5 * K**0.5), dtype=torch.float16)
    return {"qweight": words(K * BITS // 32, N), "qzeros": words(K // GROUP_SIZE, N * BITS // 32), "scales": scales}


def _config(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "gptq",
            "bits": BITS,
            "group_size": GROUP_SIZE,
            "desc_act": True,
            "sym": False,
        },
    }


def measure(folder: Path, threads: int, ways: Sequence[str], rounds: int) -> dict[str, Any]:
    """Load the checkpoint and decode with it.

    Args:
        folder: of the checkpoint.
        threads: of the products.
        ways: in which it decodes.
        rounds: of a turn of each way.
    """
    import torch

    from benchmarks.limits import DRAM, Limits
    from benchmarks.machine import description
    from exllama_ops import load_model
    from exllama_ops.backends.cpu import BACKEND
    from exllama_ops.integrations.generation import CompiledGenerator
    from exllama_ops.progress import Screen

    torch.set_num_threads(threads)
    BACKEND.build()
    library = BACKEND.library
    if library is None:
        raise SystemExit(f"error: the native CPU kernels are not in use: {'; '.join(BACKEND.failure)}")
    isa_name = library.isa_in_use() or ""
    with Screen() as screen:
        start = time.perf_counter()
        model = load_model(folder, progress=False, notify=screen)
        load_s = time.perf_counter() - start
        peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        generators = {way: CompiledGenerator(model, compile=way == COMPILED, notify=screen) for way in ways}
        for generator in generators.values():
            generator.warm_up()
    limits = Limits(isa_name, threads)
    token_bytes = _bytes_of_token(model)
    prompt = torch.arange(PROMPT_TOKENS) + 1
    samples: dict[str, dict[str, list[float]]] = {way: {"prompt_s": [], "token_s": [], "percent": []} for way in ways}
    for _ in range(rounds):
        for way, generator in generators.items():
            start = time.perf_counter()
            token = generator.prefill(prompt, TURN_TOKENS + 1).argmax()
            samples[way]["prompt_s"].append(time.perf_counter() - start)
            for _ in range(TURN_TOKENS):
                before = limits.measure()[DRAM]
                start = time.perf_counter()
                token = generator.decode(token).argmax()
                seconds = time.perf_counter() - start
                after = limits.measure()[DRAM]
                samples[way]["token_s"].append(seconds)
                samples[way]["percent"].append(100 * token_bytes / seconds / ((before + after) / 2))
    return {
        "machine": description(threads, isa_name, "native", ["exllama-ops", "torch", "transformers"]),
        "huge_pages": os.environ.get("EXLLAMA_OPS_HUGE_PAGES", "1") != "0",
        "load_s": load_s,
        "peak_bytes_after_loading": peak_bytes,
        "bytes_of_token": token_bytes,
        "samples": samples,
    }


def _bytes_of_token(model: Any) -> int:
    """What a token reads: all weights but the embedding, of which it reads a row."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    tensors.pop(id(model.get_input_embeddings().weight))
    return sum(tensor.nbytes for tensor in tensors.values())


def table(result: dict[str, Any]) -> str:
    """Markdown: what loading took, and a row for each way."""
    from benchmarks.timing import Spread

    machine = result["machine"]
    rows = [
        "| way | prompt of 64, s | ms of a token | tokens/s | GB/s | percent of DRAM |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, samples in result["samples"].items():
        token, percent = Spread.of(samples["token_s"]), Spread.of(samples["percent"])
        rows.append(
            f"| {way} | {Spread.of(samples['prompt_s']).median:.2f} "
            f"| {1e3 * token.median:.1f} ±{1e3 * token.iqr:.1f} | "
            f"{1 / token.median:.2f} | {1e-9 * result['bytes_of_token'] / token.median:.1f} | "
            f"{percent.median:.0f} ±{percent.iqr:.0f} |"
        )
    return "\n".join(
        [
            "# A model of the size of Llama-2-7B",
            "",
            f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {machine['isa']}, commit "
            f"{machine['commit']}, torch {machine['packages']['torch']}; random words, 4 bits, groups of 128, "
            f"activation order; {'in' if result['huge_pages'] else 'without'} huge pages.",
            "",
            "```",
            result["command"],
            "```",
            "",
            f"Loading took {result['load_s']:.1f} s, and {1e-9 * result['peak_bytes_after_loading']:.1f} GB at the "
            f"peak. A token reads {1e-9 * result['bytes_of_token']:.2f} GB. Medians ± interquartile range.",
            "",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
