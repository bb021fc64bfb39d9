"""csrc/prune.cu, merge.cu and merge_streamed.cu have no races: barriers, fences or launches order all conflicting
accesses (tests/simt/races.h). The first race aborts the process, and pytest -n 0 -s shows its source lines.
merge_sm90.cu is tested on a model of its own, without this detector."""

import pytest
import test_cuda_source as of_merge
import torch
from prune_cases import (
    DTYPES,
    SPAN,
    Guarded,
    Shim,
    check_against_reference,
    drawn_list,
    held_sizes,
    insert,
    seen_by_the_sample,
    values_of,
)
from simt_build import put_in_place, races_library

from relora_kernels.cuda import merge, prune

ORDERS = (0, 1, 7)  # ascending, descending, shuffled: other sequences of atomics


@pytest.fixture(scope="module")
def prune_library(tmp_path_factory):
    sizes = ("-DRELORA_SAMPLED_FROM=50000", "-DRELORA_HELD_SWEEPS=1")
    return races_library(tmp_path_factory, "prune_harness.cpp", *sizes)


@pytest.fixture(params=ORDERS)
def shim(request, prune_library, monkeypatch):
    shim = Shim(prune_library)
    shim.order = request.param
    put_in_place(monkeypatch, prune, shim)
    return shim


def test_prune_of_small_tensors_and_chains_without_a_window(shim):
    sizes = [3, 1000, SPAN, SPAN + 1, SPAN + 501]
    check_against_reference(*insert(drawn_list(12 + shim.order, sizes), 0.9))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("kind", ["normal", "with inf"])
def test_prune_by_windows(shim, kind, dtype):
    """Windows that hold, and that fail: at 0.9 the quantile is in the gap between numbers and infinities."""
    generator = torch.Generator().manual_seed(2)
    n = 2**20 if dtype == torch.float32 else 2**17
    tensors = [Guarded(values_of(kind, n, generator).to(dtype), 0) for n in (n, 60_001)]
    partners = [Guarded(torch.ones_like(t.tensor), 0) for t in tensors]
    check_against_reference(tensors, 0.9, partners)
    assert shim.settled == (kind == "normal")


@pytest.mark.parametrize("offset", [0, 1])
def test_prune_by_a_list_without_a_window(shim, offset):
    """The sample misleads; or there is none, because the tensor is misaligned."""
    t = 2.0 ** (1 + 12 * torch.rand(2**18, 4))
    t[seen_by_the_sample(2**18)] = 1.0
    check_against_reference([Guarded(t.flatten(), offset)], 0.9, [Guarded(torch.ones(2**20), 0)])
    assert not shim.settled


def test_prune_of_large_tensors_without_room_for_a_window(shim):
    """The window's launches have nothing to do, but must still wait for the launches before them."""
    check_against_reference([Guarded(torch.randn(60_001), 0)], 0.9)


def test_prune_of_more_keys_than_a_block_lists(shim):
    """The keys are those of the quantile's bin, and the tensor's list has room for them."""
    t = torch.rand(40 * SPAN) * 100 + 4
    t[:9000] = 1.0 + torch.rand(9000) / 64
    check_against_reference([Guarded(t, 1)], 4500 / len(t))


@pytest.mark.parametrize("paired", [False, True])
def test_prune_of_what_a_cluster_holds(shim, paired):
    shim.cluster = 8
    generator = torch.Generator().manual_seed(1)
    sizes = held_sizes(8)[:-1]
    tensors = [Guarded(torch.randn(n, generator=generator), 0) for n in sizes]
    partners = [Guarded(torch.ones(n), 0) for n in sizes if paired]
    check_against_reference(tensors, 0.9, partners)
    assert shim.blocks == 8 * len(sizes)


def test_random_prune(shim):
    tensors, partners = drawn_list(301, [33, 5003, SPAN + 17])
    keys = [5, 6, 7], [0, 3, 2**34 - 9]
    prune.prune_random_([t.tensor for t in tensors], 0.3, [p.tensor for p in partners], *keys)


@pytest.mark.parametrize("prefix, shift, bits", [(0, 18, 13), (100, 10, 8)])
def test_histograms(shim, prefix, shift, bits):
    tensors = [torch.randn(n) for n in (33, 5003, SPAN + 17)]
    prune.magnitude_counts(tensors, torch.full((3,), prefix, dtype=torch.int64), shift, bits)


@pytest.fixture(params=ORDERS)
def merge_shim(request, tmp_path_factory, monkeypatch):
    shim = of_merge.Shim(races_library(tmp_path_factory, "harness.cpp"))
    shim.order = request.param
    put_in_place(monkeypatch, merge, shim)
    return shim


@pytest.mark.parametrize("number, layers", [(0, 4), (13, 4), (4, 18)])  # 18: in a table
def test_merge_of_a_list(merge_shim, number, layers):
    of_merge.merges_as_the_reference(number, layers)


@pytest.mark.parametrize("rounding", of_merge.CODES["rounding"])
@pytest.mark.parametrize("dtype", of_merge.WEIGHT_DTYPES)
@pytest.mark.parametrize("k", [264, 259])  # 16 bytes at a time, and by elements
def test_merge_of_several_tiles_a_block(merge_shim, dtype, rounding, k):
    merge_shim.library.simt_multiprocessors(1)
    n, r = 130, 36
    weight, A, B = torch.randn(n, k).to(dtype), torch.randn(r, k), torch.randn(n, r)
    residual = torch.zeros_like(weight) if rounding == "compensated" else None
    merge.merge_(weight, A, B, 2.0**-9, rounding, residual, 7, 2**31)
