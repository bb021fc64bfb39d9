"""The source of csrc/merge_sm90.cu on a model of the machine (tests/gemm/model.h): asynchronous copies and
wgmma, mbarriers, warps at random speeds. On a GPU, test_cuda_merge.py runs the kernel."""

import ctypes
import mmap
import random

import pytest
import torch
from simt_build import CSRC, TESTS, assert_same_bits, host_library, put_in_place
from test_cuda_source import (
    CODES,
    ENDS,
    LAYOUTS,
    Guarded,
    a_list_decides_no_bit_of_a_result,
    factors_up_to_the_end_of_the_checked_range,
    keeps_tf32s_precision,
    offsets_beyond_32_bits,
    update_of,
)

from relora_kernels.cuda import merge as launcher
from relora_kernels.reference import merge as reference

FLAGS = "-O2 -g1 -fno-gnu-unique -ffp-contract=off -fno-strict-aliasing".split()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return host_library(
        tmp_path_factory,
        TESTS / "gemm/merge_harness.cpp",
        *FLAGS,
        f"-I{TESTS / 'gemm'}",
        f"-I{CSRC}",
    )


class Model:
    """Stands in for relora_kernels._C."""

    merge_has_sm90, merge_most_rank, merge_counter_bytes = True, 128, 8

    def __init__(self, library):
        self.library, self.processors, self.seed, self.blocks, self.calls = library, 2, 0, 0, 0
        self.merge_layer_bytes = library.model_merge_layer_bytes()
        self.merge_inline_layers = 1 << 30  # the model reads all layers in place

    def merge(
        self, layers, weight_dtype, factor_dtype, restart_dtype, rounding, kind, table, device, stream,
    ):  # fmt: skip
        assert (kind, weight_dtype) == ("sm90", "bfloat16")
        said, blocks = ctypes.c_char_p(), ctypes.c_long()
        error = self.library.model_merge(
            (ctypes.c_char * len(layers)).from_buffer(layers),
            len(layers) // self.merge_layer_bytes,
            factor_dtype == "bfloat16",
            CODES["rounding"].index(rounding),
            self.processors,
            self.seed,
            ctypes.byref(said),
            ctypes.byref(blocks),
        )
        self.blocks, self.calls = blocks.value, self.calls + 1
        self.steps = [numbers[-1] for numbers in launcher._LAYER.iter_unpack(layers)]  # per unit
        if error:
            raise RuntimeError(f"cudaError {error}: {said.value.decode()}")


@pytest.fixture
def model(library, monkeypatch):
    model = Model(library)
    put_in_place(monkeypatch, launcher, model)
    monkeypatch.setattr(launcher, "_is_hopper", lambda device: True)
    return model


ROW_LAYOUTS = (  # with contiguous columns
    "aligned", "padded", "odd pitch", "misaligned", "pitch 2 mod 8", "pitch 4 mod 8", "pitch 6 mod 8",
)  # fmt: skip
SIZES = [(1, 1, 1), (3, 7, 4), (127, 65, 100), (8, 333, 128), (257, 64, 17), (520, 130, 64)]


