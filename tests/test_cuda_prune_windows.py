"""csrc/prune.cu on the CPU: windows, the path of tensors of 2^24 elements and more, here from 50000 on."""

import pytest
import torch
from prune_cases import (
    DTYPES,
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
    insert,
    seen_by_the_sample,
    values_of,
)
from simt_build import put_in_place, simt_library

from relora_kernels.cuda import prune as launcher
from relora_kernels.reference import prune as reference


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
