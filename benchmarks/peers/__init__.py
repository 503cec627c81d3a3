"""Every peer: a module has the peers of one library, which it imports when a weight is prepared."""

from __future__ import annotations

from benchmarks.peers import (
    auto_round,
    bitsandbytes_nf4,
    ggml_repack,
    gptqmodel_avx512,
    onnx_runtime,
    openvino_cpu,
    torch_dense,
    torch_int4pack,
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
