"""ExllamaLinearKernel: what it refuses, what it makes of a layer, and that the results are right."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import exllama_ops
from exllama_ops import kernel as K_
from exllama_ops.kernel import ExllamaLinearKernel, MPLinearLayerConfig, ScalarType
from exllama_ops.layout import pack_columns, pack_rows, unpack_columns, unpack_rows
from exllama_ops.testing.bounds import gamma

pytestmark = pytest.mark.filterwarnings("ignore::exllama_ops.backends.reference.ReferenceBackendWarning")

SYM = [K_.uint2b2, K_.uint3b4, K_.uint4b8, K_.uint8b128]
ASYM = [K_.uint2, K_.uint3, K_.uint4, K_.uint8]
TYPES = SYM + ASYM
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
UNIT = {2: 16, 3: 32, 4: 8, 8: 4}
HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
K, N = 160, 64


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sizes are tiny here: threads that wait for one another on a busy machine take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Case:
    """A weight, the layer that holds it as a checkpoint does, and the dense float64 W that it means."""

    config: MPLinearLayerConfig
    layer: nn.Module
    W: Tensor
    g_idx: Tensor | None

    def kernel(self) -> ExllamaLinearKernel:
        return ExllamaLinearKernel(self.config, "qweight", "scales", "qzeros", "g_idx")

    def processed(self) -> ExllamaLinearKernel:
        kernel = self.kernel()
        kernel.process_weights_after_loading(self.layer)
        return kernel


def parameter(tensor: Tensor, **dims: int) -> nn.Parameter:
    param = nn.Parameter(tensor, requires_grad=False)
    for name, dim in dims.items():
        setattr(param, name, dim)
    return param


def make(
    weight_type: ScalarType = K_.uint4b8,
    act_type: torch.dtype = torch.float16,
    group_size: int = 32,
    mode: str = "none",
    v2: bool = False,
    seed: int = 0,
) -> Case:
    """Modes: none, act_order, k_shard (rows of the last of two parts, global groups), even_shard (no g_idx)."""
    gen = torch.Generator().manual_seed(seed)
    bits, zero_points = weight_type.size_bits, not weight_type.bias
    shard, has_g_idx = mode.endswith("shard"), mode in ("act_order", "k_shard")
    full_K = 2 * K if shard else K
    size = full_K if group_size == -1 else group_size
    full_G = -(-full_K // size)

    groups = torch.arange(full_K) // size
    if has_g_idx:
        groups = groups[torch.randperm(full_K, generator=gen)]
    q = torch.randint(0, 2**bits, (full_K, N), generator=gen)
    stored = torch.randint(0, 2**bits, (full_G, N), generator=gen)
    stored[0, :2] = torch.tensor([0, 2**bits - 1])
    z = stored + (0 if v2 else 1) if zero_points else torch.full((full_G, N), weight_type.bias)
    scales = (torch.rand(full_G, N, generator=gen) * 0.02 + 0.001).half()
    W = scales.double()[groups] * (q - z[groups]).double()

    if shard:
        groups, q, W = groups[K:], q[K:], W[K:]
    if mode == "even_shard":
        kept = groups.unique()
        stored, scales = stored[kept], scales[kept]

    layer = nn.Module()
    layer.qweight = parameter(pack_rows(q, bits), input_dim=0, output_dim=1, packed_dim=0)
    layer.scales = parameter(scales, input_dim=0, output_dim=1)
    if zero_points:
        layer.qzeros = parameter(pack_columns(stored, bits), input_dim=0, output_dim=1, packed_dim=1)
    g_idx = groups.int() if has_g_idx else None
    if g_idx is not None:
        layer.g_idx = parameter(g_idx.clone(), input_dim=0)
    config = MPLinearLayerConfig(
        full_weight_shape=(full_K, N),
        partition_weight_shape=(K, N),
        weight_type=weight_type,
        act_type=act_type,
        group_size=group_size,
        zero_points=zero_points,
        has_g_idx=has_g_idx,
        zero_points_v2=v2,
    )
    return Case(config, layer, W, g_idx)


def make_x(M: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(out: Tensor, x: Tensor, W: Tensor, bias: Tensor | None = None) -> None:
    """A float32 sum, one rounding to the output dtype; and with a bias one of it and one of the total."""
    half_ulp = HALF_ULP[x.dtype]
    floor = torch.finfo(x.dtype).smallest_normal * half_ulp
    exact = x.double() @ W
    bound = half_ulp * exact.abs() + gamma(K + 3) * (x.double().abs() @ W.abs()) + floor
    if bias is not None:
        rounded = bias.to(x.dtype).double()
        bound = bound + half_ulp * rounded.abs() + half_ulp * ((exact + rounded).abs() + bound) + floor
        exact = exact + bias.double()
    assert out.dtype == x.dtype
    assert out.shape == exact.shape
    error = (out.double() - exact).abs()
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"


# --- numerics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_type", DTYPES, ids=str)
@pytest.mark.parametrize("weight_type", TYPES, ids=str)
@pytest.mark.parametrize("mode", ["none", "act_order", "k_shard"])
@pytest.mark.parametrize("group_size", [24, 32, 128, 256, -1])
def test_result_is_within_the_bound_of_float64(group_size, mode, weight_type, act_type):
    # 160 rows: 24 and 128 leave a partial last group, 256 is one partial group.
    case = make(weight_type, act_type, group_size, mode)
    kernel = case.processed()
    for M in (1, 9):
        x = make_x(M, act_type)
        assert_close(kernel.apply_weights(case.layer, x), x, case.W)


@pytest.mark.parametrize("weight_type", ASYM, ids=str)
@pytest.mark.parametrize("mode", ["none", "act_order", "k_shard"])
def test_v2_zero_points_are_taken_as_stored(weight_type, mode):
    case = make(weight_type, mode=mode, v2=True)
    x = make_x(5, torch.float16)
    assert_close(case.processed().apply_weights(case.layer, x), x, case.W)


@pytest.mark.parametrize("weight_type", ASYM, ids=str)
def test_v1_stored_maximum_is_the_zero_point_two_to_the_bits(weight_type):
    bits = weight_type.size_bits
    case = make(weight_type, torch.float32)
    case.layer.scales.data.fill_(1.0)
    case.layer.qweight.data.fill_(0)
    case.layer.qzeros.data.fill_(-1)
    x = torch.zeros(1, K)
    x[0, 3] = 1.0
    out = case.processed().apply_weights(case.layer, x)
    assert torch.equal(out, torch.full((1, N), -(2.0**bits)))


@pytest.mark.parametrize("weight_type", SYM, ids=str)
def test_zero_points_of_the_layer_count_and_the_bias_of_the_type_does_not(weight_type):
    case = make(ScalarType(weight_type.size_bits))
    case.config = replace(case.config, weight_type=weight_type)
    x = make_x(5, torch.float16)
    assert_close(case.processed().apply_weights(case.layer, x), x, case.W)


@pytest.mark.parametrize("weight_type", SYM, ids=str)
def test_the_flag_for_v2_is_not_looked_at_without_zero_points(weight_type):
    case = make(weight_type, v2=True)
    x = make_x(5, torch.float16)
    assert_close(case.processed().apply_weights(case.layer, x), x, case.W)


@pytest.mark.parametrize("group_size", [16, 32, 80, 160, 320, -1])
@pytest.mark.parametrize("weight_type", [K_.uint4b8, K_.uint3], ids=str)
def test_parts_without_g_idx_run_where_groups_and_parts_nest(group_size, weight_type):
    case = make(weight_type, torch.float32, group_size, mode="even_shard")
    x = make_x(5, torch.float32)
    assert_close(case.processed().apply_weights(case.layer, x), x, case.W)


def test_parts_with_activation_order_add_up_to_the_whole():
    case = make(K_.uint4, torch.float32, mode="k_shard")
    full = make_x(4, torch.float32, seed=3), make_x(4, torch.float32, seed=4)
    gen = torch.Generator().manual_seed(0)
    groups = (torch.arange(2 * K) // 32)[torch.randperm(2 * K, generator=gen)]
    q = torch.randint(0, 16, (2 * K, N), generator=gen)
    stored = torch.randint(0, 16, (10, N), generator=gen)
    scales = torch.rand(10, N, generator=gen).half()
    W = scales.double()[groups] * (q - stored[groups] - 1).double()
    total = torch.zeros(4, N, dtype=torch.float64)
    bound = torch.zeros(4, N, dtype=torch.float64)
    for part, x in enumerate(full):
        rows = slice(part * K, (part + 1) * K)
        layer = nn.Module()
        layer.qweight = parameter(pack_rows(q[rows], 4))
        layer.scales, layer.qzeros = parameter(scales), parameter(pack_columns(stored, 4))
        layer.g_idx = parameter(groups[rows].int())
        kernel = case.kernel()
        kernel.process_weights_after_loading(layer)
        total += kernel.apply_weights(layer, x).double()
        bound += gamma(K + 3) * (x.double().abs() @ W[rows].abs())
    exact = torch.cat(full, 1).double() @ W
    assert ((total - exact).abs() <= bound).all()


def test_one_hot_x_gives_the_rows_of_the_checkpoint():
    for mode in ("none", "act_order", "k_shard"):
        case = make(K_.uint3, torch.float32, mode=mode)
        rows = case.processed().apply_weights(case.layer, torch.eye(K))
        assert torch.equal(rows, case.W.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_bias_is_added_after_the_rounding_of_the_product(dtype, bias_dtype):
    case = make(act_type=dtype)
    kernel, x = case.processed(), make_x(7, dtype)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(2)).to(bias_dtype)
    out = kernel.apply_weights(case.layer, x, bias)
    assert_close(out, x, case.W, bias)
    assert torch.equal(out, kernel.apply_weights(case.layer, x) + bias.to(dtype))


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_any_leading_dimensions(lead):
    case = make(mode="act_order")
    kernel = case.processed()
    x = make_x(max(1, torch.Size(lead).numel()), torch.float16)[: torch.Size(lead).numel()]
    out = kernel.apply_weights(case.layer, x.reshape(*lead, K), torch.ones(N, dtype=torch.float16))
    assert out.shape == (*lead, N)
    assert torch.equal(out.reshape(-1, N), kernel.apply_weights(case.layer, x) + 1)


def test_a_strided_x_is_made_contiguous_and_left_as_it_was():
    case = make(mode="act_order")
    kernel, x = case.processed(), make_x(6, torch.float16)
    padded = torch.full((6, K + 8), 9.0, dtype=torch.float16)
    padded[:, 4 : K + 4] = x
    inputs = x, x.t().contiguous().t(), padded[:, 4 : K + 4], x.repeat_interleave(2, 1)[:, ::2]
    assert [given.is_contiguous() for given in inputs] == [True, False, False, False]
    before, padding = x.clone(), padded.clone()
    results = [kernel.apply_weights(case.layer, given) for given in inputs]
    assert all(torch.equal(result, results[0]) for result in results)
    assert all(torch.equal(given, before) for given in inputs)
    assert torch.equal(padded, padding)


def test_gradient_flows_to_x():
    case = make(act_type=torch.float32, mode="act_order")
    x = make_x(3, torch.float32).requires_grad_()
    case.processed().apply_weights(case.layer, x).sum().backward()
    exact = case.W.sum(1).expand(3, K)
    assert ((x.grad.double() - exact).abs() <= 2.0**-22 * case.W.abs().sum(1)).all()


# --- what processing makes of a layer ---------------------------------------------------------------------------------


def test_sorted_weight_has_the_stable_argsort_as_int32_under_its_own_name():
    case = make(mode="act_order")
    kernel = case.processed()
    assert kernel.w_perm_name == "g_idx_perm"
    perm = case.layer.g_idx_perm
    assert perm.dtype == torch.int32
    assert torch.equal(perm, case.g_idx.argsort(stable=True).int())
    assert torch.equal(case.layer.g_idx, case.g_idx)
    assert case.layer.qweight_shuffled is True


def test_shuffled_weight_holds_the_rows_in_the_order_of_the_permutation():
    for weight_type in TYPES:
        case = make(weight_type, mode="act_order")
        rows = unpack_rows(case.layer.qweight.data.clone(), weight_type.size_bits)
        case.processed()
        shuffled = unpack_rows(case.layer.qweight.data, weight_type.size_bits, "shuffled")
        assert torch.equal(shuffled, rows[case.g_idx.argsort(stable=True)])


@pytest.mark.parametrize("zero_points", [False, True])
def test_no_g_idx_gives_an_empty_permutation_and_no_g_idx(zero_points):
    case = make(K_.uint4 if zero_points else K_.uint4b8)
    case.processed()
    assert case.layer.g_idx_perm.shape == (0,)
    assert case.layer.g_idx_perm.dtype == torch.int32
    assert not hasattr(case.layer, "g_idx")


@pytest.mark.parametrize("g_idx", [torch.arange(K) // 32, torch.zeros(K, dtype=torch.long)], ids=["trivial", "zeros"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_trivial_g_idx_is_no_activation_order(g_idx, dtype):
    case = make()
    case.layer.g_idx = parameter(g_idx.to(dtype))
    case.config = replace(case.config, has_g_idx=True)
    x = make_x(5, torch.float16)
    assert_close(case.processed().apply_weights(case.layer, x), x, case.W)
    assert case.layer.g_idx_perm.numel() == 0
    assert torch.equal(case.layer.g_idx, g_idx.int())


def test_zeros_in_g_idx_are_group_zero_where_the_scales_are_those_of_the_full_weight():
    case = make(K_.uint4, torch.float32, group_size=K, mode="k_shard")
    case.layer.g_idx.data.zero_()
    q = unpack_rows(case.layer.qweight.data, 4)
    z = unpack_columns(case.layer.qzeros.data, 4)[0] + 1
    rows = case.processed().apply_weights(case.layer, torch.eye(K))
    assert torch.equal(rows, (q - z).float() * case.layer.scales[0].float())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_groups_of_unequal_sizes_are_filled_up(dtype, stride):
    case = make(K_.uint4, mode="k_shard")
    case.layer.g_idx = parameter(case.g_idx.to(dtype).repeat_interleave(stride)[::stride])
    kernel = case.processed()
    assert torch.equal(case.layer.g_idx, case.g_idx)
    rows, in_features = case.layer.qweight.shape[0] * 8, case.g_idx.numel()
    assert rows > in_features
    assert case.layer.g_idx_perm.numel() == rows + in_features
    assert case.layer.scales.shape[0] * case.layer.qweight_group_size >= rows
    x = make_x(3, torch.float16)
    assert_close(kernel.apply_weights(case.layer, x), x, case.W)


@pytest.mark.parametrize("weight_type", SYM, ids=str)
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_synthesised_zero_points_are_v1_words_of_the_bias_minus_one(weight_type, group_size):
    bits = weight_type.size_bits
    stream = sum((weight_type.bias - 1) << (bits * j) for j in range(96 // bits if bits == 3 else 32 // bits))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(3 if bits == 3 else 1)]
    assert words == {2: [0x55555555], 3: [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], 4: [0x77777777], 8: [0x7F7F7F7F]}[bits]
    case = make(weight_type, group_size=group_size)
    case.processed()
    groups = case.layer.scales.shape[0]
    assert case.layer.qzeros.dtype == torch.int32
    assert case.layer.qzeros.shape == (groups, N * bits // 32)
    expected = torch.tensor(words).repeat(N * bits // 32 // len(words)).expand(groups, -1)
    assert torch.equal(case.layer.qzeros.long() & 0xFFFFFFFF, expected)


def test_synthesised_zero_points_have_a_row_for_every_row_of_the_scales_of_a_part():
    case = make(K_.uint4b8, mode="k_shard")
    case.processed()
    assert case.layer.qzeros.shape[0] == case.layer.scales.shape[0] == 10


@pytest.mark.parametrize(
    ("given", "name"), [(None, "qzeros"), ("weight_zero_point", "weight_zero_point")], ids=["unnamed", "named"]
)
def test_synthesised_zero_points_get_the_given_name(given, name):
    case = make()
    kernel = ExllamaLinearKernel(case.config, "qweight", "scales", given)
    kernel.process_weights_after_loading(case.layer)
    assert sorted(dict(case.layer.named_parameters())) == sorted(["qweight", "scales", name, "g_idx_perm"])
    x = make_x(2, torch.float16)
    assert_close(kernel.apply_weights(case.layer, x), x, case.W)


def test_parameters_keep_their_names_and_say_their_new_layout():
    case = make(K_.uint4, mode="act_order")
    layer = nn.Module()
    names = {
        "qweight": "weight_packed",
        "scales": "weight_scale",
        "qzeros": "weight_zero_point",
        "g_idx": "weight_g_idx",
    }
    for old, new in names.items():
        setattr(layer, new, getattr(case.layer, old))
    layer.other = nn.Parameter(torch.ones(1))
    other = layer.other
    kernel = ExllamaLinearKernel(case.config, *names.values())
    kernel.process_weights_after_loading(layer)
    assert sorted(dict(layer.named_parameters())) == sorted([*names.values(), "weight_g_idx_perm", "other"])
    assert layer.other is other
    assert not any(p.requires_grad for name, p in layer.named_parameters() if name != "other")
    dims = {name: getattr(layer, name).__dict__ for name in names.values()}
    assert dims == {
        "weight_packed": {"input_dim": 0, "output_dim": 1, "packed_dim": 0},
        "weight_scale": {"input_dim": 0, "output_dim": 1},
        "weight_zero_point": {"input_dim": 0, "output_dim": 1, "packed_dim": 1},
        "weight_g_idx": {"input_dim": 0},
    }
    x = make_x(2, torch.float16)
    assert_close(kernel.apply_weights(layer, x), x, case.W)


TRANSPOSED = {
    "qweight": {"input_dim": 1, "output_dim": 0, "packed_dim": 1},
    "scales": {"input_dim": 1, "output_dim": 0},
    "qzeros": {"input_dim": 1, "output_dim": 0, "packed_dim": 0},
}


@pytest.mark.parametrize("weight_type", [K_.uint4b8, K_.uint2, K_.uint3, K_.uint8], ids=str)
@pytest.mark.parametrize("said", [("input_dim",), ("output_dim",), ("input_dim", "output_dim")], ids=str)
@pytest.mark.parametrize("mode", ["none", "act_order", "k_shard"])
def test_output_first_parameters_are_permuted(weight_type, said, mode):
    case = make(weight_type, mode=mode)
    expected = copy.deepcopy(case)
    expected.processed()
    for name, dims in TRANSPOSED.items():
        if hasattr(case.layer, name):
            told = {dim: value for dim, value in dims.items() if dim in (*said, "packed_dim")}
            setattr(case.layer, name, parameter(getattr(case.layer, name).data.t().contiguous(), **told))
    kernel = case.processed()
    for name in TRANSPOSED:
        param = getattr(case.layer, name)
        assert param.is_contiguous()
        assert torch.equal(param, getattr(expected.layer, name))
    x = make_x(3, torch.float16)
    assert_close(kernel.apply_weights(case.layer, x), x, case.W)


@pytest.mark.parametrize("mode", ["none", "act_order", "k_shard"])
def test_parameters_without_dims_are_taken_to_be_input_first(mode):
    case = make(K_.uint3, mode=mode)
    for name in TRANSPOSED:
        setattr(case.layer, name, parameter(getattr(case.layer, name).data))
    x = make_x(3, torch.float16)
    assert_close(case.processed().apply_weights(case.layer, x), x, case.W)


def test_buffers_and_plain_tensors_become_parameters_of_the_same_names():
    case = make(K_.uint4, mode="act_order")
    layer = nn.Module()
    layer.register_buffer("qweight", case.layer.qweight.data)
    layer.register_buffer("g_idx", case.layer.g_idx.data)
    layer.scales, layer.qzeros = case.layer.scales.data, case.layer.qzeros.data
    case.layer = layer
    x = make_x(3, torch.float16)
    assert_close(case.processed().apply_weights(layer, x), x, case.W)
    assert sorted(layer.state_dict()) == ["g_idx", "g_idx_perm", "qweight", "qzeros", "scales"]


def test_a_g_idx_that_the_config_does_not_speak_of_is_left_alone():
    case = make()
    case.layer.g_idx = g_idx = parameter(torch.arange(K).flip(0).int())
    x = make_x(3, torch.float16)
    assert_close(case.processed().apply_weights(case.layer, x), x, case.W)
    assert case.layer.g_idx is g_idx
    assert torch.equal(g_idx, torch.arange(K).flip(0).int())


def test_the_loaded_tensors_are_not_written_to():
    for mode in ("none", "act_order", "k_shard"):
        case = make(K_.uint4, mode=mode)
        loaded = {name: param.data for name, param in case.layer.named_parameters()}
        before = {name: tensor.clone() for name, tensor in loaded.items()}
        case.processed()
        assert all(torch.equal(loaded[name], before[name]) for name in loaded)
        assert case.layer.qweight.data_ptr() != loaded["qweight"].data_ptr()


@pytest.mark.parametrize(
    ("given", "act_type", "exact_in", "expected"),
    [
        (torch.float16, torch.float16, torch.float16, torch.float16),
        (torch.float16, torch.float32, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float16, torch.float16),
        (torch.float16, torch.bfloat16, torch.float8_e5m2, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float16, torch.float16),
        (torch.float32, torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_scales_are_cast_to_the_activations_dtype_if_that_is_exact(given, act_type, exact_in, expected):
    case = make(act_type=act_type)
    values = (torch.rand(case.layer.scales.shape, generator=torch.Generator().manual_seed(5)) + 0.01).to(exact_in)
    case.layer.scales = parameter(values.to(given))
    case.processed()
    assert case.layer.scales.dtype == expected
    assert torch.equal(case.layer.scales.double(), values.double())


def test_a_processed_layer_survives_deepcopy():
    for mode in ("none", "act_order", "k_shard"):
        case = make(mode=mode)
        kernel, x = case.processed(), make_x(3, torch.float16)
        twin = copy.deepcopy(case.layer)
        assert torch.equal(kernel.apply_weights(twin, x), kernel.apply_weights(case.layer, x))


def test_one_kernel_serves_a_layer_that_is_filled_and_one_that_is_not():
    raw = make(K_.uint4, group_size=128, mode="act_order")
    raw.layer.g_idx.data[:] = torch.where(torch.arange(K) < 3, 1, 0)
    ordered = make(K_.uint4, group_size=128, mode="act_order")
    kernel, x = ordered.processed(), make_x(3, torch.float16)
    kernel.process_weights_after_loading(raw.layer)
    assert (ordered.layer.qweight_group_size, raw.layer.qweight_group_size != 128) == (128, True)
    assert_close(kernel.apply_weights(ordered.layer, x), x, ordered.W)


# --- refusals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VllmScalarType:
    """The fields of vLLM's ScalarType."""

    exponent: int
    mantissa: int
    signed: bool
    bias: int

    @property
    def size_bits(self) -> int:
        return self.exponent + self.mantissa + int(self.signed)

    def __str__(self) -> str:
        return f"vllm-{self.exponent}-{self.mantissa}-{self.signed}-{self.bias}"


