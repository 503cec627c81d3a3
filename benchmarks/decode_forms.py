"""Attention and the output layer in the forms of layered generation: ``python -m benchmarks.decode_forms``.

The forms of transformers and torch stand beside those of `exllama_ops.integrations.cpu_forms`. Those of one token are
AOTInductor packages on one thread, as `LayeredForward` makes them. Errors are those of the result against float64.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import isa
from benchmarks.files import OUT_HELP, write_result

# Heads, groups, dim: of the demo, and of an 8B model.
ATTENTION = ((9, 3, 64), (32, 8, 128))
LENGTHS = (64, 256, 1024, 4096)
PROMPTS = (16, 128, 512)
# K, N: of the demo, and of a 7B model.
OUTPUT_LAYERS = ((576, 49152), (4096, 32000))
# A model has other keys in each layer, so calls take turns over as many copies.
COPIES = 8
SECONDS = 1.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_forms", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="the most threads, and cores (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=OUT_HELP)
    args = parser.parse_args(arguments)
    try:
        isa.hold_to_cores(args.threads)
    except isa.HoldError as error:
        parser.error(str(error))
    import torch

    from benchmarks.machine import description
    from exllama_ops.cli.output import emit

    threads = sorted({1, args.threads})
    given = sys.argv[1:] if arguments is None else arguments
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        rows = [*_one_token(Path(folder), threads), *_prompts(threads), *_output_layers(Path(folder), threads)]
    result = {
        "command": " ".join(["python -m benchmarks.decode_forms", *given]),
        "machine": description(args.threads, "", "native", ["torch", "transformers"]),
        "rows": rows,
    }
    emit(_table(result))
    write_result(args.out, "decode-forms", result, _table(result))
    return 0


def _one_token(folder: Path, threads: Sequence[int]) -> list[dict[str, Any]]:
    from exllama_ops.integrations.cpu_forms import attend_one

    rows = []
    for shape in ATTENTION:
        scale = shape[2] ** -0.5
        forms = {
            "theirs": _package(folder, _transformers_attention, _attention_inputs(shape, 1, LENGTHS[1]), cut=True),
            "ours": _package(
                folder,
                lambda query, key, value, mask, scale=scale: attend_one(query, key, value, mask, scale),
                _attention_inputs(shape, 1, LENGTHS[1]),
                cut=True,
            ),
        }
        for length in LENGTHS:
            inputs = [_attention_inputs(shape, 1, length) for _ in range(COPIES)]
            rows += _compare(f"attention, 1 token, {_named(shape)}, length {length}", forms, inputs, threads, _exact)
    return rows


def _prompts(threads: Sequence[int]) -> list[dict[str, Any]]:
    from exllama_ops.integrations.cpu_forms import attend_many

    rows = []
    for shape in ATTENTION:
        scale = shape[2] ** -0.5
        forms: dict[str, Callable[..., Any]] = {
            "theirs": _transformers_attention,
            "ours": lambda query, key, value, mask, scale=scale: attend_many(query, key, value, mask, scale),
        }
        for tokens in PROMPTS:
            inputs = [_attention_inputs(shape, tokens, max(tokens, 64))]
            rows += _compare(f"attention, {tokens} tokens, {_named(shape)}", forms, inputs, threads, _exact)
    return rows


def _output_layers(folder: Path, threads: Sequence[int]) -> list[dict[str, Any]]:
    import torch

    from exllama_ops.integrations.cpu_forms import multiply_rows

    rows = []
    for dtype in (torch.float16, torch.bfloat16):
        for K, N in OUTPUT_LAYERS:
            generator = torch.Generator().manual_seed(0)
            weight = (0.05 * torch.randn(N, K, generator=generator)).to(dtype)
            inputs = (torch.randn(1, 1, K, generator=generator).to(dtype), weight)
            forms = {
                "theirs": _package(folder, torch.nn.functional.linear, inputs),
                "ours": _package(folder, lambda x, weight: multiply_rows(x, weight, None), inputs),
            }
            name = f"output layer, {K} x {N}, {str(dtype).removeprefix('torch.')}"
            rows += _compare(name, forms, [inputs], threads, lambda x, weight: x.double() @ weight.double().t())
    return rows


def _named(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} heads in {shape[1]} groups x {shape[2]}"


def _attention_inputs(shape: tuple[int, int, int], tokens: int, length: int) -> tuple[Any, ...]:
    """A query, keys and values as views of longer memory, and a mask that is added."""
    import torch

    heads, groups, dim = shape
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(rows, width, dim, generator=generator).half()
        for rows, width in ((tokens, heads), (2 * length, groups), (2 * length, groups))
    )
    hidden = torch.arange(length) > torch.arange(tokens).unsqueeze(1) + length - tokens - 5 * (tokens == 1)
    mask = torch.zeros(1, 1, tokens, length).masked_fill(hidden, torch.finfo(torch.float16).min).half()
    key, value = (memory[:length].transpose(0, 1).unsqueeze(0) for memory in (keys, values))
    return query.transpose(0, 1).unsqueeze(0).contiguous(), key, value, mask


def _transformers_attention(query: Any, key: Any, value: Any, mask: Any) -> Any:
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    module = torch.nn.Module()
    module.num_key_value_groups = query.shape[1] // key.shape[1]
    result, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=query.shape[3] ** -0.5)
    return result.transpose(1, 2)


def _exact(query: Any, key: Any, value: Any, mask: Any) -> Any:
    share = query.shape[1] // key.shape[1]
    keys, values = (tensor.double().repeat_interleave(share, 1) for tensor in (key, value))
    scores = query.double() @ keys.transpose(2, 3) * query.shape[3] ** -0.5
    return (scores + mask.double()).softmax(-1) @ values


def _package(
    folder: Path, function: Callable[..., Any], inputs: tuple[Any, ...], cut: bool = False
) -> Callable[..., Any]:
    """A function as AOTInductor makes it for one thread; its keys, values and mask of any length if ``cut``."""
    import torch

    class Module(torch.nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return function(*arguments)

    length = torch.export.Dim("length", min=2, max=1 << 20)
    shapes: Any = (({}, {2: length}, {2: length}, {3: length}),) if cut else None
    program = torch.export.export(Module(), inputs, dynamic_shapes=shapes, strict=False)
    path = folder / f"{len(list(folder.iterdir()))}.pt2"
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"cpp.threads": 1, "size_asserts": False}
    )
    run = torch._inductor.aoti_load_package(str(path)).loader.run
    return lambda *arguments: run(list(arguments))[0]


def _compare(
    name: str,
    forms: Mapping[str, Callable[..., Any]],
    inputs: Sequence[tuple[Any, ...]],
    threads: Sequence[int],
    exact: Callable[..., Any],
) -> list[dict[str, Any]]:
    """A row for each number of threads: microseconds of each form, in turns, and its error."""
    import torch

    from benchmarks.timing import Spread

    expected = exact(*inputs[0])
    errors = {
        form: float((run(*inputs[0]).double() - expected).norm() / expected.norm()) for form, run in forms.items()
    }
    rows = []
    former = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            times: dict[str, list[float]] = {form: [] for form in forms}
            end = time.perf_counter() + SECONDS
            turn = 0
            while turn < 3 or time.perf_counter() < end:
                for form, run in forms.items():
                    run(*inputs[turn % len(inputs)])
                    start = time.perf_counter()
                    run(*inputs[(turn + 1) % len(inputs)])
                    times[form].append(1e6 * (time.perf_counter() - start))
                turn += 1
            spreads = {form: vars(Spread.of(values)) for form, values in times.items()}
            rows.append({"what": name, "threads": count, "microseconds": spreads, "errors": errors})
    finally:
        torch.set_num_threads(former)
    return rows


def _table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        "# Forms of attention and of the output layer",
        "",
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, commit {machine['commit']}, torch "
        f"{machine['packages']['torch']}, transformers {machine['packages']['transformers']}; microseconds of a call, "
        f"median ± interquartile range of turns within {SECONDS:g} s; attention in float16; in parentheses the error "
        "against float64. Ours with one token uses one thread in every row.",
        "",
        f"```\n{result['command']}\n```",
        "",
        "| what | threads | transformers or torch | ours | faster by |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        theirs, ours = (
            f"{row['microseconds'][form]['median']:.0f} ±{row['microseconds'][form]['iqr']:.0f} "
            f"({row['errors'][form]:.1e})"
            for form in ("theirs", "ours")
        )
        ratio = row["microseconds"]["theirs"]["median"] / row["microseconds"]["ours"]["median"]
        lines.append(f"| {row['what']} | {row['threads']} | {theirs} | {ours} | {ratio:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
