"""Warp-wide instructions, tensor-core products, atomics, calls and device variables against numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ptx_emulator.emulator import Emulator, build

SOURCE = Path(__file__).parent / "kernels" / "warp.cu"
LANES = np.arange(32)


@pytest.fixture(scope="module")
def library() -> Path:
    return build([SOURCE])


@pytest.fixture
def emulator(library: Path) -> Emulator:
    return Emulator(library)


def lanes(emulator: Emulator, kernel: str, given: np.ndarray, count: int = 32) -> np.ndarray:
    given = np.ascontiguousarray(given)
    got = np.zeros(count, np.uint32)
    emulator.launch(kernel, [1], [32], [given.ctypes.data, got.ctypes.data])
    return got


def shuffled(source: np.ndarray, valid: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: a[np.where(valid, source, LANES)]


def bits(values: np.ndarray) -> int:
    return sum(1 << lane for lane in LANES if values[lane])


EXPECTED: dict[str, Callable[[np.ndarray], np.ndarray | int]] = {
    "shfl_up": shuffled(LANES - 3, LANES % 16 >= 3),
    "shfl_down": shuffled(LANES + 5, LANES % 8 < 3),
    "shfl_xor": shuffled(LANES ^ 9, LANES >= 0),
    "shfl_idx": lambda a: a[a & 31],
    "shfl_idx_16": lambda a: a[LANES // 16 * 16 + 4],
    "ballot": lambda a: bits(a & 1),
    "any": lambda a: 1 + 4,
    "match_any": lambda a: np.array([bits(a % 3 == a[lane] % 3) for lane in LANES]),
    "redux_add": lambda a: int(a.sum()) & 0xFFFFFFFF,
    "redux_min": lambda a: int(a.astype(np.int32).min()) & 0xFFFFFFFF,
    "redux_max": lambda a: int(a.max()),
    "redux_xor": lambda a: int(np.bitwise_xor.reduce(a)),
    "even_lanes_only": lambda a: np.where(LANES % 2, 77, a[LANES ^ 2]),
    "count_of_votes": lambda a: int((a & 1).sum()) + 100,
}


@pytest.mark.parametrize("kernel", EXPECTED)
@pytest.mark.parametrize("order", ["ascending", "random"])
def test_warp_instruction(emulator: Emulator, kernel: str, order: str) -> None:
    emulator.set_order(order, seed=5)
    given = np.random.default_rng(1).integers(1, 2**32, 32, dtype=np.uint32)
    expected = np.broadcast_to(EXPECTED[kernel](given.copy()), 32)
    np.testing.assert_array_equal(lanes(emulator, kernel, given), expected.astype(np.uint32))


def test_ldmatrix_deals_out_rows_and_transposed_columns(emulator: Emulator) -> None:
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    for kernel, stored in (("ldmatrix_x4", matrices), ("ldmatrix_x4_trans", matrices.transpose(0, 2, 1))):
        got = lanes(emulator, kernel, matrices, 128).reshape(32, 4)
        for matrix in range(4):
            expected = np.ascontiguousarray(stored[matrix]).reshape(32, 2)
            np.testing.assert_array_equal(got[:, matrix].copy().view(np.uint16).reshape(32, 2), expected)


# --- mma: fragments laid out by the figures of PTX ISA (mma.m16n8k16: A, B and C), here once more, from k, m and n


def fragments(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The words of a (16 x K), b (K x 8) and c (16 x 8) in the order of warp.cu."""
    per_word = 4 // a.itemsize
    words_a = a.reshape(2, 8, 2, 4, per_word).transpose(
        1, 3, 2, 0, 4
    )  # row half, g, k half, t, i -> g, t, k half, row half
    words_b = b.T.reshape(8, 2, 4, per_word).transpose(0, 2, 1, 3)  # g, k half, t, i -> g, t, k half
    words_c = c.reshape(2, 8, 4, 2).transpose(1, 2, 0, 3)  # row half, g, t, i -> g, t, row half
    return np.concatenate([np.ascontiguousarray(w).reshape(-1).view(np.uint32) for w in (words_a, words_b, words_c)])


def unpacked(words: np.ndarray, dtype: type) -> np.ndarray:
    """The 16 x 8 result."""
    return words.view(dtype).reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8)