def config(**changes) -> MPLinearLayerConfig:
    base = MPLinearLayerConfig((256, 64), (256, 64), K_.uint4b8, torch.float16, 32, zero_points=False)
    return replace(base, **changes)


SUPPORTED = "supported are uint2b2, uint3b4, uint4b8, uint8b128, uint2, uint3, uint4, uint8"
FLOATS = "supported are torch.float16, torch.bfloat16, torch.float32"


def words(name: str, unit: int, bits: int, got: int) -> str:
    return (
        f"{name} must be a positive multiple of {unit}, the {bits}-bit values that fill whole 32-bit words; got {got}"
    )


N_FEATURES, K_FEATURES = "output features N", "input features K"
REFUSALS = [
    *(
        ({"weight_type": t, "full_weight_shape": (k, n), "partition_weight_shape": (k, n)}, text)
        for t in SYM
        for unit in [UNIT[t.size_bits]]
        for k, n, text in [
            (256, 64 + unit // 2, words(N_FEATURES, unit, t.size_bits, 64 + unit // 2)),
            (256 + unit // 2, 64, words(K_FEATURES, unit, t.size_bits, 256 + unit // 2)),
            (256, 0, words(N_FEATURES, unit, t.size_bits, 0)),
            (0, 64, words(K_FEATURES, unit, t.size_bits, 0)),
        ]
    ),
    *(
        ({"weight_type": t}, f"weight type {t} has no bias, so the layer needs zero points; got zero_points=False")
        for t in ASYM
    ),
    *(
        ({"act_type": t}, f"activation type {t} is not supported; {FLOATS}")
        for t in (torch.float64, torch.int8, torch.float8_e4m3fn)
    ),
    *(
        ({"weight_type": t}, f"weight type {t} is not supported; {SUPPORTED}")
        for t in (
            ScalarType(4, 7), ScalarType(5, 16), ScalarType(8, 1), torch.uint8, VllmScalarType(0, 3, True, 0),
            VllmScalarType(0, 7, True, 0), VllmScalarType(8, 0, False, 0), VllmScalarType(4, 3, True, 0),
            VllmScalarType(0, 6, False, 32),
        )
    ),
    *(
        ({"group_size": size}, f"group size must be at least 1, or -1 for one group; got {size}")
        for size in (0, -2, -128)
    ),
    (
        {"partition_weight_shape": (512, 64)},
        "the partition (K, N) = (512, 64) must lie within the full weight; got (256, 64)",
    ),
    (
        {"partition_weight_shape": (256, 128)},
        "the partition (K, N) = (256, 128) must lie within the full weight; got (256, 64)",
    ),
    (
        {"partition_weight_shape": (128, 64), "group_size": 96},
        "group size 96 and the K=128 of 256 input features that the partition has must divide one another in a layer "
        "without g_idx",
    ),
    (
        {"weight_type": K_.uint3, "act_type": torch.int8, "full_weight_shape": (100, 100),
         "partition_weight_shape": (36, 40), "group_size": -7},
        "weight type uint3 has no bias, so the layer needs zero points; got zero_points=False; "
        f"activation type torch.int8 is not supported; {FLOATS}; "
        + words(N_FEATURES, 32, 3, 40) + "; " + words(K_FEATURES, 32, 3, 36)
        + "; group size must be at least 1, or -1 for one group; got -7",
    ),
    (
        {"weight_type": ScalarType(4, 7), "full_weight_shape": (100, 100), "partition_weight_shape": (100, 100)},
        f"weight type uint4b7 is not supported; {SUPPORTED}; "
        + words(N_FEATURES, 8, 4, 100) + "; " + words(K_FEATURES, 8, 4, 100),
    ),
    (
        {"weight_type": ScalarType(7), "act_type": torch.float64, "group_size": 0},
        f"weight type uint7 is not supported; {SUPPORTED}; activation type torch.float64 is not supported; {FLOATS}; "
        "group size must be at least 1, or -1 for one group; got 0",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), REFUSALS, ids=range(len(REFUSALS)))
def test_refused_with_every_reason_and_its_value(changes, reason):
    assert ExllamaLinearKernel.can_implement(config(**changes)) == (False, reason)
    with pytest.raises(ValueError, match=r"^ExllamaLinearKernel: ") as error:
        ExllamaLinearKernel(config(**changes), "qweight", "scales", "qzeros", "g_idx")
    assert str(error.value) == f"ExllamaLinearKernel: {reason}"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"act_type": torch.bfloat16},
        {"act_type": torch.float32},
        *({"weight_type": t, "zero_points": True} for t in TYPES),
        *({"weight_type": t, "full_weight_shape": (u, u), "partition_weight_shape": (u, u)}
          for t in SYM for u in [UNIT[t.size_bits]]),
        {"group_size": -1},
        {"group_size": 1},
        {"group_size": 100},
        {"group_size": 1000},
        {"partition_weight_shape": (128, 64), "group_size": -1},
        {"partition_weight_shape": (128, 64), "group_size": 256},
        {"partition_weight_shape": (128, 32)},
        {"partition_weight_shape": (128, 64), "has_g_idx": True, "group_size": 96},
        {"weight_type": VllmScalarType(0, 4, False, 8)},
        {"weight_type": VllmScalarType(0, 8, False, 0), "zero_points": True},
    ],
    ids=str,
)  # fmt: skip
def test_implemented(changes):
    assert ExllamaLinearKernel.can_implement(config(**changes)) == (True, None)