def drawn_layer(size, layout, rounding, factor_dtype, seed):
    """merge_'s arguments, Guarded. Sums are exact in float32; every row and column has its own magnitude."""
    (n, k, r), generator = size, torch.Generator().manual_seed(seed)

    def odd(*shape):  # not zero: the sign of a sum of zeros would depend on its order
        return (torch.randint(-4, 4, shape, generator=generator) * 2 + 1) / 8

    def powers(*shape):
        return 2.0 ** torch.randint(-8, 8, shape, generator=generator)

    lora_A, lora_B = odd(r, k) * powers(1, k), odd(n, r) * powers(n, 1)
    lora_A[r // 2 :] *= 0.25  # two threads share a column: their halves of r have different maxima
    weight = torch.randn(n, k, generator=generator).bfloat16()
    residual = None
    if rounding == "compensated":
        residual = torch.randn(n, k, generator=generator).bfloat16() / 512
        residual = Guarded(residual, layout, "cpu", beside=3.0)
    return [
        Guarded(weight, layout, "cpu", beside=5.0),
        Guarded(lora_A.to(factor_dtype), LAYOUTS[seed % 6], "cpu", beside=torch.nan),
        Guarded(lora_B.to(factor_dtype), LAYOUTS[seed // 6 % 6], "cpu", beside=torch.nan),
        2.0**-9 * 1.37, rounding, residual, seed - 5, 2**31 - 3,
    ]  # fmt: skip


def merges_as_the_reference(layers):
    """Checks everything that is written, and what lies beside it, bit for bit."""
    found = []
    for merge_many_ in (reference.merge_many_, launcher.merge_many_):
        mine = [[v.copy() if isinstance(v, Guarded) else v for v in layer] for layer in layers]
        merge_many_(
            [tuple(v.matrix if isinstance(v, Guarded) else v for v in layer) for layer in mine],
            [None] * len(mine),
        )
        found.append([v.buffer for layer in mine for v in (layer[0], layer[5]) if v is not None])
    for expected, got in zip(*found):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("rounding", CODES["rounding"])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_bitwise_as_the_reference(model, layout, rounding, factor_dtype):
    first = 7 * ROW_LAYOUTS.index(layout) + 5 * CODES["rounding"].index(rounding)
    for i in (0, 1):
        model.seed = first + 3 * i + (factor_dtype == torch.bfloat16)
        model.processors = 1 + model.seed % 4
        size = SIZES[model.seed % len(SIZES)]
        merges_as_the_reference([drawn_layer(size, layout, rounding, factor_dtype, model.seed)])
        assert model.blocks > 0


@pytest.mark.parametrize("seed", range(4))
def test_weight_and_residual_begin_where_they_like(model, seed):
    """In shared memory, rows of one are shifted by another number of elements than rows of the other, or by none."""
    size = SIZES[2 + seed]
    layers = [
        drawn_layer(size, layout, "compensated", torch.float32, seed)
        for layout in (ROW_LAYOUTS[seed], ROW_LAYOUTS[(seed + 2) % 7])
    ]
    layers[0][5] = layers[1][5]
    model.seed, model.processors = seed, 2
    merges_as_the_reference(layers[:1])
    assert model.calls == 1


def test_units_are_short_where_the_list_ends_and_all_are_taken_once(model):
    """More units than blocks, so that blocks take them from the counter; few layers are cut evenly."""
    sizes = [(64 * steps - 5, 8, 3) for steps in (4, 21, 11, 3, 3, 2, 17, 16, 2)]
    sizes += [(70, 1100, 3), (64 * 47, 8, 3)]
    layers = [
        drawn_layer(size, "odd pitch", "stochastic", torch.bfloat16, i)
        for i, size in enumerate(sizes)
    ]
    model.processors = 3
    merges_as_the_reference(layers)
    assert model.calls == 1 and model.blocks == 3
    assert model.steps[1] == 21 and model.steps[-1] < 16
    merges_as_the_reference(layers[:4])
    assert model.calls == 2 and model.blocks == 3
    assert max(model.steps) <= min(model.steps[1:3]) + 1


@pytest.mark.parametrize("size, count, units, first, last", [
    ((2048, 2048), 1, 128, 1, 1),
    ((4096, 4096), 1, 128, 4, 4),
    ((4096, 11008), 1, 132, 11, 11),
    ((8192, 8192), 1, 128, 16, 16),
    ((2048, 34304), 1, 201, 11, 11),  # 67 columns of units, by thirds: two rounds
    ((64, 512), 500, 500, 1, 1),
    ((128256, 4096), 1, 264, 61, 61),  # 2004 steps in each of 8 columns: two rounds
    ((40960, 512), 40, 920, 28, 28),  # many, but even in seven rounds
    ((2048, 2048), 168, None, 32, 4),  # many: shorter towards the end
    ((6464, 2048), 168, None, 51, 4),  # at most 96 steps, of 101
    ((2**30, 512), 1, 4224, 3972, 3972),  # at most 4096
])  # fmt: skip
def test_into_what_units_layers_are_cut(library, size, count, units, first, last):
    """For an H200's 132 multiprocessors. Few layers are cut for as few and as even rounds as possible."""
    steps = (ctypes.c_int * 2)()
    found = library.model_units(*map(ctypes.c_int64, size), count, 132, steps)
    assert list(steps) == [first, last] and found == (units or found) > 0


@pytest.mark.parametrize("rounding", CODES["rounding"])
@pytest.mark.parametrize("seed", range(2))
def test_wide_layers_of_every_layout(model, rounding, seed):
    """Both warpgroups, several units of columns and several steps; W and the residual begin anywhere."""
    rng = random.Random(7 * seed + CODES["rounding"].index(rounding))
    layers, left = [], 150_000
    while left > 0:
        n, k = rng.choice((9, 64, 130, 321)), rng.choice((257, 384, 511, 512, 520, 648, 1024, 1030))
        one, other = (
            drawn_layer(
                (n, k, rng.choice((2, 17, 128))), rng.choice(ROW_LAYOUTS), rounding, dtype, left
            )
            for dtype in (rng.choice((torch.float32, torch.bfloat16)),) * 2
        )
        one[5] = other[5]
        layers.append(one)
        left -= n * k
    model.seed, model.processors = 5 * seed + 2, 1 + seed
    merges_as_the_reference(layers)


@pytest.mark.parametrize("rounding", CODES["rounding"])
@pytest.mark.parametrize("seed", range(2))
def test_a_list_is_one_launch_whose_blocks_go_from_layer_to_layer(model, rounding, seed):
    """Copies issued ahead belong to the next unit or layer; some layers are empty."""
    sizes = [SIZES[(seed + i) % len(SIZES)] for i in range(60)]
    sizes[7], sizes[20] = (0, 40, 4), (5, 0, 4)
    layers = [
        drawn_layer(size, ROW_LAYOUTS[i % 7], rounding, torch.float32, seed + i)
        for i, size in enumerate(sizes)
        if i < 6 or size[0] * size[1] < 5000
    ]
    model.seed, model.processors = seed, 1 + seed
    merges_as_the_reference(layers)
    assert model.calls == 1 and model.blocks == model.processors and len(layers) > 32


def test_a_blocks_next_unit_may_be_many_layers_further(model):
    """Layers of one unit each, some empty ones between them, and more blocks than the layers that a warp examines
    together."""
    sizes = [(0, 40, 4) if i % 9 == 4 else (3 + i % 7, 8 + i % 5 * 8, 1 + i % 5) for i in range(90)]
    model.processors = 37
    merges_as_the_reference(
        [drawn_layer(size, "aligned", "nearest", torch.float32, i) for i, size in enumerate(sizes)]
    )
    assert model.calls == 1 and model.blocks == 37


def test_rank_zero_changes_nothing(model):
    weight = torch.randn(9, 40).bfloat16()
    before = weight.clone()
    launcher.merge_(weight, torch.empty(0, 40), torch.empty(9, 0), 1.0, "nearest", None, 0, 0)
    assert_same_bits(weight, before)
    assert model.calls == 1 and model.blocks == 0


@pytest.mark.parametrize("r", [4, 36, 128])
def test_float32_factors_keep_tf32s_precision(model, r):
    keeps_tf32s_precision(r, (130, 140))
    assert model.calls == 1


def test_rows_of_lora_B_and_columns_of_lora_A_may_have_any_scale(model):
    """Scaling a row or column by a power of two scales the result exactly."""
    n, k, r = 130, 140, 20
    A, B = torch.randn(r, k), torch.randn(n, r)
    rows = 2.0 ** torch.randint(-60, 30, (n, 1)).float()
    cols = 2.0 ** torch.randint(-30, 60, (1, k)).float()
    A[:, 3], B[5] = 0.0, 0.0
    scaled = update_of(A * cols, B * rows, torch.bfloat16)
    assert torch.equal(scaled, rows.double() * update_of(A, B, torch.bfloat16) * cols)
    assert model.calls == 2


@pytest.mark.parametrize(
    "col, row",
    [
        ((80, -200, 62, -200), (-200, 80, 58, -200)),
        ((80, -200, -200, -200), (-200, 80, -200, -200)),
        ((-63, -63, -200, -200), (-63, -200, -200, -200)),
    ],
)
def test_units_whose_product_is_no_float32_are_never_multiplied(model, col, row):
    """It may be infinity, which times zero would be NaN; or zero, although float32 can hold the result."""
    A = (2.0 ** torch.tensor(col))[:, None].repeat(1, 8)  # 2^-200: zero
    B = (2.0 ** torch.tensor(row))[None].repeat(5, 1)
    assert torch.equal(update_of(A, B, torch.bfloat16), B.double() @ A.double())
    assert model.calls == 1


SCALINGS = (0.0, -0.73, 1.0, 1.999999, 63.9, -127.99999, 2.0**-16, -1.9e-5, 0.1)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", CODES["rounding"])
def test_scalings_up_to_the_ends_of_their_range(model, rounding, factor_dtype):
    """The scaling is part of a column's unit: a sum times both units is rounded once, like sum times scaling."""
    layers = [drawn_layer((70, 65, 6), "aligned", rounding, factor_dtype, i) for i in range(9)]
    for layer, scaling in zip(layers, SCALINGS, strict=True):
        layer[3] = scaling
    merges_as_the_reference(layers)
    assert model.calls == 1


@pytest.mark.parametrize("r", [4, 128])
@pytest.mark.parametrize("of_A, of_B", ENDS)
@pytest.mark.parametrize("scaling", [1.0, 127.99, 2.0**-16 * 1.01])
def test_factors_up_to_the_end_of_the_checked_range(model, r, of_A, of_B, scaling):
    """A sum times its row's unit alone may leave float32's range, above or below."""
    factors_up_to_the_end_of_the_checked_range(r, of_A, of_B, scaling)
    assert model.calls == 1


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size, pitch", [(2, 2**31 + 8), (9, 2**28 + 8)])
def test_offsets_beyond_32_bits(model, name, size, pitch, transposed):
    offsets_beyond_32_bits(name, size, pitch, transposed, "nearest")
    assert model.calls == 1


@pytest.mark.parametrize("name", ["weight", "residual"])
@pytest.mark.parametrize(
    "size, pitch", [(9, 2**29), (9, 2**29 - 3), (264, 2**23), (264, 2**23 - 3)]
)
def test_weights_offsets_beyond_32_bits(model, name, size, pitch):
    """With rows that are as far apart as allowed, and with many rows."""
    model.processors = 5  # a unit begins beyond 2^31 bytes
    offsets_beyond_32_bits(name, size, pitch, False, "compensated", r=3)
    assert model.calls == 1


@pytest.mark.parametrize("pitch, cols", [(13, 13), (1, 1), (133, 130), (300, 257)])
def test_nothing_is_read_behind_a_weight(model, pitch, cols):
    """The page after its last element cannot be read."""
    n, page = 70, mmap.PAGESIZE
    elements = (n - 1) * pitch + cols
    pages = -(-2 * elements // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * page
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(behind), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(
        memory, dtype=torch.bfloat16, count=elements, offset=pages * page - 2 * elements
    )
    weight = flat.as_strided((n, cols), (pitch, 1))
    launcher.merge_(weight, torch.ones(4, cols), torch.ones(n, 4), 0.5, "nearest", None, 0, 0)
    assert (weight == 2).all() and model.calls == 1


def test_other_layers_go_to_other_kernels(model):
    """The choice is made per layer: for layers that this kernel cannot take, another kernel is asked for by name."""
    weight = torch.zeros(24, 48).bfloat16()

    def kind(weight=weight, r=8, residual=None, scaling=0.25):
        return launcher._kernel(weight, r, scaling, residual, model)

    assert kind(scaling=0.0) == kind(scaling=-127.9) == kind(scaling=2.0**-16) == "sm90"
    for scaling in (128.0, -127.999999, 1e30, 1.5e-5, -1e-45):  # the second is 128 in float32
        assert kind(scaling=scaling) == "streamed"

    assert kind() == kind(r=128) == kind(weight[1:, 3:]) == kind(r=5) == "sm90"
    assert kind(r=132) == kind(weight.float()) == "streamed"
    assert kind(weight.t()) == "streamed"
    rest = torch.zeros(24, 56).bfloat16()
    assert kind(residual=rest[:, :48]) == kind(residual=rest[:, 1:49]) == "sm90"
    assert kind(residual=torch.zeros(48, 24).bfloat16().t()) == "streamed"
    for pitch, expected in ((2**29, "sm90"), (2**29 + 1, "streamed")):
        far = torch.empty(2 * pitch, dtype=torch.bfloat16).as_strided((2, 8), (pitch, 1))
        assert (
            kind(far) == kind(far[:, 1:], residual=far[:, :7]) == kind(weight[:2, :8], residual=far)
        )
        assert kind(far) == expected


@pytest.mark.parametrize("scaling, pitch", [(128.0, 40), (-1.5e-5, 40), (1.0, 2**29 + 1)])
def test_what_is_out_of_range_is_refused(model, monkeypatch, scaling, pitch):
    """The C++ launcher refuses it, too, if it is asked for this kernel."""
    monkeypatch.setattr(launcher, "_kernel", lambda *layer: "sm90")
    weight = torch.empty(2 * pitch, dtype=torch.bfloat16).as_strided((2, 40), (pitch, 1)).normal_()
    before = weight.clone()
    with pytest.raises(RuntimeError, match="cudaError 1"):
        launcher.merge_(weight, torch.ones(4, 40), torch.ones(2, 4), scaling, "nearest", None, 0, 0)
    assert_same_bits(weight, before)


def test_what_a_list_is_made_of_decides_no_bit_of_a_result(model):
    """The list decides only how many steps a unit has."""
    a_list_decides_no_bit_of_a_result((8, 9, 128, 37), model)


def test_the_kernel_follows_from_the_layer_not_from_the_list(model, monkeypatch):
    found = []
    monkeypatch.setattr(model, "merge", lambda layers, kind, **_: found.append((kind, len(layers))))
    layers = [
        (torch.zeros(20, 30).bfloat16(), torch.zeros(r, 30), torch.zeros(20, r), 1.0, "nearest", None, 0, 0)
        for r in (8, 9, 128, 132, 4, 200)
    ]  # fmt: skip
    launcher.merge_many_(layers)
    each = model.merge_layer_bytes
    assert found == [("sm90", 4 * each), ("streamed", 2 * each)]
