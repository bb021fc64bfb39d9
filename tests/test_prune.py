"""prune_ against torch.quantile bit for bit, and its contract for what quantile does not cover."""

import contextlib
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_kernels import prune_, use_backend
from relora_kernels.ops import checks
from relora_kernels.ops import prune as op
from relora_kernels.reference import prune as reference

RATIOS = [0.0, 0.5, 0.8, 0.9, 0.99, 0.999, 1.0, 0.123456]


def expected(t, ratio):
    """By definition: threshold = quantile(|t| in float32), cast to t's dtype; strictly larger values survive."""
    threshold = torch.quantile(t.abs().float().flatten(), ratio).to(t.dtype)
    return torch.where(t.abs() > threshold, t, 0.0)


def kinds(n: int, generator) -> dict:
    base = torch.randn(n, generator=generator)
    return {
        "normal": base,
        "log-normal": (3 * base).exp(),
        "ties": base.round(),
        "many zeros": base * (torch.rand(n, generator=generator) < 0.2),
        "constant": torch.full((n,), -2.5),
        "denormal": base * 1e-40,
        "with inf": torch.where(torch.rand(n, generator=generator) < 0.1, torch.inf, base),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_quantile_threshold_on_thousands_of_cases(dtype, device):
    generator = torch.Generator().manual_seed(1)
    for n in [1, 2, 3, 4, 5, 7, 10, 11, 100, 101, 1000, 1023, 4097, 30011]:
        for name, t in kinds(n, generator).items():
            t = t.to(dtype).to(device)
            for ratio in RATIOS:
                got = t.clone()
                prune_(got, ratio)
                assert torch.equal(got, expected(t, ratio)), (n, name, ratio)


BACKENDS = [
    name
    for name, module in op.IMPLEMENTATIONS.items()
    if name != "reference" and (name != "cuda" or torch.cuda.is_available())
]
SIZES = [1, 2, 3, 16, 101, 2049]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 1.0])
def test_kernels_equal_the_reference_on_lists(backend, dtype, ratio, device):
    """Constant tensors, ties and zeros overflow the kernels' lists and take the path without them."""
    generator = torch.Generator().manual_seed(2)
    sizes = [*SIZES, 5003] if ratio == 0.9 else SIZES
    tensors = [t.to(dtype).to(device) for n in sizes for t in kinds(n, generator).values()]
    tensors[3::7] = [t.clone().index_fill_(0, torch.tensor(0, device=device), torch.nan)
                     for t in tensors[3::7]]  # fmt: skip
    partners = [torch.rand(t.shape, device=device).to(torch.bfloat16) + 1 for t in tensors]
    results = []
    for name in ("reference", backend):
        mine = [t.clone() for t in tensors], [p.clone() for p in partners]
        with use_backend(name):
            prune_(mine[0], ratio, mine[1])
        results.append([*mine[0], *mine[1]])
    for i, (a, b) in enumerate(zip(*results)):
        assert torch.equal(a, b), (i, len(a))


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_on_hostile_layouts(backend, device):
    base = torch.randn(70, 90, device=device)
    for view in (base.T[3:60, ::3], base[1:7], base[:, 5], base.flatten()[3:5003]):
        before, want = base.clone(), expected(view.clone(), 0.7)
        partner = torch.ones(view.shape[::-1], device=device).permute(*range(view.dim())[::-1])
        with use_backend(backend):
            prune_(
                [view, torch.empty(0, device=device)], 0.7, [partner, torch.empty(0, device=device)]
            )
        assert torch.equal(view, want) and torch.equal(partner != 0, want != 0)
        view.copy_(before.as_strided(view.shape, view.stride(), view.storage_offset()))
        assert torch.equal(base, before)  # nothing beside the view was touched


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_where_rounding_lifts_the_threshold_to_an_element(backend, device):
    """0x3F7F and 0x3F80 lie in different bins; between them the threshold rounds up to the latter."""
    bits = torch.tensor([0x3F7E, 0x3F7F, 0x3F80, 0x3F80, 0x3F81], dtype=torch.int16, device=device)
    for ratio in torch.linspace(0.2, 0.6, 41).tolist():
        t = bits.view(torch.bfloat16).clone()
        want = expected(t, ratio)
        with use_backend(backend):
            prune_(t, ratio)
        assert torch.equal(t, want), ratio


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_move_version_counters(backend, device):
    t, partner = torch.randn(10, device=device), torch.ones(10, device=device)
    before = t._version, partner._version
    with use_backend(backend):
        prune_(t, 0.5, partner)
    assert t._version > before[0] and partner._version > before[1]


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs the triton package")
def test_more_tensors_than_a_grid_has_rows(monkeypatch, device):
    """CUDA takes at most 65535 blocks in the grid's y, which counts tensors."""
    from relora_kernels._triton import prune as kernels

    assert kernels.MOST_TENSORS <= 65535
    monkeypatch.setattr(kernels, "MOST_TENSORS", 2)
    sizes, group = [], kernels._prune_group
    monkeypatch.setattr(
        kernels,
        "_prune_group",
        lambda pairs, *rest: (sizes.append(len(pairs)), group(pairs, *rest)),
    )
    tensors = [torch.randn(n, device=device) for n in (3, 40, 41, 100, 7)]
    want = [expected(t, 0.7) for t in tensors]
    with use_backend("triton"):
        prune_(tensors, 0.7)
    assert sizes == [2, 2, 1]
    for got, wanted in zip(tensors, want):
        assert torch.equal(got, wanted)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60),
    st.floats(0, 1),
)
def test_equals_the_quantile_threshold_on_drawn_values(values, ratio):
    t = torch.tensor(values)
    got = t.clone()
    prune_(got, ratio)
    assert torch.equal(got, expected(t, ratio))


