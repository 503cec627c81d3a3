"""onnxruntime's MatMulNBits, with float32 products (accuracy level 1) or int8 activations (4)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Peer, needs


def _packed(values: Tensor, bits: int) -> Tensor:
    """(..., n) integers -> (..., n * bits / 8) uint8, the first value in the lowest bits."""
    per_byte = 8 // bits
    parts = torch.nn.functional.pad(values, (0, -values.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    packed: Tensor = (parts << shifts).sum(-1, dtype=torch.uint8)
    return packed


def _prepare(accuracy_level: int, weight: Weight, threads: int) -> Layer:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    needs(weight, bits=(2, 4, 8))
    case = weight.case
    tensors = {
        "B": _packed(weight.q.t().reshape(case.N, -1, case.group_size), case.bits),
        "scales": weight.scales.t().float().contiguous().flatten(),
        "zero_points": _packed(weight.zeros.t(), case.bits).flatten(),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", K=case.K, N=case.N, bits=case.bits,
        block_size=case.group_size, accuracy_level=accuracy_level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", case.K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", case.N])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=9)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Its threads must not spin into the next kernel's time.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def take(x: Tensor) -> dict[str, object]:
        return {"x": x.float().numpy()}

    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return Layer(take, lambda x: session.run(None, x)[0], torch.from_numpy, nbytes)


PEERS = (
    Peer("onnxruntime accuracy 1", partial(_prepare, 1), packages=("onnxruntime",)),
    Peer("onnxruntime accuracy 4", partial(_prepare, 4), packages=("onnxruntime",)),
)
