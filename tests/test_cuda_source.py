"""The CUDA sources without a GPU: numerics.cuh and merge.cu compiled by the host compiler. The merge
tests run on a GPU as well if there is one."""

import ctypes
import mmap

import numpy as np
import pytest
import torch
from simt_build import assert_same_bits, numerics_library, put_in_place, simt_library

from relora_kernels import cuda
from relora_kernels.cuda import merge as launcher
from relora_kernels.reference import merge as reference
from relora_kernels.reference import philox

# ---- numerics.cuh -------------------------------------------------------------------------------

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def numerics(tmp_path_factory):
    return numerics_library(tmp_path_factory)


def pointer(array):
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def widen(numerics, kind, patterns):
    out = np.empty(patterns.size, np.float32)
    getattr(numerics, f"widen_{kind}")(
        pointer(patterns), ctypes.c_int64(patterns.size), pointer(out)
    )
    return torch.from_numpy(out)


def narrow(numerics, kind, values, rand16=None):
    """float32 tensor -> bf16 or fp16 tensor, to nearest or with random bits."""
    values = values.contiguous().numpy()
    rand16 = None if rand16 is None else rand16.to(torch.int64).numpy().astype(np.uint32)
    out = np.empty(values.size, np.int16)
    getattr(numerics, f"round_{kind}")(
        pointer(values), pointer(rand16), ctypes.c_int64(values.size), pointer(out)
    )
    return torch.from_numpy(out).view(HALF_TYPES[kind])


@pytest.mark.parametrize("kind", HALF_TYPES)
def test_every_pattern_widens_as_in_torch_and_rounds_back_to_itself(numerics, kind):
    patterns = np.arange(2**16, dtype=np.uint16)
    exact = torch.from_numpy(patterns.view(np.int16)).view(HALF_TYPES[kind])
    widened = widen(numerics, kind, patterns)
    assert_same_bits(widened, exact.float())
    assert_same_bits(narrow(numerics, kind, widened), exact)
    for rand16 in (0, 0xFFFF):  # representable values are not moved by any random bits
        drawn = torch.full((2**16,), rand16)
        assert_same_bits(narrow(numerics, kind, widened, drawn), exact)


def every_midpoint_and_neighbours(kind):
    """float32 values at, one unit below and one above every representable value and midpoint."""
    grid = torch.arange(-(2**15), 2**15).to(torch.int16).view(HALF_TYPES[kind]).float()
    grid = grid[grid.isfinite()].sort().values
    points = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, torch.tensor([65520.0, 3.3961776e38])])
    below = torch.nextafter(points, torch.tensor(-torch.inf))
    above = torch.nextafter(points, torch.tensor(torch.inf))
    specials = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 7e4, 1e-45])
    return torch.cat([points, below, above, specials])


@pytest.mark.parametrize("kind", HALF_TYPES)
def test_rounding_to_nearest_equals_torch(numerics, kind):
    values = every_midpoint_and_neighbours(kind)
    assert_same_bits(narrow(numerics, kind, values), values.to(HALF_TYPES[kind]))


@pytest.mark.parametrize("kind", HALF_TYPES)
def test_stochastic_rounding_equals_the_reference(numerics, kind):
    values = every_midpoint_and_neighbours(kind)
    generator = torch.Generator().manual_seed(1)
    # Once more in shuffled order: values that round to nearest come among values that do not.
    values = torch.cat([values, values[torch.randperm(values.numel(), generator=generator)]])
    for drawn in (
        torch.randint(0, 2**16, values.shape, generator=generator),
        torch.zeros(values.shape, dtype=torch.int64),
        torch.full(values.shape, 0xFFFF),
    ):
        expected = reference.stochastic_round(values, drawn, HALF_TYPES[kind])
        assert_same_bits(narrow(numerics, kind, values, drawn), expected)


@pytest.mark.parametrize("kind", HALF_TYPES)
@pytest.mark.parametrize("value", [1.0019, -0.3333, 3.1e-6, -6.2e-8, 1.2345e-5, 6.1e-5])
def test_stochastic_rounding_is_unbiased(numerics, kind, value):
    """All 2^16 draws: their mean is the value, to 2^-13 of a step (fp16 uses 13 of the 16 bits)."""
    value = torch.tensor(value)
    rounded = narrow(numerics, kind, value.repeat(2**16), torch.arange(2**16)).double()
    low, high = rounded.min(), rounded.max()
    assert low <= value <= high and rounded.unique().numel() == 2
    assert abs(rounded.mean() - value.double()) <= 2.0**-13 * (high - low)


