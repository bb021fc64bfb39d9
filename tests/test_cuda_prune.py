"""csrc/prune.cu against the reference on the CPU, through the SIMT shim, and what nvcc makes of it."""

import ctypes
import re
import sys
import types

import numpy as np
import pytest
import torch
from prune_cases import (
    DTYPES,
    EDGES,
    GUARDED_SIZES,
    KINDS,
    LORA_1B,
    RATIOS,
    SMALL,
    SPAN,
    Guarded,
    Shim,
    assert_equal_lists,
    assert_survives,
    between_guards,
    check_against_reference,
    drawn_list,
    insert,
    rows_of,
    thresholds_that_round_up_to_an_element_above_the_bin,
    values_of,
)
from simt_build import CSRC, cuda_build, put_in_place, simt_library

from relora_kernels import prune_, use_backend
from relora_kernels.cuda import prune as launcher
from relora_kernels.reference import prune as reference


@pytest.fixture(scope="module")
def shim_library(tmp_path_factory):
    return simt_library(tmp_path_factory, "prune_harness.cpp")


@pytest.fixture
def shim(shim_library, monkeypatch):
    shim = Shim(shim_library)
    put_in_place(monkeypatch, launcher, shim)
    return shim


@pytest.mark.parametrize("ratio", RATIOS)
def test_small_tensors_equal_the_reference(shim, ratio):
    for number in range(16):
        shim.order = number % 5
        check_against_reference(*insert(drawn_list(number, SMALL), ratio))
        assert shim.blocks == len(SMALL)


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


@pytest.mark.parametrize("float64_ranks", [False, True])
def test_ranks_of_older_and_newer_versions_of_torch(shim, monkeypatch, float64_ranks):
    """Of n elements the rank at 0.9 is that of the first one here, or, in float64, very little less."""
    monkeypatch.setattr(reference, "_FLOAT64_RANKS", float64_ranks)
    for n in (11, 51, 1001, 50_001, 100_001):
        t = (torch.arange(n).flip(0) >= 9 * (n - 1) // 10).float()
        guarded = Guarded(t, 0)
        check_against_reference([guarded], 0.9)
        assert torch.equal(guarded.tensor, t if float64_ranks else torch.zeros(n))


def test_a_workspace_that_is_too_small_is_refused(shim):
    t = torch.randn(10**6)
    before, rows = t.clone(), launcher._Flat([t]).rows
    workspace = torch.empty(shim.prune_workspace(rows), dtype=torch.uint8)
    quantile = ctypes.c_double(0.9), ctypes.c_int64(2**24)
    call = "prune", rows, *quantile, ctypes.c_void_p(workspace.data_ptr())
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
    """How many bytecode instructions `function` executes in its second call: CPython from 3.12 on traces none of
    them in the first call of a function within it."""
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
        count = 0
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