def test_interface():
    assert exllama_ops.ExllamaLinearKernel is ExllamaLinearKernel
    assert ExllamaLinearKernel.get_min_capability() == 60
    assert list(map(str, ExllamaLinearKernel.SUPPORTED_QUANT_TYPES)) == [
        "uint2b2", "uint3b4", "uint4b8", "uint8b128", "uint2", "uint3", "uint4", "uint8",
    ]  # fmt: skip
    assert all(K_.__dict__[str(t)] is t for t in ExllamaLinearKernel.SUPPORTED_QUANT_TYPES)
    assert [t.has_bias() for t in TYPES] == [True] * 4 + [False] * 4


def test_a_vllm_scalar_type_computes_as_ours():
    for own, theirs in ((K_.uint3b4, VllmScalarType(0, 3, False, 4)), (K_.uint4, VllmScalarType(0, 4, False, 0))):
        case = make(own, mode="act_order")
        case.config = replace(case.config, weight_type=theirs)
        x = make_x(3, torch.float16)
        assert_close(case.processed().apply_weights(case.layer, x), x, case.W)


def test_names_that_the_config_needs_must_be_given():
    with pytest.raises(ValueError, match=r"^ExllamaLinearKernel: zero_points=True needs a w_zp_param_name; got None$"):
        ExllamaLinearKernel(config(zero_points=True), "qweight", "scales")
    with pytest.raises(ValueError, match=r"^ExllamaLinearKernel: has_g_idx=True needs a w_gidx_param_name; got None$"):
        ExllamaLinearKernel(config(has_g_idx=True), "qweight", "scales", "qzeros")


