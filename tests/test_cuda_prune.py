"""csrc/prune.cu and the quantiles of csrc/numerics.cuh against the reference: on the CPU through the SIMT
shim, on a GPU if there is one, and what nvcc makes of prune.cu."""

import contextlib
import ctypes
import itertools
import mmap
import os
import re
import sys
import types

import numpy as np
import pytest
import torch
from simt_build import (
    CSRC,
    assert_same_bits,
    cuda_build,
    numerics_library,
    put_in_place,
    simt_library,
)

from relora_kernels import cuda, prune_, use_backend
from relora_kernels.cuda import prune as launcher
from relora_kernels.ops.prune import prune_random_
from relora_kernels.reference import prune as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # launch.h's order
SPAN = 49152  # kSmall: up to this size one block does it all, above it several blocks
SWEEP = 8192  # kSweep of 32 bits: elements that a block reads at a time
RATIOS = [0.0, 0.5, 0.9, 0.99, 0.999, 1.0]
GARBAGE = 0xA5


# ---- numerics.cuh -------------------------------------------------------------------------------


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


def threshold(numerics, code, magnitude, ratio):
    """The threshold's key, from the sorted magnitudes."""
    weight = ctypes.c_float()
    n = len(magnitude)
    low = numerics.rank_of(ctypes.c_int64(n), ctypes.c_double(ratio), ctypes.byref(weight))
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


