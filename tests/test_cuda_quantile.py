"""The quantiles of csrc/numerics.cuh on the CPU, against torch.quantile."""

import ctypes

import numpy as np
import pytest
import torch
from prune_cases import DTYPES, RATIOS
from simt_build import assert_same_bits, numerics_library

from relora_kernels.reference import prune as reference


@pytest.fixture(scope="module")
def numerics(tmp_path_factory):
    library = numerics_library(tmp_path_factory)
    for name in ("infinity_key", "key_of_32", "key_of_16", "threshold_of"):
        getattr(library, name).restype = ctypes.c_uint32
    library.rank_of.restype = ctypes.c_int64
    return library


def array_at(array):
    return ctypes.c_void_p(array.ctypes.data)


def key_values(numerics, code, keys):
    out = np.empty(len(keys), np.float32)
    keys = np.ascontiguousarray(keys, np.uint32)
    numerics.key_values(code, array_at(keys), ctypes.c_int64(len(keys)), array_at(out))
    return torch.from_numpy(out)


def nearest_keys(numerics, code, values):
    values, out = values.float().contiguous().numpy(), np.empty(len(values), np.uint32)
    numerics.nearest_keys(code, array_at(values), ctypes.c_int64(len(values)), array_at(out))
    return out


@pytest.mark.parametrize("code", [1, 2])
def test_keys_of_every_16_bit_pattern_order_as_magnitudes_and_come_back(numerics, code):
    patterns = np.arange(2**16, dtype=np.uint16)
    keys = np.array([numerics.key_of_16(ctypes.c_uint16(int(p))) for p in patterns], np.uint32)
    magnitude = torch.from_numpy(patterns.view(np.int16)).view(DTYPES[code]).abs()
    assert_same_bits(key_values(numerics, code, keys), magnitude.float())
    number = ~magnitude.isnan().numpy()
    assert np.array_equal(nearest_keys(numerics, code, magnitude)[number], keys[number])
    assert (keys[~number] > numerics.infinity_key(code)).all()
    assert keys[magnitude.isinf().numpy()].tolist() == [numerics.infinity_key(code)] * 2
    order = np.argsort(keys[: 2**15])
    assert (magnitude[order][: numerics.infinity_key(code) + 1].float().diff() > 0).all()


def test_keys_of_float32_order_as_magnitudes_and_come_back(numerics):
    patterns = np.random.default_rng(0).integers(0, 2**32, 5000, dtype=np.uint32)
    patterns = np.concatenate([patterns, np.array([0, 1, 1 << 31, 0x7F800000, 0xFF800000], "u4")])
    keys = np.array([numerics.key_of_32(ctypes.c_uint32(int(p))) for p in patterns], np.uint32)
    magnitude = torch.from_numpy(patterns.view(np.int32)).view(torch.float32).abs()
    assert_same_bits(key_values(numerics, 0, keys), magnitude)
    number = ~magnitude.isnan().numpy()
    assert np.array_equal(nearest_keys(numerics, 0, magnitude)[number], keys[number])
    assert ((keys > numerics.infinity_key(0)) == ~number).all()


def rank_rule(ratio):
    ratio, float_ranks = reference.rank_rule(ratio)
    return ctypes.c_double(ratio), ctypes.c_int64(float_ranks)


def threshold(numerics, code, magnitude, ratio):
    """The threshold's key, from the sorted magnitudes."""
    weight = ctypes.c_float()
    n = len(magnitude)
    low = numerics.rank_of(ctypes.c_int64(n), *rank_rule(ratio), ctypes.byref(weight))
    keys = reference.magnitude_keys(magnitude[low : low + 2]).tolist()
    return numerics.threshold_of(code, keys[0], keys[-1], weight)


@pytest.mark.parametrize("code", range(3))
def test_interpolation_equals_torch_quantile_on_thousands_of_cases(numerics, code):
    """Zero mismatches. A few per cent differ without the fused multiply-add."""
    rng = np.random.default_rng(code)
    for case in range(2500):
        n = int(rng.integers(1, 400))
        ratio = RATIOS[case // 2 % len(RATIOS)] if case % 2 else float(rng.random())
        t = torch.from_numpy(rng.standard_normal(n) * 10.0 ** rng.integers(-6, 5)).to(DTYPES[code])
        expected = torch.quantile(t.abs().float(), ratio).to(DTYPES[code])
        key = threshold(numerics, code, t.abs().sort().values, ratio)
        assert key == reference.magnitude_keys(expected).item(), (n, ratio)


def test_interpolation_with_infinities(numerics):
    big, inf = torch.finfo(torch.float32).max, torch.inf
    for values in ([1.0, inf], [inf, inf], [1.0, 2.0, inf], [big, inf], [0.0, 1e-45]):
        for ratio in torch.linspace(0, 1, 23).tolist():
            t = torch.tensor(values)
            expected = reference.magnitude_quantile(t, ratio)
            key = threshold(numerics, 0, t, ratio)
            if expected.isnan():
                assert key == 0xFFFFFFFF
            else:
                assert key == reference.magnitude_keys(expected).item()


@pytest.mark.parametrize("float64_ranks", [False, True])
def test_ranks_at_any_size(numerics, monkeypatch, float64_ranks):
    monkeypatch.setattr(reference, "_FLOAT64_RANKS", float64_ranks)
    rng = np.random.default_rng(3)
    for case in range(4000):
        n = int(2 ** rng.uniform(0, 41)) if case % 2 else 2**24 + case // 2 - 1000
        ratio = RATIOS[case // 2 % 6] if case % 4 < 2 else float(rng.random())
        weight = ctypes.c_float()
        low = numerics.rank_of(ctypes.c_int64(n), *rank_rule(ratio), ctypes.byref(weight))
        expected_low, expected_weight = reference.quantile_rank(n, ratio)
        assert (low, weight.value) == (expected_low, np.float32(expected_weight))