def as_bf16(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bits, and what they stand for."""
    words = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return words, (words.astype(np.uint32) << 16).view(np.float32)


def product(emulator: Emulator, kernel: str, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the kernel gives, the exact result, and the sum of magnitudes that its error is measured in."""
    random = np.random.default_rng(2)
    k = 32 if kernel.endswith("s8") else 16
    a, b, c = (random.standard_normal(shape) * scale for shape in ((16, k), (k, 8), (16, 8)))
    if kernel.endswith("s8"):
        a, b, c = (np.clip(x * 50, -128, 127).astype(np.int8) for x in (a, b, c))
        c = c.astype(np.int32) * 1000
        values_a, values_b, dtype = a, b, np.int32
    else:
        c, dtype = c.astype(np.float32), np.float32
        (a, values_a), (b, values_b) = (
            as_bf16(x) if kernel.endswith("bf16") else (x.astype(np.float16), x.astype(np.float16)) for x in (a, b)
        )
    x, y = values_a.astype(np.float64), values_b.astype(np.float64)
    got = unpacked(lanes(emulator, kernel, fragments(a, b, c), 128), dtype)
    return got, x @ y + c, np.abs(x) @ np.abs(y) + np.abs(c)


@pytest.mark.parametrize("truncates", [False, True], ids=["nearest", "truncating"])
@pytest.mark.parametrize("kernel", ["mma_f16", "mma_bf16", "two_mma_f16", "two_mma_bf16"])
def test_mma_is_the_product_to_the_error_of_its_mode(emulator: Emulator, kernel: str, truncates: bool) -> None:
    emulator.set_mma(truncates=truncates)
    got, exact, magnitude = product(emulator, kernel)
    # 16 roundings to nearest, or 4 steps that each cut 5 terms and the result at 2^-23 of at most 2 * magnitude
    bound = 4 * 6 * 2.0**-22 * magnitude if truncates else 16 * 2.0**-24 * magnitude
    assert (np.abs(got - exact) <= bound).all()


@pytest.mark.parametrize("kernel", ["mma_s8", "two_mma_s8"])
def test_integer_mma_is_exact(emulator: Emulator, kernel: str) -> None:
    got, exact, _ = product(emulator, kernel)
    np.testing.assert_array_equal(got, exact)


def test_integer_mma_wraps_or_saturates(emulator: Emulator) -> None:
    a, b, c = np.ones((16, 32), np.int8), np.ones((32, 8), np.int8), np.full((16, 8), 2**31 - 10, np.int32)
    for kernel, expected in (("mma_s8", -(2**31) + 22), ("saturating_s8", 2**31 - 1)):
        assert (unpacked(lanes(emulator, kernel, fragments(a, b, c), 128), np.int32) == expected).all()


def test_two_products_of_half_depth_are_one(emulator: Emulator) -> None:
    for kind in ("f16", "bf16"):
        np.testing.assert_array_equal(product(emulator, f"mma_{kind}")[0], product(emulator, f"two_mma_{kind}")[0])


def test_a_wrong_fragment_index_is_a_wrong_product(emulator: Emulator) -> None:
    got, exact, magnitude = product(emulator, "mma_swapped")
    assert (np.abs(got - exact) > 0.01 * magnitude).mean() > 0.5


def single(emulator: Emulator, terms: list[tuple[float, float]], c: float) -> float:
    """Element (0, 0) of a product with these factors along k."""
    a, b, accumulator = np.zeros((16, 16), np.float16), np.zeros((16, 8), np.float16), np.zeros((16, 8), np.float32)
    for k, (x, y) in enumerate(terms):
        a[0, k], b[k, 0] = x, y
    accumulator[0, 0] = c
    return float(unpacked(lanes(emulator, "mma_f16", fragments(a, b, accumulator), 128), np.float32)[0, 0])


def test_the_truncating_mode_cuts_off_what_the_nearest_mode_rounds(emulator: Emulator) -> None:
    three_quarters_of_an_ulp = [(2.0**-12, 1.5 * 2.0**-12)]
    assert single(emulator, three_quarters_of_an_ulp, 1.0) == 1 + 2.0**-23
    emulator.set_mma(truncates=True)
    assert single(emulator, three_quarters_of_an_ulp, 1.0) == 1.0
    assert single(emulator, [(2.0**-12, 2.0**-11)], 1.0) == 1 + 2.0**-23
    assert single(emulator, [(-(2.0**-12), 2.0**-12)], 1.0) == 1.0  # to nearest it would be 1 - 2^-24
    assert (
        single(emulator, [(2.0**15, 2.0), (1.0, 2.0**-8), (-(2.0**15), 2.0)], 0.0) == 0.0
    )  # cut by a larger neighbour


def test_special_values_go_through_mma(emulator: Emulator) -> None:
    for truncates in (False, True):
        emulator.set_mma(truncates=truncates)
        assert single(emulator, [(np.inf, 1.0)], 0.0) == np.inf
        assert np.isnan(single(emulator, [(np.inf, 0.0)], 1.0))
        assert np.isnan(single(emulator, [(np.inf, 1.0), (-np.inf, 1.0)], 1.0))
        assert single(emulator, [(32768.0, 32768.0)] * 16, 0.0) == 2.0**34


def test_subnormal_operands_count_unless_they_are_flushed(emulator: Emulator) -> None:
    assert single(emulator, [(2.0**-24, 1024.0)], 0.0) == 2.0**-14
    emulator.set_mma(truncates=True)
    assert single(emulator, [(2.0**-24, 1024.0)], 0.0) == 2.0**-14
    emulator.set_mma(flushes_subnormals=True)
    assert single(emulator, [(2.0**-24, 1024.0)], 0.0) == 0.0
    assert single(emulator, [(2.0**-14, 1024.0)], 0.0) == 2.0**-4


def test_atomics_of_all_threads_arrive(emulator: Emulator) -> None:
    words = np.zeros(16, np.uint32)
    total, pairs = np.zeros(1, np.float32), np.zeros(2, np.float16)
    emulator.launch("atomics", [1], [128], [words.ctypes.data, total.ctypes.data, pairs.ctypes.data])
    assert words[:4].tolist() == [128 * 127 // 2, 2**32 - 50, 127, 2**32 - 1]
    assert words[4:10].tolist() == [128, 127, 128 % 10, 0, 0, 128]
    assert total[0] == 64.0
    assert pairs.tolist() == [128.0, 256.0]


def test_calls_local_arrays_and_device_variables_work(emulator: Emulator) -> None:
    out = np.zeros(33, np.float32)
    for n in (8, 5):  # twice: the counter is a device variable that the first run leaves at zero
        emulator.launch("functions", [1], [32], [out.ctypes.data, ctypes.c_int32(n)])
        for thread in range(32):
            values = {(i * 3 + thread) & 7: i for i in range(8)}
            assert out[thread] == sum(values[i] * 10 * (1 + (i & 3)) for i in range(n))
        assert out[32] == 32