def as_scaled_half(numerics, values, largest):
    """(values after rounding to fp16 scaled for `largest`, in float64 and unscaled; the scaled fp16's unit)"""
    out, scale, unit = np.empty(values.size // 2, np.uint32), ctypes.c_float(), ctypes.c_float()
    numerics.scale_half(
        pointer(values), ctypes.c_int64(values.size // 2), ctypes.c_float(largest),
        ctypes.byref(scale), ctypes.byref(unit), pointer(out),
    )  # fmt: skip
    assert scale.value * unit.value == 1.0
    return out.view(np.float16).astype(np.float64) * unit.value, unit.value


@pytest.mark.parametrize("exponent", [*range(-126, 128, 7), -149, -127, 126, 127])
def test_scaled_fp16_keeps_11_bits_of_numbers_of_any_size(numerics, exponent):
    """Numbers of 2^-28 of the largest or more keep 11 bits; smaller ones have an error of up to 2^-39 of it."""
    rng = np.random.default_rng(exponent + 200)
    largest = np.float32(2.0**exponent * (1.999999 if exponent > -149 else 1))
    values = largest * rng.uniform(-1, 1, 4096) * 2.0 ** -rng.integers(0, 45, 4096)
    values = np.append(values, [largest, -largest]).astype(np.float32)
    got, unit = as_scaled_half(numerics, values, largest)
    if exponent >= -112:  # below, fp32 cannot hold the power of two that it would take
        assert 2.0**14 <= largest / unit < 2.0**15
    exact = values.astype(np.float64)
    step = max(2.0**-39 * float(largest), 2.0**-25 * unit)
    assert (np.abs(got - exact) <= np.maximum(2.0**-11 * np.abs(exact), step)).all()


def test_scaled_fp16_beside_zeros_infinities_and_nans(numerics):
    zeros, _ = as_scaled_half(numerics, np.zeros(2, np.float32), 0.0)
    assert not zeros.any()
    values = np.array([np.inf, -np.inf, np.nan, 3e38], np.float32)
    got, _ = as_scaled_half(numerics, values, np.inf)
    assert got[0] == np.inf and got[1] == -np.inf and np.isnan(got[2]) and np.isfinite(got[3])


def test_philox_known_answers(numerics):
    """From Random123's kat_vectors."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, expected in (
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ones,) * 4, (ones,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        counter, key = np.array(counter, np.uint32), np.array(key, np.uint32)
        out = np.empty(4, np.uint32)
        numerics.philox(pointer(counter), pointer(key), pointer(out))
        assert " ".join(f"{word:08x}" for word in out) == expected


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_random_bits_equal_the_reference(numerics, width, seed):
    draw = {16: philox.bits16, 32: philox.bits32}[width]
    for stream, row, col in ((0, 0, 0), (1, 5, 3), (3, 2**32 + 7, 2**35 - 11), (2, 1, 2**31)):
        expected = draw(seed, stream, (1, 37), (row, col))[0].numpy()
        out = np.empty(37, np.uint32)
        numerics.random_bits(
            ctypes.c_uint64(seed % 2**64),
            ctypes.c_uint32(stream),
            width,
            *map(ctypes.c_int64, (row, col, 37)),
            pointer(out),
        )
        assert np.array_equal(out, expected)


# ---- merge.cu -----------------------------------------------------------------------------------


CODES = {  # launch.h's enums
    "dtype": ("float32", "bfloat16", "float16"),
    "rounding": ("nearest", "stochastic", "compensated"),
}


class Shim:
    """Stands in for relora_kernels._C: the same kernels, on the CPU."""

    def __init__(self, library):
        self.library, self.order, self.blocks, self.calls, self.kind = library, 0, 0, 0, ""
        self.merge_has_sm90 = False
        self.merge_layer_bytes = library.simt_merge_layer_bytes()
        self.merge_inline_layers = library.simt_merge_inline_layers()
        self.merge_counter_bytes = library.simt_merge_counter_bytes()
        self.merge_most_rank = library.simt_merge_most_rank()
        library.simt_multiprocessors(1)

    def merge(
        self, layers, weight_dtype, factor_dtype, restart_dtype, rounding, kind, table, device, stream,
    ):  # fmt: skip
        assert len(layers) % self.merge_layer_bytes == 0
        blocks = ctypes.c_long()
        error = self.library.simt_merge(
            (ctypes.c_char * len(layers)).from_buffer(layers),
            len(layers) // self.merge_layer_bytes,
            *(CODES["dtype"].index(name) for name in (weight_dtype, factor_dtype, restart_dtype)),
            CODES["rounding"].index(rounding),
            launcher.KERNELS.index(kind),
            ctypes.c_void_p(table),
            self.order,
            ctypes.byref(blocks),
        )
        self.blocks, self.calls, self.kind = blocks.value, self.calls + 1, kind
        if error:
            raise RuntimeError(f"cudaError {error}")


@pytest.fixture(scope="module")
def shim_library(tmp_path_factory):
    return simt_library(tmp_path_factory, "harness.cpp")


@pytest.fixture
def shim(shim_library, monkeypatch):
    """The launcher of relora_kernels/cuda/merge.py on top of the shim."""
    shim = Shim(shim_library)
    put_in_place(monkeypatch, launcher, shim)
    return shim


WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("aligned", "padded", "odd pitch", "misaligned", "transposed", "column step")


class Guarded:
    """A matrix inside a larger buffer, whose other elements are `beside`: NaN if the matrix is only read,
    so that reads beside it show; a number if it is written, so that writes beside it show."""

    def __init__(self, values: torch.Tensor, layout: str, device: str, beside: float):
        n, k = values.shape
        strides, offset = {
            "aligned": ((-(-k // 8) * 8, 1), 64),
            "padded": ((-(-k // 8) * 8 + 24, 1), 64),
            "odd pitch": ((k + 1 + k % 2, 1), 64),
            **{f"pitch {m} mod 8": ((k + 8 + (m - k) % 8, 1), 64 + m // 2) for m in (2, 4, 6)},
            "misaligned": ((-(-k // 8) * 8, 1), 63),
            "transposed": ((1, n + 3), 61),
            "column step": ((2 * k + 6, 2), 64),
        }[layout]
        size = offset + (n - 1) * strides[0] + (k - 1) * strides[1] + 65
        self.buffer = torch.full((size,), beside, dtype=values.dtype, device=device)
        self.matrix = self.buffer.as_strided((n, k), strides, offset)
        self.matrix.copy_(values)

    def copy(self):
        other = object.__new__(Guarded)
        other.buffer = self.buffer.clone()
        other.matrix = other.buffer.as_strided(
            self.matrix.shape, self.matrix.stride(), self.matrix.storage_offset()
        )
        return other


def drawn_case(number: int, device: str):
    """Sizes around the tile's, every dtype, rounding and layout; factors whose products and sums
    are exact in float32, so that the result's bits do not depend on the order of summation."""
    rng = np.random.default_rng(number)

    def pick(values):
        return values[rng.integers(len(values))]

    n = pick([1, 3, 8, 17, 64, 127, 128, 129, 136])
    k = pick([1, 8, 17, 64, 127, 128, 136, 200, 259, 272])
    r = pick([1, 7, 8, 16, 17, 36, 100, 130])  # 130: more stages than lora_B has slots, if float32
    dtype, factor_dtype = WEIGHT_DTYPES[number % 3], WEIGHT_DTYPES[number // 3 % 3]
    rounding = CODES["rounding"][number // 9 % 3]
    scale = pick([1.0, 1.0, 1e-3, 1e-6, 2e4])

    def eighths(rows, cols):  # odd: the sign of a sum of zeros would depend on its order
        return torch.from_numpy((rng.integers(-4, 4, (rows, cols)) * 2 + 1) / 8).to(factor_dtype)

    weight = torch.from_numpy(rng.standard_normal((n, k)) * scale).clamp(-6.5e4, 6.5e4).to(dtype)
    residual = None
    if rounding == "compensated":
        residual = torch.from_numpy(rng.standard_normal((n, k)) * scale * 1e-3).to(dtype)
        residual = Guarded(residual, pick(LAYOUTS), device, beside=3.0)
    layout = LAYOUTS[number // 27 % 6]
    return dict(
        weight=Guarded(weight, layout, device, beside=5.0),
        lora_A=Guarded(eighths(r, k), pick(LAYOUTS), device, beside=torch.nan),
        lora_B=Guarded(eighths(n, r), pick(LAYOUTS), device, beside=torch.nan),
        scaling=float(rng.standard_normal() * scale / 4),
        rounding=rounding,
        residual=residual,
        seed=int(rng.integers(-(2**63), 2**63)),
        first_row=int(pick([0, 3, 2**31 - 60])),
    )


# ---- Lists of layers, and the restart behind them -----------------------------------------------


def drawn_list(number: int, layers: int, device: str = "cpu"):
    """(cases, merges, restarts), the last two as merge_many_ takes them; every third layer does not restart."""
    cases = [drawn_case(27 * i + number, device) for i in range(layers)]
    merges, restarts = [], []
    for i, case in enumerate(cases):
        merges.append(tuple(v.matrix if isinstance(v, Guarded) else v for v in case.values()))
        lora_A, lora_B = case["lora_A"].matrix, case["lora_B"].matrix
        first_row = 0
        if i % 5 == 4:  # as if A had been gathered, and its last rows were this rank's
            first_row = len(lora_A) // 2
            lora_A = lora_A[first_row:].clone()
        count = torch.tensor(i, device=device)
        restarts.append((lora_A, lora_B, count, 0.3 / (i + 1), 2**62 - 7 * i, first_row))
    return cases, merges, [None if i % 3 == 2 else r for i, r in enumerate(restarts)]


def merges_as_the_reference(number, layers, device="cpu"):
    """Merges the same list with both; everything written is equal bit for bit."""
    theirs, ours = (drawn_list(number, layers, device) for _ in range(2))
    reference.merge_many_(*theirs[1:])
    launcher.merge_many_(*ours[1:])
    for i, (a, b) in enumerate(zip(ours[0], theirs[0])):
        for name in ("weight", "residual", "lora_A", "lora_B"):
            if a[name] is not None:
                assert_same_bits(a[name].buffer, b[name].buffer)
        if ours[2][i] is not None:
            assert_same_bits(ours[2][i][0], theirs[2][i][0])
            assert ours[2][i][2] == theirs[2][i][2] == i + 1
            assert not ours[2][i][1].any() and (ours[2][i][0].abs() <= 0.3 / (i + 1)).all()


@pytest.mark.parametrize("number", range(0, 27, 4))
@pytest.mark.parametrize("layers", [3, 18])  # 18: more than a launch's arguments hold
def test_a_list_is_merged_and_restarted_bitwise_as_the_reference(shim, number, layers):
    shim.order = number
    merges_as_the_reference(number, layers)
    assert shim.blocks > 0


def test_a_list_of_one_kind_is_one_call(shim):
    """With 150 layers: the table is written 128 layers at a time."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape):  # whose products are exact in any order of summation
        return torch.randint(-8, 9, shape, generator=generator).float()

    merges = [
        (torch.randn(9, 40).bfloat16(), whole(2, 40), whole(9, 2), 1.0, "nearest", None, 0, 0)
        for _ in range(150)
    ]
    expected = [merge[0].clone() for merge in merges]
    for weight, (_, *rest) in zip(expected, merges):
        reference.merge_(weight, *rest)
    launcher.merge_many_(merges)
    assert shim.calls == 1
    for weight, (ours, *_) in zip(expected, merges):
        assert_same_bits(ours, weight)


def test_a_large_rank_restarts_whole(shim):
    """More than one block, the last of them partly idle."""
    n, k, r = 130, 1001, 33
    A, B, count = torch.full((r, k), torch.nan), torch.ones(n, r), torch.tensor(0)
    weight = torch.randn(n, k)
    merge = (weight, torch.zeros(r, k), B, 1.0, "nearest", None, 0, 0)
    launcher.merge_many_([merge], [(A, B, count, 0.25, 5, 2**31 - 9)])
    expected = philox.uniform_(torch.empty(r, k), 2**31 - 9, 0.25, 5)
    assert torch.equal(A, expected) and not B.any() and count == 1


def test_no_memory_for_a_kernels_code_leaves_every_layer_as_it_was(shim):
    """Whichever of the three kernels cannot be loaded: if W were merged and B kept, a retry would merge twice."""
    n, k, r, layers = 9, 40, 2, 20
    drawn = [(torch.randn(n, k), torch.randn(r, k), torch.randn(n, r)) for _ in range(layers)]
    counts = [torch.tensor(i) for i in range(layers)]
    merges = [(*tensors, 1.0, "nearest", None, 0, 0) for tensors in drawn]
    restarts = [(A, B, count, 0.25, 5, 0) for (_, A, B), count in zip(drawn, counts)]
    before = [[t.clone() for t in tensors] for tensors in drawn]
    try:
        for loads in range(3):
            shim.library.simt_unload(loads)
            with pytest.raises(RuntimeError, match="cudaError 2"):
                launcher.merge_many_(merges, restarts)
            for tensors, expected in zip(drawn, before):
                assert all(map(torch.equal, tensors, expected))
            assert counts == list(range(layers))
    finally:
        shim.library.simt_unload(-1)
    launcher.merge_many_(merges, restarts)
    assert counts == list(range(1, layers + 1)) and not drawn[0][2].any()


def launch(function, case):
    function(**{k: v.matrix if isinstance(v, Guarded) else v for k, v in case.items()})


def copy_case(case):
    return {k: v.copy() if isinstance(v, Guarded) else v for k, v in case.items()}


def assert_bitwise_as_the_reference(number, device="cpu"):
    case = drawn_case(number, device)
    expected = copy_case(case)
    launch(reference.merge_, expected)
    launch(launcher.merge_, case)
    for name, value in case.items():
        if isinstance(value, Guarded):  # the whole buffers: nothing beside the matrix was touched
            assert_same_bits(value.buffer, expected[name].buffer)


@pytest.mark.parametrize("part", range(6))
def test_merge_is_bitwise_the_reference(shim, part):
    for number in range(part * 27, (part + 1) * 27):
        shim.order = number % 5
        assert_bitwise_as_the_reference(number)
        assert shim.blocks > 0


@pytest.mark.parametrize("sizes", [(140, 272, 128), (256, 128, 4), (257, 130, 68), (300, 520, 32)])
@pytest.mark.parametrize("rounding", CODES["rounding"])
@pytest.mark.parametrize("multiprocessors", [1, 2, 3])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_several_tiles_are_bitwise_the_reference(
    shim, sizes, rounding, multiprocessors, factor_dtype
):
    """The more multiprocessors there are, the fewer tiles a block has."""
    n, k, r = sizes
    shim.order = multiprocessors
    shim.library.simt_multiprocessors(multiprocessors)
    A, B = ((torch.randint(-4, 4, s) * 2.0 + 1).to(factor_dtype) for s in ((r, k), (n, 128)))
    B = B[:, :r]  # rows begin at multiples of 16 bytes; no product may use what lies behind them
    weight = torch.randn(n, k).bfloat16()
    residual = torch.randn(n, k).bfloat16() / 512 if rounding == "compensated" else None
    found = []
    for merge_ in (reference.merge_, launcher.merge_):
        w, rest = weight.clone(), None if residual is None else residual.clone()
        merge_(w, A, B, 2.0**-9, rounding, rest, 7, 2**31)
        found.append([w] if rest is None else [w, rest])
    for expected, got in zip(*found):
        assert_same_bits(got, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("part", range(6))
def test_merge_on_a_gpu_is_bitwise_the_reference(part):
    reason = cuda.why_no_device(torch.device("cuda", 0))
    if reason:
        pytest.skip(reason)
    for number in range(part * 27, (part + 1) * 27):
        assert_bitwise_as_the_reference(number, "cuda")


@pytest.mark.parametrize("factor_dtype", WEIGHT_DTYPES)
def test_merge_of_any_factors_is_as_exact_as_float32_sums(shim, factor_dtype):
    n, k, r = 130, 140, 100
    weight, A, B = torch.randn(n, k), torch.randn(r, k), torch.randn(n, r)
    A, B = A.to(factor_dtype), B.to(factor_dtype)
    exact = weight.double() + 0.3 * (B.double() @ A.double())
    magnitude = weight.double().abs() + 0.3 * (B.double().abs() @ A.double().abs())
    launcher.merge_(weight, A, B, 0.3, "nearest", None, 0, 0)
    assert ((weight.double() - exact).abs() <= r * 2.0**-24 * magnitude).all()


def update_of(A, B, dtype, scaling=1.0):
    """scaling B A as the kernel computes it, to the precision of W plus residual: both of a merge into zeros."""
    weight = torch.zeros(len(B), A.shape[1], dtype=dtype, device=A.device)
    residual = torch.zeros_like(weight)
    launcher.merge_(weight, A, B, scaling, "compensated", residual, 0, 0)
    return weight.double() + residual.double()


def keeps_tf32s_precision(r, shape, device="cpu"):
    """With magnitudes that span 2^20 in every row; errors are bounded element by element, relative to |B| |A|."""
    sizes = (r, shape[1]), (shape[0], r)
    A, B = (
        torch.randn(s, device=device) * 2.0 ** -torch.randint(20, s, device=device) for s in sizes
    )
    magnitude = B.double().abs() @ A.double().abs()
    error = (update_of(A, B, torch.bfloat16) - B.double() @ A.double()).abs()
    # Two roundings per product, the sums, and what two bf16 cannot hold.
    assert (error <= (2.0**-10 + 2.0**-16 + r * 2.0**-23) * magnitude).all()
    assert (error > 2.0**-12 * magnitude).any()  # a limit far above all errors would test nothing


@pytest.mark.parametrize("r", [4, 36, 128])
def test_float32_factors_keep_tf32s_precision(shim, r):
    keeps_tf32s_precision(r, (130, 140))
    assert shim.calls == 1


def factors_up_to_the_end_of_the_checked_range(r, of_A, of_B, scaling=1.0):
    A, B = (torch.rand(s) * 0.99 + 1 for s in ((r, 20), (12, r)))
    A, B = A * of_A, B * of_B
    exact = torch.tensor(scaling).double() * (B.double() @ A.double())
    found = update_of(A, B, torch.bfloat16, scaling)
    assert ((found - exact).abs() <= (2.0**-10 + 2.0**-16 + r * 2.0**-23) * exact).all()


ENDS = [(2.0**-100, 2.0**113), (2.0**-14, 2.0**119), (2.0**119, 2.0**-20), (2.0**119, 2.0**-120)]


@pytest.mark.parametrize("r", [4, 128])
@pytest.mark.parametrize("of_A, of_B", ENDS)
def test_factors_up_to_the_end_of_the_checked_range(shim, r, of_A, of_B):
    factors_up_to_the_end_of_the_checked_range(r, of_A, of_B)
    assert shim.calls == 1


def a_list_decides_no_bit_of_a_result(ranks, shim):
    layers = [
        (torch.randn(20, 300).bfloat16(), torch.randn(r, 300), torch.randn(20, r)) for r in ranks
    ]
    alone = [layer[0].clone() for layer in layers]
    for weight, (_, A, B) in zip(alone, layers):
        launcher.merge_(weight, A, B, 1.0, "nearest", None, 0, 0)
    shim.calls = 0
    launcher.merge_many_([(*layer, 1.0, "nearest", None, 0, 0) for layer in layers])
    assert shim.calls == 1
    for weight, (merged, _, _) in zip(alone, layers):
        assert torch.equal(weight, merged)


def test_what_a_list_is_made_of_decides_no_bit_of_a_result(shim):
    """The list decides only how many tiles a block goes through."""
    a_list_decides_no_bit_of_a_result((8, 9, 128, 132), shim)


@pytest.mark.parametrize("rounding", CODES["rounding"])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_merge_keeps_infinities_and_nans_where_they_are(shim, dtype, rounding):
    weight = torch.randn(9, 33).to(dtype)
    weight[2, 5], weight[3, 6], weight[4, 7] = torch.inf, -torch.inf, torch.nan
    expected = weight.clone()
    A, B = torch.ones(2, 33), torch.ones(9, 2)
    residual = [torch.zeros_like(weight) if rounding == "compensated" else None for _ in "ab"]
    reference.merge_(expected, A, B, 0.5, rounding, residual[0], 3, 0)
    launcher.merge_(weight, A, B, 0.5, rounding, residual[1], 3, 0)
    assert_same_bits(weight, expected)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_an_infinite_row_of_lora_B_reaches_its_own_row_alone(shim, dtype):
    """The zeros that pad the last stage must multiply zeros, not a neighbour's infinity."""
    weight, A, B = torch.zeros(130, 20).to(dtype), torch.ones(17, 20), torch.zeros(130, 17)
    B[128, 16] = torch.inf
    launcher.merge_(weight, A, B, 1.0, "nearest", None, 0, 0)
    assert not weight[128].isfinite().any()  # a float32 W splits it in two: inf becomes NaN
    assert (weight[:128] == 0).all() and (weight[129:] == 0).all()


def test_no_memory_for_a_second_launchs_table_leaves_every_layer_as_it_was(shim, monkeypatch):
    """Otherwise a caller who retries would merge twice what the first launch has merged."""
    weights = [torch.zeros(9, 20).to(dtype) for dtype in (torch.bfloat16, torch.float16)]
    A, B = torch.ones(2, 20), torch.ones(9, 2)
    merges = [(weight, A, B, 1.0, "nearest", None, 0, 0) for weight in weights]
    empty, asked = torch.empty, []

    def no_memory_the_second_time(*args, **kwargs):
        asked.append(args)
        if len(asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(shim, "merge_inline_layers", 0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", no_memory_the_second_time)
        with pytest.raises(torch.OutOfMemoryError):
            launcher.merge_many_(merges)
    assert not any(weight.any() for weight in weights)
    launcher.merge_many_(merges)
    assert all((weight == 2).all() for weight in weights)


@pytest.mark.parametrize("sizes", [(0, 4, 2), (4, 0, 2), (4, 4, 0)])
def test_empty_merge_launches_nothing(shim, sizes):
    n, k, r = sizes
    weight = torch.randn(n, k)
    before = weight.clone()
    launcher.merge_(weight, torch.ones(r, k), torch.ones(n, r), 1.0, "nearest", None, 0, 0)
    assert shim.blocks == 0 and torch.equal(weight, before)


@pytest.mark.parametrize("name", ["weight", "residual", "lora_A", "lora_B"])
@pytest.mark.parametrize("size, pitch", [(2, 2**31 + 8), (9, 2**28 + 8)])
@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_beyond_32_bits(shim, name, size, pitch, transposed):
    offsets_beyond_32_bits(name, size, pitch, transposed)


def offsets_beyond_32_bits(name, size, pitch, transposed, rounding="compensated", r=None):
    """Rows or columns so far apart that strides, or their sums, need 64 bits. The memory is reserved
    and not committed."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, unnamed until 3.12
    memory = mmap.mmap(-1, 2 * (pitch * (size - 1) + size), flags=flags)
    far = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((size, size), (pitch, 1))
    given = {key: torch.zeros(size, size).bfloat16() for key in ("weight", "residual")}
    r = r or size
    given |= {"lora_A": torch.ones(r, size).bfloat16(), "lora_B": torch.ones(size, r).bfloat16()}
    far.copy_(given[name])
    given[name] = far.t() if transposed else far
    launcher.merge_(**given, scaling=0.5, rounding=rounding, seed=0, first_row=0)
    assert (given["weight"] == 0.5 * r).all() and (given["residual"] == 0).all()


def test_more_tiles_than_a_grid_holds_is_an_error(shim):
    weight = torch.empty(1).as_strided((2**26, 2**26), (0, 0))  # 2^38 tiles
    A, B = weight[:1], weight[:, :1]
    with pytest.raises(RuntimeError, match="cudaError 9"):
        launcher.merge_(weight, A, B, 1.0, "nearest", None, 0, 0)
    assert shim.blocks == 0


def test_version_counters_move_for_what_is_written(shim):
    weight, residual = torch.randn(4, 4, dtype=torch.bfloat16), torch.zeros(4, 4).bfloat16()
    A, B = torch.ones(1, 4), torch.ones(4, 1)
    versions = [t._version for t in (weight, residual, A, B)]
    launcher.merge_(weight, A, B, 1.0, "compensated", residual, 0, 0)
    moved = [t._version - v for t, v in zip((weight, residual, A, B), versions)]
    assert moved == [1, 1, 0, 0]
    count, versions = torch.tensor(0), [t._version for t in (weight, residual, A, B)]
    merge = (weight, A, B, 1.0, "compensated", residual, 0, 0)
    launcher.merge_many_([merge], [(A, B, count, 0.5, 3, 0)])
    moved = [t._version - v for t, v in zip((weight, residual, A, B), versions)]
    assert moved == [1, 1, 1, 1] and count == 1
