"""csrc/prune.cu on the CPU: tensors that a cluster holds. Here a block holds a sweep, and takes as much again
unheld."""

import pytest
import torch
from prune_cases import (
    EDGES,
    KINDS,
    RATIOS,
    SPAN,
    SWEEP,
    Guarded,
    Shim,
    assert_survives,
    between_guards,
    check_against_reference,
    drawn_list,
    held_sizes,
    insert,
    rows_of,
    thresholds_that_round_up_to_an_element_above_the_bin,
    values_of,
)
from simt_build import put_in_place, simt_library

from relora_kernels.cuda import prune as launcher


@pytest.fixture(scope="module")
def held_library(tmp_path_factory):
    return simt_library(tmp_path_factory, "prune_harness.cpp", "-DRELORA_HELD_SWEEPS=1")


@pytest.fixture(params=[8, 16])
def held(request, held_library, monkeypatch):
    shim = Shim(held_library)
    shim.cluster = request.param
    put_in_place(monkeypatch, launcher, shim)
    return shim


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


def test_clusters_of_the_size_that_a_gpu_has(tmp_path_factory, monkeypatch):
    """Three sweeps per block: 393,216 elements are held whole, up to twice as many by half; a chain takes more."""
    held = Shim(simt_library(tmp_path_factory, "prune_harness.cpp"))
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
