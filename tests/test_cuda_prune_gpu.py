"""csrc/prune.cu against the reference on a GPU, if there is one."""

import contextlib

import pytest
import torch
from prune_cases import (
    DTYPES,
    EDGES,
    KINDS,
    LORA_1B,
    RATIOS,
    SMALL,
    SPAN,
    Guarded,
    assert_equal_lists,
    check_against_reference,
    drawn_list,
    insert,
    rows_of,
    values_of,
)
from simt_build import assert_same_bits

from relora_kernels import cuda, prune_, use_backend
from relora_kernels.cuda import prune as launcher
from relora_kernels.ops.prune import prune_random_
from relora_kernels.reference import prune as reference


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
