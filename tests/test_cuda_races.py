"""Of csrc/prune.cu and csrc/merge*.cu: no two accesses clash without an order by barriers, fences or launches.
One run shows that of any (tests/simt/races.h), and ends at the first two that do. merge_sm90.cu has a model of
its own, without this."""

import pytest
import test_cuda_prune as of_prune
import test_cuda_source as of_merge
import torch
from simt_build import put_in_place, races_library
from test_cuda_prune import (
    SPAN,
    Guarded,
    check_against_reference,
    drawn_list,
    insert,
    seen_by_the_sample,
    values_of,
)

from relora_kernels.cuda import merge, prune

ORDERS = (0, 7)  # ascending, shuffled


@pytest.fixture(scope="module")
def prune_library(tmp_path_factory):
    sizes = ("-DRELORA_SAMPLED_FROM=50000", "-DRELORA_HELD_SWEEPS=1")
    return races_library(tmp_path_factory, "prune_harness.cpp", *sizes)


@pytest.fixture(params=ORDERS)
def shim(request, prune_library, monkeypatch):
    shim = of_prune.Shim(prune_library)
    shim.order = request.param
    put_in_place(monkeypatch, prune, shim)
    return shim


def test_prune_of_small_tensors_and_chains_without_a_window(shim):
    sizes = [3, 1000, SPAN, SPAN + 1, SPAN + 501]
    check_against_reference(*insert(drawn_list(12 + shim.order, sizes), 0.9))


@pytest.mark.parametrize("dtype", of_prune.DTYPES[:2])
@pytest.mark.parametrize("kind", ["normal", "with inf"])
def test_prune_by_windows(shim, kind, dtype):
    """That hold, and that fail: at 0.9 there is nothing between numbers and infinities."""
    generator = torch.Generator().manual_seed(2)
    n = 2**20 if dtype == torch.float32 else 2**17
    tensors = [Guarded(values_of(kind, n, generator).to(dtype), 0) for n in (n, 60_001)]
    partners = [Guarded(torch.ones_like(t.tensor), 0) for t in tensors]
    check_against_reference(tensors, 0.9, partners)
    assert shim.settled == (kind == "normal")


@pytest.mark.parametrize("offset", [0, 1])
def test_prune_by_a_list_without_a_window(shim, offset):
    """The sample misleads; or there is none, of a misaligned tensor."""
    t = 2.0 ** (1 + 12 * torch.rand(2**18, 4))
    t[seen_by_the_sample(2**18)] = 1.0
    check_against_reference([Guarded(t.flatten(), offset)], 0.9, [Guarded(torch.ones(2**20), 0)])
    assert not shim.settled


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_prune_of_what_a_cluster_holds(shim, ratio):
    shim.cluster = 8
    check_against_reference(*insert(drawn_list(8 + shim.order, of_prune.held_sizes(8)), ratio))


def test_random_prune_and_histograms(shim):
    tensors, partners = drawn_list(301, [33, 5003, SPAN + 17])
    prune.prune_random_(
        [t.tensor for t in tensors], 0.3, [p.tensor for p in partners], [5, 6, 7], [0, 3, 2**34 - 9]
    )
    tensors = [t.tensor for t in tensors]
    prune.magnitude_counts(tensors, torch.zeros(len(tensors), dtype=torch.int64), 18, 13)


@pytest.fixture(params=ORDERS)
def merge_shim(request, tmp_path_factory, monkeypatch):
    shim = of_merge.Shim(races_library(tmp_path_factory, "harness.cpp"))
    shim.order = request.param
    put_in_place(monkeypatch, merge, shim)
    return shim


@pytest.mark.parametrize("number", [0, 13, 26])
def test_merge_of_a_list(merge_shim, number):
    of_merge.merges_as_the_reference(number, 4)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_merge_of_several_tiles_a_block(merge_shim, factor_dtype):
    of_merge.test_blocks_of_several_tiles_are_bitwise_the_reference(
        merge_shim, (257, 130, 68), "compensated", 1, factor_dtype
    )