def test_threshold_matches_torch_quantile_bit_for_bit():
    for trial in range(2000):
        n = int(torch.randint(1, 3000, ()))
        ratio = RATIOS[trial % len(RATIOS)] if trial % 2 else float(torch.rand(()))
        t = torch.randn(n).abs()
        assert torch.equal(reference.magnitude_quantile(t, ratio), torch.quantile(t, ratio)), (
            n,
            ratio,
        )


@pytest.mark.parametrize("float64_ranks", [False, True])
def test_both_rules_for_ranks(monkeypatch, float64_ranks):
    """The other version's rule, too: before 2.14 torch.quantile multiplies in float32, since in float64."""
    installed = reference._FLOAT64_RANKS
    monkeypatch.setattr(reference, "_FLOAT64_RANKS", float64_ranks)
    wide, differ = np.float64 if float64_ranks else np.float32, 0
    for n in (11, 101, 3000):
        t = torch.randn(n).abs().sort().values
        for ratio in np.linspace(0.001, 0.999, 200):
            rank = wide(np.float32(ratio)) * wide(n - 1)
            low = int(np.floor(rank))
            expected = torch.lerp(t[low], t[low + 1], float(np.float32(rank - wide(low))))
            assert torch.equal(reference.magnitude_quantile(t, float(ratio)), expected)
            differ += not torch.equal(expected, torch.quantile(t, float(ratio)))
    assert (differ == 0) == (float64_ranks == installed)


