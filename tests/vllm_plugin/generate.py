"""Greedy tokens of vLLM for prompts of tokens: ``python generate.py ARGUMENTS.json``, in a process of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")


def main(arguments: dict[str, Any]) -> None:
    """Print one JSON object: the tokens that follow each prompt, and how vLLM named its quantization.

    ``then`` has lists of calls of vLLM's LLM, and the tokens without an adapter after each list follow in ``after``.
    """
    # By itself vLLM wants a NUMA node for each process.
    processes = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
    if processes > 1:
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[i % len(cores)]) for i in range(processes))
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    adapter, then = arguments.pop("adapter", None), arguments.pop("then", [])
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in arguments.pop("prompts")]
    sampling = SamplingParams(temperature=0.0, max_tokens=arguments.pop("new"), ignore_eos=True, detokenize=False)
    llm = LLM(skip_tokenizer_init=True, max_model_len=128, max_num_seqs=4, enable_lora=adapter is not None, **arguments)
    lora = None if adapter is None else LoRARequest("adapter", 1, adapter)

    def tokens(lora: LoRARequest | None = None) -> list[list[int]]:
        outputs = llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    result = {"tokens": tokens(lora), "quantization": llm.llm_engine.model_config.quantization, "after": []}
    for calls in then:
        for method, keywords in calls:
            getattr(llm, method)(**keywords)
        result["after"].append(tokens())
    print(f"RESULT {json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