def test_ranks_at_any_size(numerics):
    rng = np.random.default_rng(3)
    for case in range(4000):
        n = int(2 ** rng.uniform(0, 41)) if case % 2 else 2**24 + case // 2 - 1000
        ratio = RATIOS[case // 2 % 6] if case % 4 < 2 else float(rng.random())
        weight = ctypes.c_float()
        low = numerics.rank_of(ctypes.c_int64(n), ctypes.c_double(ratio), ctypes.byref(weight))
        expected_low, expected_weight = reference.quantile_rank(n, ratio)
        assert (low, weight.value) == (expected_low, np.float32(expected_weight))


# ---- The kernels --------------------------------------------------------------------------------


class Shim:
    """Stands in for relora_kernels._C: the same kernels, on the CPU. It gives them a workspace full of garbage
    and checks that they do not write behind it."""

    def __init__(self, library):
        self.library, self.order, self.blocks, self.bytes = library, 0, 0, 0
        self.cluster = 0  # blocks of the largest cluster; 0: none, as on GPUs before Hopper
        self.multiprocessors = None  # None: from the order; the fewer, the more spans per block
        library.simt_prune_workspace.restype = ctypes.c_int64
        library.simt_prune_settled.restype = ctypes.c_bool

    def prune_workspace(self, rows, device=0):
        self._be_a_device()
        self.bytes = self.library.simt_prune_workspace(*self._list(rows))
        return self.bytes + 256

    def prune(self, rows, ratio, workspace, bytes_, device, stream):
        assert bytes_ == self.bytes + 256
        ctypes.memset(workspace, GARBAGE, bytes_)
        needed = ctypes.c_int64(self.bytes)
        self._call("prune", rows, ctypes.c_double(ratio), ctypes.c_void_p(workspace), needed)
        self.window = (ctypes.c_uint32 * 2)()
        self.settled = self.bytes > 0 and self.library.simt_prune_settled(
            ctypes.c_void_p(workspace), self.window
        )
        assert ctypes.string_at(workspace + self.bytes, 256) == bytes([GARBAGE]) * 256

    def prune_random(self, rows, threshold, device, stream):
        self._call("prune_random", rows, ctypes.c_uint64(threshold))

    def magnitude_counts(self, rows, prefixes, shift, bits, *rest):
        counts, lowest, highest, device, stream = rest
        outputs = map(ctypes.c_void_p, (counts, lowest, highest))
        self._call("magnitude_counts", rows, ctypes.c_void_p(prefixes), shift, bits, *outputs)

    @staticmethod
    def _list(rows):
        return ctypes.c_void_p(rows.buffer_info()[0]), ctypes.c_int64(len(rows) // 7)

    def _be_a_device(self):
        multiprocessors = self.multiprocessors or 1 + 2 * (self.order % 3)
        self.library.simt_device(multiprocessors, self.cluster)

    def _call(self, name, rows, *arguments):
        blocks = ctypes.c_long()
        function = getattr(self.library, f"simt_{name}")
        self._be_a_device()
        error = function(*self._list(rows), *arguments, self.order, ctypes.byref(blocks))
        self.blocks = blocks.value
        if error:
            raise RuntimeError(f"cudaError {error}")


@pytest.fixture(scope="module")
def shim_library(tmp_path_factory):
    return simt_library(tmp_path_factory, "prune_harness.cpp")


@pytest.fixture
def shim(shim_library, monkeypatch):
    shim = Shim(shim_library)
    put_in_place(monkeypatch, launcher, shim)
    return shim


def values_of(kind: str, n: int, generator) -> torch.Tensor:
    base = torch.randn(n, generator=generator)
    some = torch.rand(n, generator=generator)
    pick = int(torch.randint(n, (), generator=generator))
    base[pick] = -0.0
    return {
        "normal": lambda: base * 1e-3,
        "log-normal": lambda: (4 * base).exp(),
        "ties": lambda: (2 * base).round(),
        "mostly zero": lambda: base * (some < 0.2) * torch.where(some < 0.1, 1.0, -1.0),
        "constant": lambda: torch.full((n,), -2.5),
        "zeros": lambda: torch.zeros(n).copysign(base),
        "denormal": lambda: base * 1e-40,
        "tiny": lambda: base * 1e-27,
        "with inf": lambda: torch.where(some < 0.1, torch.inf, base),
        "all inf": lambda: torch.full((n,), -torch.inf),
        "one NaN": lambda: base.index_fill(0, torch.tensor(pick), torch.nan),
        "all NaN": lambda: torch.full((n,), torch.nan),
        "sorted": lambda: base.abs().sort().values,
    }[kind]()


KINDS = (
    "normal", "log-normal", "ties", "mostly zero", "constant", "zeros", "denormal", "tiny",
    "with inf", "all inf", "one NaN", "all NaN", "sorted",
)  # fmt: skip


class Guarded:
    """A tensor inside a larger buffer, whose other elements must not change."""

    def __init__(self, values: torch.Tensor, offset: int, device="cpu"):
        self.buffer = torch.full((64 + offset + len(values) + 64,), 7.0, dtype=values.dtype).to(
            device
        )
        self.slice = slice(64 + offset, 64 + offset + len(values))
        self.tensor.copy_(values)

    @property
    def tensor(self):
        return self.buffer[self.slice]

    def copy(self):
        other = object.__new__(Guarded)
        other.buffer, other.slice = self.buffer.clone(), self.slice
        return other


def drawn_list(number, sizes, device="cpu", partner_dtypes=(None, *DTYPES)):
    """(tensors, partners or []): one tensor of each size; `number` seeds dtypes, kinds and alignments."""
    rng, generator = np.random.default_rng(number), torch.Generator().manual_seed(number)
    partner_dtype = partner_dtypes[number % len(partner_dtypes)]
    tensors, partners = [], []
    for i, n in enumerate(sizes):
        dtype = DTYPES[rng.integers(3)]
        kind = KINDS[(number + i) % len(KINDS)]
        values = values_of(kind, n, generator).to(dtype)
        tensors.append(Guarded(values, int(rng.choice([0, 0, 1, 3])), device))
        if partner_dtype is not None:
            # Mostly the tensor's own dtype: the fast path.
            other = partner_dtype if rng.random() < 0.5 else dtype
            ones = torch.rand(n, generator=generator).to(other) + 1
            ones[0] = torch.nan  # never multiplied, only kept or zeroed
            partners.append(Guarded(ones, int(rng.choice([0, 0, 2])), device))
    return tensors, partners


def assert_equal_lists(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a.buffer, b.buffer)


def check_against_reference(tensors, ratio, partners=(), run=None):
    expected = [g.copy() for g in tensors], [g.copy() for g in partners]
    reference.prune_([g.tensor for g in expected[0]], ratio, [g.tensor for g in expected[1]])
    (run or launcher.prune_)([g.tensor for g in tensors], ratio, [g.tensor for g in partners])
    assert_equal_lists(tensors, expected[0])
    assert_equal_lists(partners, expected[1])


SMALL = [1, 2, 31, 33, 1000, 4096, 8193]
EDGES = [SPAN - 1, SPAN, SPAN + 1, 2 * SPAN, 2 * SPAN + 4099]


@pytest.mark.parametrize("ratio", RATIOS)
def test_small_tensors_equal_the_reference(shim, ratio):
    for number in range(16):
        shim.order = number % 5
        check_against_reference(*insert(drawn_list(number, SMALL), ratio))
        assert shim.blocks == len(SMALL)


def insert(lists, ratio):
    return lists[0], ratio, lists[1]


@pytest.mark.parametrize("ratio", RATIOS)
def test_one_block_and_several_equal_the_reference(shim, ratio):
    for number in range(12):
        shim.order = (number + 3) % 5
        check_against_reference(*insert(drawn_list(100 + number, EDGES), ratio))
        assert shim.blocks > 12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_large_tensor_with_its_own_dtypes_partner(shim, kind, dtype):
    generator = torch.Generator().manual_seed(1)
    n = 3 * SPAN - 8000
    for shim.order, ratio in enumerate([0.3, 0.9, 0.997]):
        t = Guarded(values_of(kind, n, generator).to(dtype), 0)
        partner = Guarded(torch.rand(n, generator=generator).to(dtype) + 1, 0)
        check_against_reference([t], ratio, [partner])


def between_guards(values: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy of `values` that begins or ends where a page begins that must not be touched."""
    page = mmap.PAGESIZE
    pages = -(-values.nbytes // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + (pages + 1) * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), page, 0) == 0
    offset = page + at_end * (pages * page - values.nbytes)
    return torch.frombuffer(memory, dtype=values.dtype, count=len(values), offset=offset).copy_(
        values
    )


def assert_survives(work) -> None:
    """In a child, since an access to a guard ends the process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # a fork has none of OpenMP's threads
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


GUARDED_SIZES = [1, 5003, SPAN + 1, 2 * SPAN + 4099, 3 * SPAN - 8000, 4 * SPAN]


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_nothing_outside_a_tensor_is_accessed(shim, dtype, at_end):
    lists = [[torch.randn(n).to(dtype) for n in GUARDED_SIZES] for _ in range(2)]
    tensors, partners = ([between_guards(t, at_end) for t in some] for some in lists)
    prefixes, zeros = torch.zeros(len(tensors), dtype=torch.int64), [0] * len(tensors)

    def work():
        for shim.order in range(3):
            launcher.prune_(tensors, 0.3, [])
            launcher.prune_(tensors, 0.4, partners)
            launcher.magnitude_counts(tensors, prefixes, 5, 10)
        launcher.prune_random_(tensors, 0.5, partners, zeros, zeros)

    assert_survives(work)


def test_lists_of_many_small_tensors(shim):
    """More than the 400 that one table holds: none is left out."""
    generator = torch.Generator().manual_seed(4)
    sizes = [1 + i % 37 for i in range(450)]

    def drawn(offset=0.0):
        return [
            Guarded((torch.randn(n, generator=generator) + offset).to(DTYPES[i % 3]), 0)
            for i, n in enumerate(sizes)
        ]

    check_against_reference(drawn(), 0.5, drawn(5.0))
    plain = [g.tensor for g in drawn()]
    prefixes = torch.zeros(len(plain), dtype=torch.int64)
    for ours, expected in zip(
        launcher.magnitude_counts(plain, prefixes, 13, 3),
        reference.magnitude_counts(plain, prefixes, 13, 3),
        strict=True,
    ):
        assert torch.equal(ours, expected)
    keys, ours = (list(range(450)), [0] * 450), drawn()
    theirs = [g.copy() for g in ours]
    launcher.prune_random_([g.tensor for g in ours], 0.5, [], *keys)
    reference.prune_random_([g.tensor for g in theirs], 0.5, [], *keys)
    assert_equal_lists(ours, theirs)


def test_lists_of_many_tensors(shim):
    """A hundred small tensors, and 52 that take several blocks, of very different magnitudes."""
    generator = torch.Generator().manual_seed(5)
    rng = np.random.default_rng(5)
    sizes = [*rng.integers(1, 3000, 100), *[SPAN + 1 + int(i) for i in rng.integers(0, 99, 52)]]
    tensors = [
        Guarded((torch.randn(int(n), generator=generator) * 10.0 ** int(rng.integers(-8, 8))), 0)
        for n in rng.permutation(sizes)
    ]
    for i, g in enumerate(tensors):
        if i % 4 == 0:
            tensors[i] = Guarded(g.tensor.to(DTYPES[1 + i // 4 % 2]), 0)
    shim.order = 7
    check_against_reference(tensors, 0.9)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("listed", "spans"), [(7000, 10), (9000, 40)])  # a block lists 8192
def test_a_bin_that_lies_in_one_block(shim, listed, spans, paired):
    """One block finds all list entries, and the tensor's list has room for them."""
    n = spans * SPAN
    t = torch.cat([torch.rand(n // 2) * 0.5, torch.rand(n // 2) + 4.0])
    t[3 * SPAN : 3 * SPAN + listed] = 1.0 + torch.rand(listed) / 64
    ratio = ((t < 1).sum().item() + listed // 2) / (n - 1)
    partners = [Guarded(torch.ones(n), 0)] if paired else []
    check_against_reference([Guarded(t, 0)], ratio, partners)


NEAR_ABOVE = (  # the least key above the bin, weights to try, how many of them that key decides at least
    (0x3FC00000, [step / 10 for step in range(-12, 13)], 4),
    (0x3FC00064, [0.9, 0.9975, 0.998, 0.9985, 0.999], 4),
)


def thresholds_that_round_up_to_an_element_above_the_bin(n=SPAN + 501, cases=NEAR_ABOVE):
    """0x3FBFFFFF and 0x3FC00000 lie in different bins of 13 bits, with no float32 between them. 0x3FC00064
    becomes the threshold only if the weight is very close to 1."""
    for above, steps, least in cases:
        keys = torch.full((n,), above, dtype=torch.int32)
        keys[: n // 2] = 0x3F000000 + torch.arange(n // 2, dtype=torch.int32)
        keys[n // 2 - 3 : n // 2] = 0x3FBFFFFF
        keys[-9:] = above + 1
        t = keys.view(torch.float32)
        decided_above = 0
        for step in steps:
            ratio = (n // 2 - 1 + step) / (n - 1)
            decided_above += reference.magnitude_quantile(t, ratio).item() == t[n // 2].item()
            check_against_reference([Guarded(t, 0)], ratio, [Guarded(torch.ones(n), 0)])
        assert decided_above >= least


def test_a_threshold_that_rounds_up_to_an_element_above_the_bin(shim):
    thresholds_that_round_up_to_an_element_above_the_bin()


def test_where_the_list_has_room_for_the_bin_a_threshold_above_it_goes_past_the_list(shim):
    """The bin's keys are listed, and the element above it is in no list."""
    cases = [(0x3FC00000, [-0.4, 0.1, 0.6, 0.9], 2)]
    thresholds_that_round_up_to_an_element_above_the_bin(10**6, cases)


def test_wide_counters_and_tensors_without_a_list(tmp_path_factory, monkeypatch):
    """The path of tensors of 2^32 elements and more, here from 60000 on."""
    shim = Shim(simt_library(tmp_path_factory, "prune_harness.cpp", "-DRELORA_WIDE_FROM=60000"))
    put_in_place(monkeypatch, launcher, shim)
    for number in range(8):
        shim.order = number % 3
        check_against_reference(*insert(drawn_list(200 + number, [*EDGES, 900]), 0.9))


# ---- Windows: the path of tensors of 2^24 elements and more, here from 50000 on ----------------


@pytest.fixture(scope="module")
def sampled_library(tmp_path_factory):
    return simt_library(tmp_path_factory, "prune_harness.cpp", "-DRELORA_SAMPLED_FROM=50000")


@pytest.fixture
def sampled(sampled_library, monkeypatch):
    shim = Shim(sampled_library)
    put_in_place(monkeypatch, launcher, shim)
    return shim


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_window_accesses_nothing_outside_a_tensor(sampled, dtype, at_end):
    t, partner = (between_guards(torch.randn(2**20).to(dtype), at_end) for _ in range(2))

    def work():
        launcher.prune_([t], 0.9, [partner])
        assert sampled.settled

    assert_survives(work)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_every_kind_of_tensor(sampled, kind):
    generator = torch.Generator().manual_seed(2)
    n = 2**20 - 3  # smaller ones have little room for a list
    for sampled.order, ratio in enumerate([0.3, 0.9, 0.997]):
        t = Guarded(values_of(kind, n, generator), 0)
        partners = [Guarded(torch.rand(n, generator=generator) + 1, 0)] if ratio == 0.9 else []
        check_against_reference([t], ratio, partners)
        continuous = kind in ("normal", "log-normal", "tiny", "one NaN", "all NaN", "sorted")
        if ratio == 0.9 and continuous:
            assert sampled.settled
        if kind in ("ties", "constant", "zeros", "all inf"):
            assert not sampled.settled


@pytest.mark.parametrize("ratio", RATIOS)
def test_lists_with_and_without_windows(sampled, ratio):
    for number in range(3):
        sampled.order = number
        check_against_reference(*insert(drawn_list(300 + number, [*EDGES, 900, 200_000]), ratio))


@pytest.mark.parametrize("paired", [False, True])
def test_more_windows_than_one_launch_takes(sampled, paired):
    """Two chains of launches, one after the other in the same workspace, for very different sizes."""
    generator = torch.Generator().manual_seed(4)
    sizes = [60_000 + 5003 * i for i in range(17)] + [700_001]
    kinds = [KINDS[i % len(KINDS)] for i in range(len(sizes))]
    tensors = [Guarded(values_of(k, n, generator), 0) for k, n in zip(kinds, sizes)]
    partners = []
    if paired:
        dtypes = [DTYPES[i % 3] for i in range(len(sizes))]
        partners = [
            Guarded((torch.rand(n, generator=generator) + 1).to(d), 0)
            for n, d in zip(sizes, dtypes)
        ]
    sampled.order = 5
    check_against_reference(tensors, 0.9, partners)


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.99])
def test_a_window_by_one_strip_in_four(sampled, ratio):
    """For a matrix whose columns differ by powers of two, and which is as wide as the sample's stride."""
    generator = torch.Generator().manual_seed(3)
    t = torch.randn(2**17, 16, generator=generator) * 2.0 ** torch.arange(-4, 12)[None] / 64
    t[torch.rand(t.shape, generator=generator) < 0.1] *= 1e3
    check_against_reference([Guarded(t.flatten(), 0)], ratio)
    assert sampled.settled
    check_against_reference([Guarded(t.flatten()[:-3], 1)], ratio)  # not aligned
    assert not sampled.settled


def seen_by_the_sample(strips):
    """The strips of 16 bytes that the sample takes from a tensor of `strips` strips."""
    every = strips // 2**17
    drawn = torch.arange(2**17) * 2654435761 % 2**32 >> 8
    return torch.arange(2**17) * every + drawn % every


def test_a_sample_that_misleads(sampled):
    """All sampled strips hold ones; the quantile lies among the values of the others."""
    t = torch.rand(2**19, 4) + 2.0
    t[seen_by_the_sample(2**19)] = 1.0
    assert (t == 1.0).sum() == 2**19
    check_against_reference([Guarded(t.flatten(), 0)], 0.9)
    assert not sampled.settled
    t[t != 1.0] = torch.rand(3 * 2**19) / 2 + 0.5  # below and above them
    check_against_reference([Guarded(t.flatten(), 0)], 0.5)
    assert not sampled.settled


def test_both_neighbours_have_to_be_in_the_window(sampled):
    """The sampled elements decide where the window is; how many of the others are small decides where the
    quantile is."""
    seen = torch.zeros(2**19, 4, dtype=torch.bool)
    seen[seen_by_the_sample(2**19)] = True
    seen = seen.flatten()
    t = torch.rand(2**21, generator=torch.Generator().manual_seed(4)) + 1.0
    low, weight = reference.quantile_rank(2**21, 0.9)
    assert weight > 0

    def settled(small):
        rest = torch.full((3 * 2**19,), 4.0)
        rest[:small] = 0.5
        t[~seen] = rest
        check_against_reference([Guarded(t, 0)], 0.9)
        return sampled.settled

    assert settled(round(0.9 * 3 * 2**19))
    begin, width = sampled.window
    keys = t[seen].view(torch.int32)
    below, inside = (keys < begin).sum().item(), (keys < begin + width).sum().item()
    # Numbers of small elements with which the rank is the window's first, its last.
    first, last = low - below, low + 1 - inside
    assert settled(first) and not settled(first + 1)
    assert settled(last + 1) and not settled(last)

    # One block with more keys in the window than it collects, the least of all among them.
    settled(first + 9001)
    crowd = (~seen).nonzero()[:, 0]
    crowd = crowd[crowd // SWEEP % 6 == 0][:9001]  # six blocks take turns
    t[crowd] = torch.tensor(begin + width - 1, dtype=torch.int32).view(torch.float32)
    t[crowd[0]] = torch.tensor(begin, dtype=torch.int32).view(torch.float32)
    check_against_reference([Guarded(t, 0)], 0.9)
    assert not sampled.settled


def test_a_window_of_more_keys_than_the_list_has_room_for(sampled):
    n = 10 * SPAN + 8001  # the histogram takes most of the memory allowed
    t = torch.randn(n, generator=torch.Generator().manual_seed(5))
    check_against_reference([Guarded(t, 0)], 0.9, [Guarded(torch.ones(n), 0)])
    assert sampled.window[1] and not sampled.settled


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_16_bit_elements(sampled, kind, dtype):
    """Every bin is one key, so ties and zeros do not make a window fail."""
    generator = torch.Generator().manual_seed(6)
    n = 2**19 - 3
    for sampled.order, ratio in enumerate([0.3, 0.9, 0.997]):
        t = Guarded(values_of(kind, n, generator).to(dtype), 0)
        partners = [Guarded(torch.rand(n, generator=generator).to(dtype) + 1, 0)]
        check_against_reference([t], ratio, partners if ratio == 0.9 else [])
        # At 0.9 the quantile is in the gap between numbers and infinities.
        assert sampled.settled == (kind != "with inf" or ratio != 0.9)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_window_of_16_bit_elements_sees_a_nan_anywhere(sampled, dtype):
    """In either half of a word and behind the last whole sweep. Infinity, the key below, does not count as NaN."""
    n = 2**16 + 4099
    t = torch.randn(n)
    t[torch.randperm(n)[:1000]] = torch.inf
    check_against_reference([Guarded(t.to(dtype), 0)], 0.5)
    for sampled.order, at in enumerate((0, 1, 6, 7, 2**15 + 13, 2**16 + 1, n - 2, n - 1)):
        with_nan = t.index_fill(0, torch.tensor(at), -torch.nan)
        check_against_reference([Guarded(with_nan.to(dtype), 0)], 0.5)
        assert sampled.settled


@pytest.mark.parametrize("least", [4000, 4003])
@pytest.mark.parametrize("apart", [1016, 1020, 1021, 1023, 1024, 1027])
def test_the_widest_window_of_16_bit_elements(sampled, least, apart):
    """The quantile lies between two keys. A window consists of whole groups of four keys, 1024 keys at most."""
    n = 150_001
    keys = torch.full((n,), least, dtype=torch.int16)
    keys[torch.randperm(n, generator=torch.Generator().manual_seed(7))[: n // 2]] += apart
    width = (least + apart) // 4 * 4 + 4 - least // 4 * 4
    check_against_reference([Guarded(keys.view(torch.bfloat16), 0)], 0.5)
    assert sampled.settled == (width <= 1024)
    assert sampled.window[1] == (width if width <= 1024 else 0)


def test_both_neighbours_have_to_be_in_the_window_of_16_bit_elements(sampled):
    """As for 32-bit elements. Strips hold eight elements, and one strip in two is sampled."""
    seen = torch.zeros(2**18, 8, dtype=torch.bool)
    seen[seen_by_the_sample(2**18)] = True
    seen = seen.flatten()
    t = (torch.rand(2**21, generator=torch.Generator().manual_seed(8)) + 1.0).bfloat16()
    low, weight = reference.quantile_rank(2**21, 0.9)
    assert weight > 0

    def settled(small):
        rest = torch.full((2**20,), 4.0, dtype=t.dtype)
        rest[:small] = 0.5
        t[~seen] = rest
        check_against_reference([Guarded(t, 0)], 0.9)
        return sampled.settled

    assert settled(round(0.9 * 2**20))
    begin, width = sampled.window
    keys = t[seen].view(torch.int16)
    below, inside = (keys < begin).sum().item(), (keys < begin + width).sum().item()
    first, last = low - below, low + 1 - inside
    assert settled(first) and not settled(first + 1)
    assert settled(last + 1) and not settled(last)


@pytest.mark.parametrize("fail", [(0,), (1,), (0, 1)])
def test_16_bit_tensors_of_one_launch_some_of_whose_windows_fail(sampled, fail):
    """A block counts several parts, of one tensor or two, and skips settled tensors."""
    generator = torch.Generator().manual_seed(9)
    large = Guarded(torch.randn(3_300_000, generator=generator), 0)  # workspace for the other two
    tensors = [large]
    for i, n in enumerate((200_000, 150_003)):
        t = torch.randn(n, generator=generator)
        if i in fail:
            t = torch.where(torch.rand(n, generator=generator) < 0.9, 1e-4 * t, 1e4 * t)
        tensors.append(Guarded(t.bfloat16(), 0))
    for sampled.multiprocessors in (1, 2):
        check_against_reference([g.copy() for g in tensors], 0.9)
        assert sampled.settled == (0 not in fail)


# ---- Tensors that a cluster holds: here a block holds a sweep, and takes as much again unheld ---


@pytest.fixture(scope="module")
def held_library(tmp_path_factory):
    return simt_library(tmp_path_factory, "prune_harness.cpp", "-DRELORA_HELD_SWEEPS=1")


@pytest.fixture(params=[8, 16])
def held(request, held_library, monkeypatch):
    shim = Shim(held_library)
    shim.cluster = request.param
    put_in_place(monkeypatch, launcher, shim)
    return shim


def held_sizes(cluster):
    """About one sweep per block; as many elements as a cluster takes, and one more, for a chain."""
    sweep, most = cluster * SWEEP, 2 * cluster * SWEEP
    return [SPAN + 1, max(sweep - 3, SPAN + 2), sweep, sweep + 5, most - 130, most, most + 1]


@pytest.mark.parametrize("at_end", [True, False])
def test_a_cluster_accesses_nothing_outside_a_tensor(held, at_end):
    lists = [[torch.randn(n) for n in held_sizes(held.cluster)] for _ in range(2)]
    tensors, partners = ([between_guards(t, at_end) for t in some] for some in lists)
    assert_survives(lambda: launcher.prune_(tensors, 0.5, partners))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("paired", [False, True])
def test_tensors_that_a_cluster_holds(held, ratio, paired):
    generator = torch.Generator().manual_seed(7)
    sizes = held_sizes(held.cluster)
    number = RATIOS.index(ratio) + paired
    held.order = number % 5
    tensors = [
        Guarded(values_of(KINDS[(2 * number + i) % len(KINDS)], n, generator), 0)
        for i, n in enumerate(sizes)
    ]
    partners = [Guarded(torch.rand(n, generator=generator) + 1, 0) for n in sizes if paired]
    check_against_reference(tensors, ratio, partners)
    held.prune_workspace(rows_of(sizes[:-1], torch.float32, paired))
    assert held.bytes == 0
    held.prune_workspace(rows_of(sizes, torch.float32, paired))
    assert held.bytes > 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_that_a_cluster_holds(held, kind):
    generator = torch.Generator().manual_seed(8)
    n = 12_000 * held.cluster + 71
    for held.order, ratio in enumerate([0.3, 0.9, 0.997]):
        t = Guarded(values_of(kind, n, generator), 0)
        partner = Guarded(torch.rand(n, generator=generator) + 1, 0)
        check_against_reference([t], ratio, [partner])
        assert held.blocks == held.cluster


def test_what_a_cluster_does_not_hold_goes_the_other_ways(held):
    """Other dtypes, misaligned tensors and partners, partners with another element size."""
    for number in range(6):
        held.order = number % 5
        check_against_reference(*insert(drawn_list(100 + number, [*EDGES, 900]), 0.9))


def test_a_clusters_threshold_that_rounds_up_to_an_element_above_its_bin(held):
    held.multiprocessors = 8
    thresholds_that_round_up_to_an_element_above_the_bin()
    assert held.blocks == held.cluster


@pytest.mark.parametrize("sizes, blocks", [
    ([131_000, *[60_000] * 3, 65_536, 49_153], 8),  # eight blocks hold most tensors whole
    ([131_000] * 4 + [60_000], 16),  # they hold few whole
    ([131_073, *[60_000] * 6], 16),  # one is larger than eight blocks take
    ([200_000] * 3 + [60_000, 65_537, 50_001, 131_073] * 3, 16),  # larger ones among the others
    ([65_536] * 3, 16),  # few: the rest of the device has nothing to do
])  # fmt: skip
def test_a_list_decides_by_how_many_blocks_it_is_held(held_library, monkeypatch, sizes, blocks):
    held = Shim(held_library)
    held.cluster, held.multiprocessors = 16, 8
    put_in_place(monkeypatch, launcher, held)
    generator = torch.Generator().manual_seed(len(sizes))
    kinds = [KINDS[i % len(KINDS)] for i in range(len(sizes))]
    lists = [Guarded(values_of(kind, n, generator), 0) for kind, n in zip(kinds, sizes)]
    partners = [Guarded(torch.rand(n, generator=generator) + 1, 0) for n in sizes]
    check_against_reference(lists, 0.9, partners)
    assert held.blocks == blocks * len(sizes)


def test_clusters_of_the_size_that_a_gpu_has(shim_library, monkeypatch):
    """Three sweeps per block: 393,216 elements are held whole, up to twice as many by half; a chain takes more."""
    held = Shim(shim_library)
    held.cluster = 16
    put_in_place(monkeypatch, launcher, held)
    whole = 3 * 16 * SWEEP
    sizes = [SPAN + 1, whole, whole + 1, 2 * whole - 3, 2 * whole, 2 * whole + 1]
    generator = torch.Generator().manual_seed(12)
    for ratio, kinds in ((0.9, KINDS), (0.5, KINDS[::-1])):
        tensors = [Guarded(values_of(kind, n, generator), 0) for kind, n in zip(kinds, sizes)]
        partners = [Guarded(torch.rand(n, generator=generator) + 1, 0) for n in sizes]
        check_against_reference(tensors, ratio, partners)
        assert held.blocks >= 16 * (len(sizes) - 1)
    held.prune_workspace(rows_of(sizes[:-1], torch.float32, True))
    assert held.bytes == 0


def test_a_device_that_refuses_clusters_has_the_chains(held_library, monkeypatch):
    refusing = Shim(held_library)
    refusing.cluster = -1
    put_in_place(monkeypatch, launcher, refusing)
    check_against_reference([Guarded(torch.randn(60_001), 0)], 0.9, [])
    assert refusing.bytes > 0  # clusters need no workspace


def test_the_driver_is_asked_about_clusters_only_for_what_they_hold(held_library, monkeypatch):
    shim = Shim(held_library)
    shim.cluster = 16
    put_in_place(monkeypatch, launcher, shim)
    before = held_library.simt_questions()
    launcher.prune_([torch.randn(SPAN), torch.randn(60_000).bfloat16()], 0.9, [])
    assert held_library.simt_questions() == before
    launcher.prune_([torch.randn(SPAN), torch.randn(60_000)], 0.9, [])
    assert held_library.simt_questions() > before


def test_a_workspace_that_is_too_small_is_refused(shim):
    t = torch.randn(10**6)
    before, rows = t.clone(), launcher._Flat([t]).rows
    workspace = torch.empty(shim.prune_workspace(rows), dtype=torch.uint8)
    call = "prune", rows, ctypes.c_double(0.9), ctypes.c_void_p(workspace.data_ptr())
    with pytest.raises(RuntimeError, match="cudaError 1"):
        shim._call(*call, ctypes.c_int64(shim.bytes - 1))
    assert torch.equal(t, before)
    shim._call(*call, ctypes.c_int64(shim.bytes))
    assert not torch.equal(t, before)


def test_strided_and_empty_tensors(shim):
    base, partner = torch.randn(300, 401), torch.rand(300, 401) + 1
    views = [lambda t: t.T[3:260, ::2], lambda t: t[:, 5], lambda t: t[7:9], lambda t: t[:0]]
    for view in views:
        ours, theirs = (base.clone(), partner.clone()), (base.clone(), partner.clone())
        launcher.prune_([view(ours[0])], 0.7, [view(ours[1])])
        if view(base).numel():
            reference.prune_([view(theirs[0])], 0.7, [view(theirs[1])])
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_version_counters_move_for_what_is_written(shim):
    t, partner = torch.randn(9), torch.ones(9)
    versions = t._version, partner._version
    launcher.prune_([t], 0.5, [partner])
    launcher.prune_random_([t], 0.5, [partner], [1], [0])
    assert (t._version, partner._version) == (versions[0] + 2, versions[1] + 2)
    launcher.magnitude_counts([t], torch.zeros(1, dtype=torch.int64), 18, 13)
    assert t._version == versions[0] + 2


def test_the_python_around_the_launches_of_a_models_moments(monkeypatch):
    """In Python's instructions, because time depends on the machine and on what else it does: 146 a pair of
    tensors by CPython 3.11, some 2 us; 292 with checks tensor by tensor."""
    nothing = types.SimpleNamespace(
        prune_workspace=lambda rows, device: 1, prune=lambda *arguments: None
    )
    put_in_place(monkeypatch, launcher, nothing)
    monkeypatch.setattr(launcher, "why_no_device", lambda device: None)

    def instructions(pairs: int) -> int:
        tensors, partners = ([torch.ones(3, 4) for _ in range(pairs)] for _ in range(2))
        with use_backend("cuda"):
            prune_(tensors, 0.9, partners)  # what only a first call does is not counted
            return count_instructions(lambda: prune_(tensors, 0.9, partners))

    assert 0 < instructions(337) - instructions(1) < 336 * 200


def count_instructions(function) -> int:
    """How many bytecode instructions `function` executes."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_a_failed_launch_names_op_and_shapes(shim, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("cudaErrorLaunchFailure")

    monkeypatch.setattr(shim, "prune", fail)
    says = r"prune_: tensors \(2, 3\), \(4,\).* on cpu: cudaErrorLaunchFailure"
    with pytest.raises(RuntimeError, match=says):
        launcher.prune_([torch.ones(2, 3), torch.ones(4)], 0.5, [])


def rows_of(sizes, dtype, paired):
    partner = (16, launcher.CODES[dtype]) if paired else (0, 0)
    rows = [(16, partner[0], n, launcher.CODES[dtype], partner[1], 0, 0) for n in sizes]
    return launcher.array("q", itertools.chain(*rows))


# 24 layers of hidden 2048, ffn 5461 at r = 128: the 1.3B model's lora_A and lora_B.
LORA_1B = [s * 128 for s in ([2048] * 8 + [2048, 5461] * 3) * 24]


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        [10**8],
        [2**31 + 1],
        LORA_1B,
        [SPAN + 1] * 400,
        [10**6] * 10,
        [3 * 10**6] * 9,
        [9 * 10**6] * 3,
        [SPAN + 1] * 90,
        [10**6] * 4,
        [35 * 10**5],
    ],
    ids=["1e8", "2^31", "1.3B", "400 of 0.2 MB", "10 of 4 MB", "9 of 12 MB", "3 of 36 MB",
         "90 of 0.2 MB", "4 of 4 MB", "1 of 14 MB"],
)  # fmt: skip
def test_workspace_is_under_two_per_cent_of_the_list(shim, sizes, paired, dtype):
    """Two per cent of the tensors whose magnitudes decide; their partners do not count."""
    shim.prune_workspace(rows_of(sizes, dtype, paired))
    assert 0 < shim.bytes < 0.02 * sum(sizes) * dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_counters_are_wide_from_2_to_the_32_elements_on(shim, dtype):
    """The histogram takes twice the bytes, and there is no list, because its entries have 32 bits."""
    narrow, wide = (shim.prune_workspace(rows_of([n], dtype, False)) for n in (2**32 - 1, 2**32))
    bins = 2**13 if dtype == torch.float32 else 2**15
    if dtype == torch.float32:
        assert narrow > 2**32 // 64 * 4
    else:
        assert wide - narrow == 4 * bins
    assert 8 * bins < wide < 8 * bins + 2**13


@pytest.mark.parametrize("sizes", [[SPAN + 1] * 3, [SPAN + 1], [10**6], [450_000]])
def test_the_workspace_of_a_short_list_is_small(shim, sizes):
    """At most 2 % of it, or a tensor's histogram. The result does not depend on the room left for a list."""
    check_against_reference([Guarded(torch.randn(n), 0) for n in sizes], 0.9)
    assert 0 < shim.bytes <= max(0.02 * 4 * sum(sizes), 33 << 10)


# ---- Random pruning and histograms --------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.999, 1.0])
def test_random_pruning_draws_the_references_bits(shim, ratio):
    for number in range(12):
        shim.order = number % 3
        sizes = [1, 5, 33, 1000, 8193, SPAN + 17] if number < 4 else [3, 70, 4099]
        tensors, partners = drawn_list(300 + number, sizes)
        rng = np.random.default_rng(number)
        seeds = [int(s) for s in rng.integers(-(2**63), 2**63 - 1, len(sizes))]
        first = [int(rng.choice([0, 1, 2, 3, 4, 2**34 - 9, 2**40 + 6])) for _ in sizes]
        expected = [g.copy() for g in tensors], [g.copy() for g in partners]
        keys = (seeds, first)
        for function, lists in ((reference.prune_random_, expected),
                                (launcher.prune_random_, (tensors, partners))):  # fmt: skip
            function(*[[g.tensor for g in lists[0]], ratio, [g.tensor for g in lists[1]]], *keys)
        assert_equal_lists(tensors, expected[0])
        assert_equal_lists(partners, expected[1])


@pytest.mark.parametrize(
    "shift, bits", [(18, 13), (8, 10), (0, 8), (7, 8), (0, 7), (0, 0), (31, 0)]
)
def test_histograms_equal_the_reference(shim, shift, bits):
    for number in range(6):
        shim.order = number % 3
        tensors, _ = drawn_list(400 + number, [1, 700, 5003, SPAN + 5])
        tensors = [g.tensor for g in tensors] + [torch.empty(0)]
        prefixes = torch.tensor(
            [reference.magnitude_keys(t)[-1].item() >> (shift + bits) if t.numel() else 0
             for t in tensors]
        )  # fmt: skip
        expected = reference.magnitude_counts(tensors, prefixes, shift, bits)
        ours = launcher.magnitude_counts(tensors, prefixes, shift, bits)
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == torch.int64 and torch.equal(a, b)


# ---- What nvcc makes of it ----------------------------------------------------------------------


def test_every_pass_moves_16_bytes_at_a_time(tmp_path):
    nvcc = cuda_build.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    ptx = tmp_path / "prune.ptx"
    flags = [*cuda_build.COMPILE_FLAGS, "-arch=compute_90"]
    cuda_build.run(nvcc, *flags, "-ptx", CSRC / "prune.cu", "-o", ptx)
    kernels = dict(
        re.findall(r"\.entry \w+?\d\d([a-z]+_kernel\w*?)E?v?N\w*\((.*?)\n}", ptx.read_text(), re.S)
    )
    assert len(kernels) == 20, kernels.keys()
    for name, body in kernels.items():
        reads = not name.startswith("zero")
        assert bool(re.search(r"ld\.global(\.cs)?\.v4\.\w+", body)) == reads, name
        # sample writes its histogram's zeros.
        writes = not name.startswith(("count", "recount", "window"))
        assert bool(re.search(r"st\.global(\.cs)?\.v4\.\w+", body)) == writes, name


# ---- On a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    """Runs the ops with the CUDA backend on the GPU; skips if there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if reason := cuda.why_no_device(torch.device("cuda", 0)):
        pytest.skip(reason)
    with use_backend("cuda"):
        yield "cuda"


def skip_unless_free(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory")


@pytest.mark.parametrize("ratio", RATIOS)
def test_gpu_equals_the_reference(gpu, ratio):
    for number in range(24):
        lists = drawn_list(number, [*SMALL, *EDGES, 500_000], gpu)
        check_against_reference(*insert(lists, ratio), run=prune_or_none)


def prune_or_none(tensors, ratio, partners):
    prune_(tensors, ratio, partners or None)


def test_gpu_hundreds_of_tensors(gpu):
    tensors = [torch.randn(n // 4, device=gpu) * 1e-4 for n in LORA_1B]
    partners = [t.square() + 1 for t in tensors]
    expected = [t.clone() for t in tensors], [t.clone() for t in partners]
    reference.prune_(expected[0], 0.99, expected[1])
    prune_(tensors, 0.99, partners)
    for ours, theirs in zip((*tensors, *partners), (*expected[0], *expected[1])):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("paired", [False, True])
def test_gpu_tensors_that_a_cluster_holds(gpu, ratio, paired):
    """On Hopper. Clusters of 16 take up to 786432 elements, half of them in shared memory; or clusters of 8."""
    if torch.cuda.get_device_capability() == (9, 0):
        rows = rows_of([SPAN + 1, 8 * 49152], torch.float32, paired)
        assert cuda.extension()[0].prune_workspace(rows, 0) == 0
    generator = torch.Generator().manual_seed(9)
    large = [SPAN + 1, 262_144, 393_216, 393_221, 699_008, 786_301, 786_432, 786_433]
    small = [SPAN + 1, 65_536, 131_072, 196_608, 196_608, 196_611, 393_216] * 8  # clusters of 8
    for first, sizes in [*((i, large) for i in range(0, len(KINDS), 4)), (0, small)]:
        kinds = [KINDS[(first + i) % len(KINDS)] for i in range(len(sizes))]
        lists = [Guarded(values_of(k, n, generator), 0, gpu) for k, n in zip(kinds, sizes)]
        others = [Guarded(torch.rand(n, generator=generator) + 1, 0, gpu) for n in sizes if paired]
        check_against_reference(lists, ratio, others, run=prune_or_none)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_a_hundred_million_elements_in_little_memory(gpu, dtype):
    skip_unless_free(6)
    t = torch.randn(10**8, device=gpu).to(dtype)
    expected = t.clone()
    reference.prune_([expected], 0.99, [])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prune_(t, 0.99)
    assert torch.cuda.max_memory_allocated() - before < 0.02 * t.numel() * t.element_size()
    assert torch.equal(t, expected)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_gpu_more_than_two_to_the_31_elements(gpu, dtype):
    n = 2**31 + 12345
    skip_unless_free(1.5 * n * dtype.itemsize / 1e9 + 2)

    def part(start):
        return (torch.arange(start, min(start + 2**26, n), device=gpu) % 251).to(dtype)

    t = torch.empty(n, dtype=dtype, device=gpu)
    for start in range(0, n, 2**26):
        t[start : start + 2**26] = part(start)
    prune_(t, 0.9)
    rank = 0.9 * (n - 1)  # each value occurs n // 251 times, the first n % 251 once more
    threshold = next(v for v in range(251) if (v + 1) * (n // 251) + min(v + 1, n % 251) > rank)
    for start in range(0, n, 2**26):
        values = part(start)
        values[values <= threshold] = 0
        assert torch.equal(t[start : start + 2**26], values)


@pytest.fixture
def settled(gpu, monkeypatch):
    """Whether a window held the quantile of the last list's first tensor, from its State in the workspace."""
    kept, empty = [], torch.empty

    def keep(*args, **kwargs):
        made = empty(*args, **kwargs)
        if made.dtype == torch.uint8:
            kept.append(made)
        return made

    monkeypatch.setattr(launcher.torch, "empty", keep)
    return lambda: bool(kept[-1][:256].view(torch.int32)[STATE_SETTLED])


STATE_SETTLED = 12  # of prune.cuh's State, in words


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("partner", [None, torch.float32, torch.bfloat16])
def test_gpu_windows(gpu, settled, dtype, ratio, partner):
    """Exact, and found in a window: if windows always failed, the result would be the same, only slower."""
    skip_unless_free(6)
    t = torch.randn(10**8 if partner is None else 2**24 + 5, device=gpu).to(dtype)
    others = [] if partner is None else [torch.rand(len(t), device=gpu).to(partner) + 1]
    expected = [t.clone()], [o.clone() for o in others]
    reference.prune_(expected[0], ratio, expected[1])
    launcher.prune_([t], ratio, others)
    assert settled()
    for ours, theirs in zip((t, *others), (*expected[0], *expected[1])):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("paired", [False, True])
def test_gpu_lists_of_every_size_one_behind_the_other(gpu, paired):
    """Chains of launches that overlap, in one call and from call to call, without a pause between them."""
    skip_unless_free(12)
    generator = torch.Generator(gpu).manual_seed(6)
    sizes = [2**24 + 1, 2**24, 2**24 + 4096, 2**25 + 3, 300_001, 2**20, 1000]
    tensors = [torch.randn(n, device=gpu, generator=generator) for n in sizes]
    tensors[1].fill_(0.5)  # no window
    tensors[2][77] = torch.nan
    tensors[5] = tensors[5].bfloat16()
    tensors += [tensors[0].bfloat16(), tensors[3].half(), tensors[1].bfloat16()]
    tensors[-1][::2] = 1e4  # no window at 0.5
    sizes = [len(t) for t in tensors]
    others = []
    if paired:
        others = [torch.rand(n, device=gpu, generator=generator) + 1 for n in sizes]
        others[3], others[5], others[7] = others[3].bfloat16(), others[5].half(), others[7].half()
    expected = [t.clone() for t in tensors], [t.clone() for t in others]
    for ratio in (0.5, 0.95):
        reference.prune_(expected[0], ratio, expected[1])
    torch.cuda.synchronize()
    for ratio in (0.5, 0.95):
        launcher.prune_(tensors, ratio, others)
    for ours, theirs in zip((*tensors, *others), (*expected[0], *expected[1])):
        assert_same_bits(ours.cpu(), theirs.cpu())


def test_gpu_a_window_of_more_than_two_to_the_31_elements(gpu, settled):
    """The dropped elements lie up to one threshold, and are as many as the quantile says."""
    n = 2**31 + 12345
    skip_unless_free(4 * n / 1e9 + 6)
    t = torch.empty(n, device=gpu).normal_()
    pieces = [t[start : start + 2**26] for start in range(0, n, 2**26)]
    sums = [piece.abs().double().sum() for piece in pieces]
    launcher.prune_([t], 0.9, [])
    assert settled()
    low, _ = reference.quantile_rank(n, 0.9)
    zeros = sum((piece == 0).sum().item() for piece in pieces)
    assert low + 1 <= zeros <= low + 1 + 1000  # each float32 there occurs some 50 times
    least = min(piece[piece != 0].abs().min().item() for piece in pieces)
    assert abs(least - 1.6448536) < 1e-3
    for piece, before in zip(pieces, sums):  # the rest is untouched: the sum drops little
        left = (before - piece.abs().double().sum()).item()
        assert 0 <= left <= least * (piece == 0).sum().item()


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_gpu_replays_whose_windows_hold_and_fail(gpu, settled, dtype):
    t = torch.randn(2**24 + 5, device=gpu).to(dtype)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launcher.prune_([t.clone()], 0.9, [])
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        launcher.prune_([t], 0.9, [])
    for holds in (True, False, True, True, False):
        t.normal_()
        if not holds and dtype == torch.float32:
            t.round_()
        elif not holds:
            t[torch.rand(len(t), device=gpu) < 0.1] *= 1e12
        expected = t.clone()
        reference.prune_([expected], 0.9, [])
        graph.replay()
        assert settled() == holds and torch.equal(t, expected)


@pytest.mark.parametrize("mode", ["magnitude", "random"])
def test_gpu_graph_capture_and_replay(gpu, mode):
    """A replay prunes the tensors' current values: the graph keeps no host data and waits for nothing."""
    sizes = [5, 3000, SPAN + 1, 400_003, 70_001, 900_000] * 20
    tensors = [torch.randn(n, device=gpu) for n in sizes]
    partners = [torch.rand(n, device=gpu) + 1 for n in sizes]
    partners = [p if i % 4 else p.bfloat16() for i, p in enumerate(partners)]
    seeds, first = list(range(len(sizes))), [0] * len(sizes)

    def prune(backend, tensors, partners):
        with use_backend(backend):
            if mode == "magnitude":
                prune_(tensors, 0.9, partners)
            else:
                prune_random_(tensors, 0.9, partners, seeds, first)

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        prune("cuda", [t.clone() for t in tensors], [t.clone() for t in partners])
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        prune("cuda", tensors, partners)
    for _ in range(3):
        for t in tensors:
            t.normal_()
        for t in partners:
            t.fill_(3.0)
        expected = [t.clone() for t in tensors], [t.clone() for t in partners]
        prune("reference", *expected)
        graph.replay()
        for ours, theirs in zip((*tensors, *partners), (*expected[0], *expected[1])):
            assert torch.equal(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_another_device_than_the_current_one(gpu):
    t = torch.randn(10**6, device="cuda:1")
    expected = t.clone()
    reference.prune_([expected], 0.9, [])
    prune_(t, 0.9)
    assert torch.equal(t, expected) and torch.cuda.current_device() == 0


def test_gpu_prunes_on_the_current_stream_without_waiting(gpu):
    t = torch.randn(10**6, device=gpu)
    expected = t.clone()
    reference.prune_([expected], 0.9, [])
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        torch.cuda.set_sync_debug_mode("error")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        prune_(t, 0.9)
    torch.cuda.synchronize()
    assert torch.equal(t, expected)


def test_gpu_histograms_and_random_bits_equal_the_reference(gpu):
    for number in range(8):
        tensors, partners = drawn_list(500 + number, [9, 5003, SPAN + 5, 300_000], gpu)
        plain = [g.tensor for g in tensors]
        for shift, bits in ((18, 13), (0, 8), (0, 0)):
            prefixes = torch.full((len(plain),), 0x3FA00000 >> (shift + bits), device=gpu)
            ours = launcher.magnitude_counts(plain, prefixes, shift, bits)
            for a, b in zip(ours, reference.magnitude_counts(plain, prefixes, shift, bits)):
                assert torch.equal(a, b)
        expected = [g.copy() for g in tensors], [g.copy() for g in partners]
        keys = list(range(len(plain))), [0, 1, 6, 2**33 + 3]
        reference.prune_random_(
            *([g.tensor for g in expected[0]], 0.5, [g.tensor for g in expected[1]]), *keys
        )
        launcher.prune_random_(plain, 0.5, [g.tensor for g in partners], *keys)
        assert_equal_lists(tensors, expected[0])
        assert_equal_lists(partners, expected[1])