def test_more_than_two_to_the_24_elements_case49():
    """torch.quantile refuses this size before 2.14; the threshold has to be an order statistic all the same."""
    n = 2**24 + 3
    t = torch.randn(n)
    got = t.clone()
    prune_(got, 0.99)
    if reference._FLOAT64_RANKS:
        assert torch.equal(got, expected(t, 0.99))
        return
    ordered = t.abs().sort().values
    rank = 0.99 * (n - 1)
    low, high = ordered[int(rank)], ordered[int(rank) + 1]
    kept = t[got != 0].abs()
    assert kept.min() >= high or kept.min() > low
    assert (got != 0).sum() in (n - 1 - int(rank), n - 2 - int(rank))
    assert torch.equal(got[got != 0], t[got != 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paired_tensors_are_zeroed_by_the_same_masks(dtype, device):
    first = [torch.randn(s, device=device).to(dtype) for s in [(5, 7), (301,), (2, 3, 4), ()]]
    second = [torch.rand_like(t) + 0.5 for t in first]
    before = [t.clone() for t in second]
    prune_(first, 0.6, paired_with=second)
    for a, b, c in zip(first, second, before):
        assert torch.equal(b, torch.where(a != 0, c, 0.0))


def test_tensors_are_judged_one_by_one():
    small, large = torch.randn(100) * 1e-6, torch.randn(100) * 1e6
    prune_([small, large], 0.9)
    assert (small != 0).sum() == (large != 0).sum() == 10


def test_special_values():
    nan = torch.tensor([1.0, torch.nan, 3.0])
    partner = torch.ones(3)
    prune_([nan], 0.5, [partner])
    assert torch.equal(nan, torch.zeros(3)) and torch.equal(partner, torch.zeros(3))
    inf = torch.tensor([1.0, -torch.inf, 3.0, 2.0])
    prune_(inf, 0.5)
    assert torch.equal(inf, torch.tensor([0.0, -torch.inf, 3.0, 0.0]))
    zeros = torch.tensor([-0.0, -1e-3, 5.0])
    prune_(zeros, 0.5)
    assert torch.equal(zeros, torch.tensor([0.0, 0.0, 5.0])) and not torch.signbit(zeros).any()
    ties = torch.ones(10)
    prune_(ties, 0.5)
    assert not ties.any()


def test_views_empty_and_strided_tensors(device):
    base = torch.randn(40, 50, device=device)
    for view in (base.T[3:20, ::3], base[1:7], base[:, 5]):
        before, want = base.clone(), expected(view.clone(), 0.7)
        prune_(view, 0.7)
        assert torch.equal(view, want)
        base.copy_(before)
    empty = torch.empty(0, 3, device=device)
    prune_([empty, torch.ones(1, device=device)], 0.5)
    prune_([], 0.5)


def test_float64_uses_its_own_precision():
    t = torch.tensor([1.0, 1.0 + 1e-12, 1.0 + 2e-12], dtype=torch.float64)
    prune_(t, 0.5)
    assert torch.equal(t, torch.tensor([0.0, 0.0, 1.0 + 2e-12], dtype=torch.float64))


def test_opcheck_and_compile():
    tensors, partners = [torch.randn(9, 3), torch.randn(20)], [torch.rand(9, 3), torch.rand(20)]
    ops = torch.ops.relora_kernels
    torch.library.opcheck(ops._prune_.default, (tensors, 0.5, partners))
    torch.library.opcheck(ops._prune_random_.default, (tensors, 0.5, partners, [1, 2], [0, 5]))
    prefixes = torch.zeros(2, dtype=torch.int64)
    torch.library.opcheck(ops._magnitude_counts.default, (tensors, prefixes, 20, 11))

    def step(t):
        t = t * 2
        prune_([t], 0.5)
        return t + 1

    x = torch.randn(100)
    assert torch.equal(torch.compile(step, fullgraph=True)(x), step(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_kernels_draw_the_references_bits(backend, dtype, device):
    shapes = [(1,), (7, 9), (2500,), (0,), (4, 3)]
    tensors = [torch.randn(s, device=device).to(dtype) for s in shapes]
    tensors[4] = torch.randn(3, 4, device=device).to(dtype).T  # not contiguous
    for other in (None, torch.bfloat16, torch.float32):
        partners = [] if other is None else [torch.ones_like(t, dtype=other) for t in tensors]
        for ratio in (0.0, 0.6, 1.0):
            results = []
            for name in ("reference", backend):
                mine = [t.clone() for t in tensors], [p.clone() for p in partners]
                with use_backend(name):
                    keys = [-1, 2**62, 3, 4, 5], [2**34 - 1, 6, 1, 0, 2**40 + 3]
                    op.prune_random_(mine[0], ratio, mine[1], *keys)
                results.append([*mine[0], *mine[1]])
            for a, b in zip(*results):
                assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_histograms_of_kernels_equal_the_reference(backend, dtype, device):
    generator = torch.Generator().manual_seed(4)
    tensors = [t.to(dtype).to(device) for n in (1, 3000) for t in kinds(n, generator).values()]
    tensors += [torch.empty(0, dtype=dtype, device=device)]
    tensors[3][0] = torch.nan
    keys = [reference.magnitude_keys(t)[-1:].sum().item() for t in tensors]
    digits = [(20, 11), (10, 10), (0, 10)] if dtype == torch.float32 else [(7, 8), (0, 7)]
    for shift, bits in [*digits, (0, 0)]:
        prefixes = torch.tensor([key >> (shift + bits) for key in keys], device=device)
        results = []
        for name in ("reference", backend):
            with use_backend(name):
                call = torch.ops.relora_kernels._magnitude_counts
                results.append(call(tensors, prefixes, shift, bits))
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype == torch.int64 and torch.equal(a, b)


def test_histograms_by_hand():
    t = torch.tensor([1.0, -1.0, 1.5, 2.0, -0.0, torch.nan]).bfloat16()
    counts, lowest, highest = reference.magnitude_counts([t], torch.tensor([0x3F80 >> 7]), 0, 7)
    assert counts[0, 0] == 2 and counts[0, 0x40] == 1 and counts.sum() == 3
    assert lowest == 0x4000 and highest > 0x7F80  # 2.0 and the NaN
    none = reference.magnitude_counts([t[:0]], torch.tensor([0]), 0, 0)
    assert [int(x) for x in none] == [0, reference.NONE_ABOVE, -1]


def test_random_pruning_is_keyed_by_element():
    whole, partner = torch.ones(1000, 37), torch.ones(1000, 37)
    reference.prune_random_([whole], 0.75, [partner], [9])
    assert torch.equal(whole, partner)
    assert (whole == 0).float().mean().item() == pytest.approx(0.75, abs=0.01)
    flat = torch.ones(5000)
    reference.prune_random_([flat], 0.75, None, [9])
    assert torch.equal(flat, whole.flatten()[:5000])
    reference.prune_random_([partner], 0.0, None, [1])
    assert torch.equal(whole, partner)
    reference.prune_random_([partner], 1.0, None, [1])
    assert not partner.any()


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ((torch.ones(3), 1.5), ValueError, "0 <= ratio <= 1, got 1.5"),
        ((torch.ones(3), -0.1), ValueError, "ratio"),
        ((torch.ones(3), float("nan")), ValueError, "ratio"),
        ((torch.ones(3), "0.5"), TypeError, "ratio to be a number"),
        ((torch.ones(3, dtype=torch.uint8), 0.5), TypeError, r"tensors\[0\].*uint8"),
        (([torch.ones(3), None], 0.5), TypeError, r"tensors\[1\] to be a tensor, got NoneType"),
        ((torch.ones(1).expand(3), 0.5), ValueError, "overlapping"),
        (([torch.ones(3)], 0.5, [torch.ones(4)]), ValueError, r"\[0\]'s shape \(3,\), got \(4,\)"),
        (([torch.ones(3)], 0.5, []), ValueError, r"as tensors, 1, got 0"),
        (([torch.ones(3)], 0.5, [torch.ones(3, device="meta")]), ValueError, "meta"),
    ],
)
def test_bad_input_is_refused(args, error, says):
    with pytest.raises(error, match=says):
        prune_(*args)
    if isinstance(args[0], torch.Tensor):
        assert args[0].float().eq(1).all()


def test_a_named_backend_without_prune_raises():
    from relora_kernels import BackendUnavailable

    with use_backend("cuda"), pytest.raises(BackendUnavailable, match="prune_"):
        prune_(torch.ones(3), 0.5)


def test_tensors_that_share_memory_are_refused():
    """A list is pruned at once: each tensor would be judged by what another has left of it."""
    t, partner = torch.randn(100), torch.ones(100)
    before = t.clone()
    other, interleaved = torch.randn(100), torch.randn(50, 2)
    for tensors, partners in (
        ([t, t], None),
        ([t[:60], other, t[59:]], None),
        ([t.view(10, 10), t.view(10, 10).t()], None),
        ([t, other], [other, partner]),
        ([t, other], [partner, partner]),
        ([t], [t]),
    ):
        with pytest.raises(ValueError, match="prune_: expected tensors in memory of their own"):
            prune_(tensors, 0.9, partners)
        assert torch.equal(t, before) and (partner == 1).all()
    with pytest.raises(ValueError, match="prune_random_: expected tensors in memory"):
        op.prune_random_([t, t], 0.9, [], [1, 2], [0, 0])
    halves = [interleaved[:, 0].clone(), interleaved[:, 1].clone()]
    prune_([interleaved[:, 0], interleaved[:, 1]], 0.5)
    for i, half in enumerate(halves):
        assert torch.equal(interleaved[:, i], expected(half, 0.5))
    prune_([t[:60], t[60:], torch.empty(0), torch.empty(0)], 0.5)


def test_spans_of_memory_are_apart_where_no_element_is_written_that_another_holds():
    generator, memory = torch.Generator().manual_seed(0), torch.zeros(60)
    found = []
    for case in range(400):
        starts = torch.randint(0, 56, (case % 5 + 2,), generator=generator).tolist()
        sizes = torch.randint(
            0, 12 if case % 2 else 5, (len(starts),), generator=generator
        ).tolist()
        steps = torch.randint(1, 2 + case % 3, (len(starts),), generator=generator).tolist()
        slices = [slice(a, a + n * s, s) for a, n, s in zip(starts, sizes, steps)]
        spans = [memory[each] for each in slices]
        held = torch.zeros(len(spans), 60)
        for row, each in zip(held, slices):
            row[each] = 1
        one, two = len(spans) // 3, len(spans) // 2 + 1  # [:one] and [one:two] are written
        shared = (held[:two].sum(0) > 0) & (held.sum(0) > 1)
        found.append(bool(shared.any()))
        with pytest.raises(ValueError, match="x: ") if found[-1] else contextlib.nullcontext():
            checks.apart("x", spans[:one], spans[one:two], read=spans[two:])
    assert 100 < sum(found) < 300


def test_a_list_over_several_devices_is_refused_before_anything_changes():
    good = torch.randn(8)
    before = good.clone()
    windows = torch.empty(10, device="meta").as_strided((3, 3), (1, 1))
    with pytest.raises(ValueError, match=r"tensors\[1\] without overlapping"):
        prune_([good, windows], 0.5)
    assert torch.equal(good, before)
    prune_([torch.empty(4, device="meta"), good], 0.5)
    assert torch.equal(good, expected(before, 0.5))


def test_overlapping_windows_and_non_tensors_are_refused_before_anything_changes():
    good = torch.randn(8)
    before = good.clone()
    with pytest.raises(ValueError, match=r"tensors\[1\] without overlapping"):
        prune_([good, torch.randn(10).as_strided((3, 3), (1, 1))], 0.5)
    with pytest.raises(TypeError, match="tensors to be a tensor or a list, got None"):
        prune_(None, 0.5)
    assert torch.equal(good, before)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_a_cpu_selects_in_time_whatever_the_order(ratio):
    """kthvalue takes quadratic time where values descend: 25 s for these."""
    t = torch.arange(1_000_000, 0, -1).float()
    expected = t.masked_fill(~(t > torch.quantile(t, ratio)), 0)
    start = time.perf_counter()
    with use_backend("reference"):
        prune_(t, ratio)
    assert time.perf_counter() - start < 5
    assert torch.equal(t, expected)


def test_inference_tensors_are_refused_before_anything_is_written():
    first = torch.arange(8.0)
    with torch.inference_mode():
        second = torch.arange(8.0)
    for tensors, paired in (([first, second], None), ([first], [second])):
        with pytest.raises(ValueError, match="torch.inference_mode"):
            prune_(tensors, 0.5, paired)
        assert torch.equal(first, torch.arange(8.0))


def test_random_partners_of_another_shape_are_refused():
    base = torch.ones(120)
    with pytest.raises(ValueError, match=r"shape \(40, 3\), got \(4, 1\)"):
        op.prune_random_([torch.ones(40, 3)], 0.5, [base[:4].view(4, 1)], [1], [0])
    assert base.all()


def column_ranges(base):
    return [base[:, :40], base[:, 20:]]


@pytest.mark.parametrize(
    "views",
    [
        column_ranges,
        lambda base: [base[:, :30], base[:, 1:31]],
        lambda base: [base[:40, :50], base[10:14, 5:55]],
        lambda base: [base.T[:30], base[::7, 20:22]],
        lambda base: [base.view(-1)[::3], base.view(-1)[1::2]],
    ],
)
def test_views_that_overlap_are_refused_however_they_lie(views):
    base = torch.randn(50, 60)
    before = base.clone()
    tensors = views(base)
    assert len({t.data_ptr() for t in tensors}) == 2 and not any(
        map(torch.Tensor.is_contiguous, tensors)
    )
    with pytest.raises(ValueError, match="two that overlap"):
        prune_(tensors, 0.5)
    if tensors[0].shape == tensors[1].shape:
        with pytest.raises(ValueError, match="two that overlap"):
            prune_(tensors[:1], 0.5, tensors[1:])
    assert torch.equal(base, before)


def test_views_that_interleave_are_pruned_apart():
    for apart in (
        lambda base: [base[:, :20], base[:, 20:]],
        lambda base: [base[:, 40:], base[:, :20], base[:, 20:40]],
        lambda base: [base[::2], base[1::2, ::2].T],
        lambda base: [base.view(-1)[::3], base.view(-1)[1::3]],
        lambda base: list(base.view(50, 20, 3).permute(2, 0, 1)),
    ):
        base = torch.randn(50, 60)
        expected = [t.clone() for t in apart(base)]
        prune_(apart(base), 0.5)
        prune_(expected, 0.5)
        assert all(map(torch.equal, apart(base), expected))


def test_the_ops_behind_refuse_arguments_of_other_lengths_and_dtypes():
    count, t = torch.ops.relora_kernels._magnitude_counts, [torch.randn(9)]
    for prefixes in (torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="an int64 prefix for each of 1 tensors"):
            count(t, prefixes, 20, 11)
    assert [tuple(x.shape) for x in count([], torch.zeros(0, dtype=torch.int64), 20, 3)] == [
        (0, 8),
        (0,),
        (0,),
    ]
    with pytest.raises(ValueError, match="0 <= ratio <= 1, got -0.5"):
        op.prune_random_(t, -0.5, [], [1], [0])
    with pytest.raises(ValueError, match="as many seeds as tensors, 1, got 2"):
        op.prune_random_(t, 0.5, [], [1, 2], [0])
    with pytest.raises(ValueError, match="as many first_elements as tensors, 1, got 0"):
        op.prune_random_(t, 0.5, [], [1], [])