def snapshot(layer: nn.Module) -> dict:
    return {name: (param, param.data.clone(), dict(vars(param))) for name, param in layer.named_parameters()}


def assert_untouched(layer: nn.Module, before: dict) -> None:
    after = dict(layer.named_parameters())
    assert after.keys() == before.keys()
    for name, (param, data, dims) in before.items():
        assert after[name] is param
        assert torch.equal(param.data, data)
        assert vars(param) == dims
    assert not hasattr(layer, "qweight_shuffled")


def without(name):
    return lambda layer: delattr(layer, name)


def with_tensor(name, tensor, **dims):
    return lambda layer: setattr(layer, name, parameter(tensor, **dims))


def set_data(name, index, value):
    def change(layer):
        getattr(layer, name).data[index] = value

    return change


INT = torch.int32
BROKEN = [
    (without("qweight"), "the layer has no parameter 'qweight'"),
    (without("scales"), "the layer has no parameter 'scales'"),
    (without("qzeros"), "the layer has no parameter 'qzeros'"),
    (without("g_idx"), "the layer has no parameter 'g_idx'"),
    (
        with_tensor("qweight", torch.zeros(24, N, dtype=INT)),
        "'qweight' must have shape (K*bits/32, N) = (20, 64) for K=160, N=64, bits=4, in (input, "
        "output) order; got (24, 64)",
    ),
    (
        with_tensor("qweight", torch.zeros(20, N, dtype=INT), input_dim=1, output_dim=0, packed_dim=1),
        "'qweight' must have shape (K*bits/32, N) = (20, 64) for K=160, N=64, bits=4, in (input, "
        "output) order; got (64, 20)",
    ),
    (with_tensor("qweight", torch.zeros(20, N)), "'qweight' must be torch.int32; got torch.float32"),
    (
        with_tensor("qweight", torch.zeros(20, N, 1, dtype=INT)),
        "'qweight' must have 2 dimensions; got shape (20, 64, 1)",
    ),
    (
        with_tensor("qweight", torch.zeros(K, 8, dtype=INT), input_dim=0, output_dim=1, packed_dim=1),
        "'qweight' must be packed along its input dimension, packed_dim=0; got packed_dim=1",
    ),
    (
        with_tensor("qweight", torch.zeros(20, N, dtype=INT), input_dim=1, output_dim=1),
        "'qweight' must have input_dim and output_dim 0 and 1, in any order; got (1, 1)",
    ),
    (
        with_tensor("scales", torch.zeros(5, 32, dtype=torch.float16)),
        "'scales' must have shape (G, N) = (5, 64) for N=64, in (input, output) order; got (5, 32)",
    ),
    (
        with_tensor("scales", torch.zeros(5, N, dtype=torch.float64)),
        "'scales' must be one of torch.float16, torch.bfloat16, torch.float32; got torch.float64",
    ),
    (
        with_tensor("scales", torch.zeros(5, N, dtype=torch.float16, device="meta")),
        "'scales' must be on cpu like the weight; got meta",
    ),
    (
        with_tensor("qzeros", torch.zeros(4, 8, dtype=INT)),
        "'qzeros' must have shape (G, N*bits/32) = (5, 8) for G=5, N=64, bits=4, in (input, output) order; got (4, 8)",
    ),
    (
        with_tensor("qzeros", torch.zeros(1, N, dtype=INT), input_dim=0, output_dim=1, packed_dim=0),
        "'qzeros' must be packed along its output dimension, packed_dim=1; got packed_dim=0",
    ),
    (
        with_tensor("g_idx", torch.zeros(K - 1, dtype=INT)),
        "'g_idx' must have shape (K,) = (160,) for K=160, in (input, output) order; got (159,)",
    ),
    (with_tensor("g_idx", torch.zeros(K)), "'g_idx' must be one of torch.int32, torch.int64; got torch.float32"),
    (
        set_data("g_idx", 7, 5),
        "'g_idx' must hold groups in [0, G) for the G=5 rows of 'scales'; got values from 0 to 5",
    ),
    (
        set_data("g_idx", 7, -1),
        "'g_idx' must hold groups in [0, G) for the G=5 rows of 'scales'; got values from -1 to 4",
    ),
]


