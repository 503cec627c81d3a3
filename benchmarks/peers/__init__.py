"""Every peer: a module has the peers of one library, which it imports when a weight is prepared."""

from __future__ import annotations

from benchmarks.peers import (
    auto_round,
    bitsandbytes_nf4,
    gemlite_triton,
    ggml_repack,
    gptqmodel_avx512,
    gptqmodel_cuda,
    humming_jit,
    onnx_runtime,
    openvino_cpu,
    torch_dense,
    torch_int4pack,
    torch_tinygemm,
    vllm_ops,
)

PEERS = tuple(
    peer
    for module in (
        torch_dense,
        torch_int4pack,
        onnx_runtime,
        openvino_cpu,
        auto_round,
        bitsandbytes_nf4,
        gptqmodel_avx512,
        ggml_repack,
    )
    for peer in module.PEERS
)

CUDA_PEERS = tuple(
    peer
    for module in (torch_dense, torch_tinygemm, vllm_ops, gptqmodel_cuda, gemlite_triton, humming_jit)
    for peer in module.PEERS
)