@pytest.mark.parametrize(("break_layer", "text"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_layer_is_refused_and_left_as_it_was(break_layer, text):
    case = make(K_.uint4, mode="act_order")
    break_layer(case.layer)
    kernel, before = case.kernel(), snapshot(case.layer) if "meta" not in text else None
    with pytest.raises(ValueError, match=r"^ExllamaLinearKernel: ") as error:
        kernel.process_weights_after_loading(case.layer)
    assert str(error.value) == f"ExllamaLinearKernel: {text}"
    if before is not None:
        assert_untouched(case.layer, before)


@pytest.mark.parametrize(("mode", "group_size", "G"), [("none", 128, 2), ("even_shard", 32, 5), ("even_shard", -1, 1)])
def test_without_g_idx_the_scales_have_the_groups_of_the_part(mode, group_size, G):
    case = make(group_size=group_size, mode=mode)
    case.layer.scales = parameter(torch.zeros(G + 1, N, dtype=torch.float16))
    before = snapshot(case.layer)
    with pytest.raises(ValueError, match=r"'scales' must have shape \(G, N\)") as error:
        case.processed()
    size = 2 * K if group_size == -1 else group_size
    assert str(error.value) == (
        f"ExllamaLinearKernel: 'scales' must have shape (G, N) = ({G}, 64) for K=160, N=64, group_size={size}, in "
        f"(input, output) order; got ({G + 1}, 64)"
    )
    assert_untouched(case.layer, before)


@pytest.mark.parametrize("mode", ["none", "act_order", "k_shard"])
def test_a_layer_is_processed_once(mode):
    case = make(K_.uint4, mode=mode)
    case.processed()
    x = make_x(3, torch.float16)
    for kernel in (case.kernel(), case.kernel()):
        before = {name: (param, param.data.clone()) for name, param in case.layer.named_parameters()}
        with pytest.raises(ValueError, match=r"^ExllamaLinearKernel: the layer's 'qweight' was processed before; "):
            kernel.process_weights_after_loading(case.layer)
        after = dict(case.layer.named_parameters())
        assert all(after[name] is param and torch.equal(param, data) for name, (param, data) in before.items())
        assert_close(kernel.apply_weights(case.layer, x), x, case.W)


def test_a_layer_is_processed_before_it_is_applied():
    case = make()
    with pytest.raises(ValueError, match=r"^ExllamaLinearKernel: the layer's 'qweight' must be processed before"):
        case.kernel().apply_weights(case.layer, make_x(1, torch.float16))


def test_x_of_another_size_or_dtype_is_refused():
    case = make()
    kernel = case.processed()
    text = r"^ExllamaLinearKernel: x must have shape \(\*, K\) with K=160; got \(2, 3, 80\)$"
    with pytest.raises(ValueError, match=text):
        kernel.apply_weights(case.layer, torch.zeros(2, 3, 80, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"x must be one of .*; got torch\.float64"):
        kernel.apply_weights(case.layer, torch.zeros(2, K, dtype=torch.float64))


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (1,)], ids=str)
@pytest.mark.parametrize("mode", ["none", "act_order", "k_shard"])
def test_compiles_into_one_graph_for_two_tokens_or_more(mode, lead):
    torch._dynamo.reset()
    case = make(K_.uint4, mode=mode)
    kernel, bias = case.processed(), torch.ones(N, dtype=torch.float16)
    counter = CompileCounterWithBackend("aot_eager")

    def apply(x: Tensor) -> Tensor:
        return kernel.apply_weights(case.layer, x, bias)

    compiled = torch.compile(apply, fullgraph=True, backend=counter)
    for M in (2, 3, 8, 33):
        x = make_x(M, torch.float16).view(*lead, M, K)
        torch._dynamo.mark_dynamic(x, len(lead))
        assert torch.equal(compiled(x), apply(x))
    assert counter.frame_count == 1
    targets = [node.target for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.exllama.gptq_gemm) == 1

    x = make_x(1, torch.float16).view(*lead, 1, K)
    assert torch.equal(compiled(x), apply(x))
    assert counter.frame_count == 2


def test_a_processed_state_dict_in_a_fresh_layer_is_not_processed_again():
    """The permutation beside the weight is what a state_dict carries of its having been processed."""
    case = make(mode="act_order")
    kernel = case.processed()
    fresh = nn.Module()
    for name, tensor in case.layer.state_dict().items():
        setattr(fresh, name, nn.Parameter(tensor.clone(), requires_grad=False))
    before = fresh.qweight.clone()
    with pytest.raises(ValueError, match="was processed before"):
        kernel.process_weights_after_loading(fresh)
    assert torch.equal(fresh.qweight, before)


def test_a_config_of_vllm_serves_without_the_fields_it_lacks():
    case = make(mode="none")
    fields = {field.name: getattr(case.config, field.name) for field in dataclasses.fields(case.config)}
    del fields["zero_points_v2"], fields["has_g_idx"]
    foreign = SimpleNamespace(**fields)
    assert ExllamaLinearKernel.can_implement(foreign) == (True, None)
    kernel = ExllamaLinearKernel(foreign, "qweight", "scales", "qzeros")
    kernel.process_weights_after_loading(case.layer)
    x = make_x(3, torch.float16)
    assert_close(kernel.apply_weights(case.layer, x), x, case.W)
