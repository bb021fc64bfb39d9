"""merge_: what reaches W, on every backend that runs here, judged on W itself and not on outputs.

On a CPU the Triton kernel runs in Triton's interpreter.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from relora_kernels import BackendUnavailable, merge_, use_backend
from relora_kernels.ops import checks
from relora_kernels.ops import merge as op
from relora_kernels.reference import merge as reference
from relora_kernels.reference import philox

WIDE = torch.float64
NARROW = [torch.bfloat16, torch.float16]
DTYPES = [*NARROW, torch.float32]


def backends() -> list[str]:
    """The backends that can serve a merge on this machine's test device."""
    found = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = (*factors(8, 8, 2, device=device), 1.0, "nearest", None, 0, 0)
    for name, module in op.IMPLEMENTATIONS.items():
        with use_backend(name):
            if module.why_not(*args) is None:
                found.append(name)
    return found


def factors(out_features, in_features, r, dtype=torch.float32, lora_dtype=torch.float32,
            size=0.01, device="cpu"):  # fmt: skip
    """weight, lora_A, lora_B with ||B A|| about size * ||W||."""
    weight = torch.randn(out_features, in_features, device=device).to(dtype)
    lora_A = torch.randn(r, in_features, device=device).to(lora_dtype)
    lora_B = (torch.randn(out_features, r, device=device) * size * r**-0.5).to(lora_dtype)
    return weight, lora_A, lora_B


def exact_sum(weight, lora_A, lora_B, scaling, residual=None):
    total = weight.to(WIDE) + scaling * (lora_B.to(WIDE) @ lora_A.to(WIDE))
    return total if residual is None else total + residual.to(WIDE)


def neighbours(value: torch.Tensor, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The two numbers of `dtype` around each float64 value (equal where it is representable)."""
    near = value.to(dtype)
    up = torch.nextafter(near, torch.full_like(near, torch.inf))
    down = torch.nextafter(near, torch.full_like(near, -torch.inf))
    lower = torch.where(near.to(WIDE) <= value, near, down)
    upper = torch.where(near.to(WIDE) >= value, near, up)
    return lower.to(WIDE), upper.to(WIDE)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora_dtype", DTYPES)
@pytest.mark.parametrize("rounding", checks.ROUNDINGS)
@pytest.mark.parametrize("shape", [(70, 133, 9), (64, 256, 32), (3, 5461, 2), (1, 1, 1)])
def test_every_dtype_and_rounding(backend, dtype, lora_dtype, rounding, shape, device):
    weight, lora_A, lora_B = factors(*shape, dtype, lora_dtype, device=device)
    residual = None
    if rounding == "compensated":
        residual = (torch.randn_like(weight, dtype=torch.float32) * 1e-4).to(dtype)
    exact = exact_sum(weight, lora_A, lora_B, 0.25, residual)
    with use_backend(backend):
        assert merge_(weight, lora_A, lora_B, 0.25, rounding, residual, seed=3) is weight
    got = weight.to(WIDE)
    # float32 sums of r products: a few units in the last place of float32.
    slack = 2**-22 * (exact.abs() + shape[2] ** 0.5)
    if backend == "cuda" and lora_dtype == torch.float32 and dtype != torch.float32:
        # Each factor rounded to tf32: twice half a unit of 2^-10.
        slack = slack + 2**-10 * 0.25 * (lora_B.abs() @ lora_A.abs()).to(WIDE)
    if dtype == torch.float32:
        assert ((got - exact).abs() <= slack).all()
        return
    if rounding == "compensated":
        kept = got + residual.to(WIDE)
        assert ((kept - exact).abs() <= slack + exact.abs() * torch.finfo(dtype).eps ** 2).all()
    lower, upper = neighbours(exact - slack, dtype)[0], neighbours(exact + slack, dtype)[1]
    assert ((got >= lower) & (got <= upper)).all()
    if rounding != "stochastic":
        middle = (exact.to(dtype).to(WIDE) - exact).abs()
        assert ((got - exact).abs() <= middle + 2 * slack).all()


@pytest.mark.parametrize("backend", [b for b in backends() if b != "reference"])
@pytest.mark.parametrize("dtype", NARROW)
def test_backends_draw_the_same_bits(backend, dtype, device):
    """Equal wherever the float32 sums are: with exactly representable products, everywhere."""
    weight, _, _ = factors(37, 203, 1, dtype, device=device)
    lora_A = torch.randint(-8, 8, (5, 203), device=device).float() / 2**14
    lora_B = torch.randint(-8, 8, (37, 5), device=device).float()
    results = []
    for name in ("reference", backend):
        with use_backend(name):
            results.append(merge_(weight.clone(), lora_A, lora_B, 0.5, "stochastic", seed=-5))
    assert torch.equal(*results)
    assert not torch.equal(results[0], merge_(weight.clone(), lora_A, lora_B, 0.5))


@pytest.mark.parametrize("backend", backends())
def test_strides_offsets_and_what_lies_around_them(backend, device):
    """Case 12 of test_reliability.py: odd pitches, transposed and misaligned views; only the view is written."""
    for view in (
        lambda base: base[1:38, 3:70],
        lambda base: base.T[2:39, 1:68],
        lambda base: base[::2, ::3][:37, :27],
        lambda base: base.flatten()[7 : 7 + 37 * 67].view(37, 67),
    ):
        for dtype in DTYPES:
            base = torch.randn(80, 90, device=device).to(dtype)
            touched = torch.zeros(80, 90, dtype=torch.bool, device=device)
            view(touched).fill_(True)
            before, weight = base.clone(), view(base)
            # Rounded to bf16, because some backends round to tf32, and this test is about addresses.
            lora_A, lora_B = (
                torch.randn(size, columns, device=device).bfloat16().float()
                for size, columns in ((weight.shape[1], 6), (weight.shape[0], 12))
            )
            lora_A, lora_B = lora_A.T, lora_B[:, ::2]
            exact = exact_sum(weight, lora_A, lora_B, 0.5)
            with use_backend(backend):
                merge_(weight, lora_A, lora_B, 0.5)
            tolerance = torch.finfo(dtype).eps * exact.abs() + 1e-5
            assert ((weight.to(WIDE) - exact).abs() <= tolerance).all()
            assert torch.equal(base[~touched], before[~touched])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 70), st.integers(1, 140), st.integers(1, 40), st.sampled_from(DTYPES))
def test_drawn_shapes(out_features, in_features, r, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight, lora_A, lora_B = factors(out_features, in_features, r, dtype, device=device)
    exact = exact_sum(weight, lora_A, lora_B, 0.25)
    for name in backends():
        with use_backend(name):
            got = merge_(weight.clone(), lora_A, lora_B, 0.25).double()
        assert ((got - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all(), name


def share_kept(rounding: str, seeds: int = 1) -> float:
    """<what W gained, the update> / <the update, the update> at 2048^2, r = 128, rho = 1e-3."""
    weight, lora_A, lora_B = factors(2048, 2048, 128, torch.bfloat16, size=1e-3)
    update = lora_B.double() @ lora_A.double()
    assert (update.norm() / weight.double().norm()).item() == pytest.approx(1e-3, rel=0.05)
    gained = torch.zeros_like(update)
    for seed in range(seeds):
        merged = weight.clone()
        residual = torch.zeros_like(weight) if rounding == "compensated" else None
        merge_(merged, lora_A, lora_B, 1.0, rounding, residual, seed)
        gained += merged.double() - weight.double()
        if residual is not None:
            gained += residual.double()
    return ((gained / seeds * update).sum() / update.square().sum()).item()


def test_share_of_the_update_that_survives():
    """Measured on the update itself: outputs hide what nearest rounding loses."""
    assert share_kept("nearest") == pytest.approx(0.52, abs=0.02)
    assert share_kept("compensated") >= 0.999
    assert share_kept("stochastic", seeds=4) == pytest.approx(1.0, abs=0.01)


def test_repeated_compensated_merges_add_up():
    weight, _, _ = factors(64, 96, 1, torch.bfloat16)
    residual, start, total = torch.zeros_like(weight), weight.double(), 0.0
    for _ in range(50):
        _, lora_A, lora_B = factors(64, 96, 8, size=1e-4)
        total = total + lora_B.double() @ lora_A.double()
        merge_(weight, lora_A, lora_B, 1.0, "compensated", residual)
    gained = weight.double() + residual.double() - start
    assert ((gained - total).norm() / total.norm()).item() < 0.02


@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_rounding_is_unbiased_and_stays_between_neighbours(dtype):
    values = torch.cat(
        [
            torch.linspace(-3, 3, 997),
            torch.linspace(-1.2e-4, 1.2e-4, 997),  # float16's subnormals begin at 6.1e-5
            torch.tensor([1 + 2**-9, 65503.0, 65504.0, -65504.0, 3e38, 0.0, -0.0, 5e-8, 1e-40]),
        ]
    )
    draws = 4096
    bits = philox.bits16(1, philox.STREAM_ROUND, (draws, len(values)))
    rounded = reference.stochastic_round(values.expand(draws, -1), bits, dtype).double()
    lower, upper = neighbours(values.double(), dtype)
    finite = values.abs() <= torch.finfo(dtype).max
    assert ((rounded >= lower) & (rounded <= upper))[:, finite].all()
    step = (upper - lower)[finite]
    bias = (rounded.mean(0) - values.double())[finite]
    assert (bias.abs() <= step * (5 * 0.5 / draws**0.5 + 2**-12)).all()
    exactly = values[finite & (lower == upper)]
    assert torch.equal(rounded[0, finite & (lower == upper)], exactly.double())


@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_rounding_of_inf_and_nan(dtype):
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38])
    bits = torch.full((4,), 65535)
    rounded = reference.stochastic_round(values, bits, dtype)
    assert torch.equal(rounded, values.to(dtype)) or (
        rounded[2].isnan() and torch.equal(rounded[[0, 1, 3]], values.to(dtype)[[0, 1, 3]])
    )


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_that_is_not_finite_is_refused_case43(backend, dtype, device):
    for poison in (torch.nan, torch.inf, 3e38):
        weight, lora_A, lora_B = factors(6, 8, 2, dtype, device=device)
        lora_A[1, 2] = poison
        lora_B *= 1e4
        before = [t.clone() for t in (weight, lora_A, lora_B)]
        with use_backend(backend), pytest.raises(FloatingPointError, match="nothing was merged"):
            merge_(weight, lora_A, lora_B, 1.0)
        for a, b in zip((weight, lora_A, lora_B), before):
            assert torch.equal(a, b) or a.isnan().any()
        assert torch.equal(weight, before[0])


def test_large_but_finite_updates_are_merged():
    """The cheap bound overflows here; the product itself does not."""
    weight, lora_A, lora_B = torch.zeros(4, 4), torch.full((2, 4), 1e20), torch.zeros(4, 2)
    lora_A[:, 1:] = 0
    lora_B[0, 0] = 1e18
    merge_(weight, lora_A, lora_B, 1.0)
    assert weight[0, 0] == 1e38 and weight[1:].eq(0).all()


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "a, b, scaling",
    [
        (1e20, 1e20, 1e-36),  # B @ A overflows, the update does not
        (3.4028e38, 0.0, 1.0),  # rounds to infinity in tf32, and times zero that is NaN
        (3.4028e38, 1e-36, 1.0),
        (0.0, 2.0**120, 1.0),
    ],
)
def test_what_overflows_on_the_way_is_refused(backend, dtype, a, b, scaling, device):
    weight = torch.ones(4, 8, dtype=dtype, device=device)
    factors = torch.full((4, 8), a, device=device), torch.full((4, 4), b, device=device)
    with use_backend(backend), pytest.raises(FloatingPointError, match="nothing was merged"):
        merge_(weight, *factors, scaling)
    assert weight.eq(1).all()


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("large, small", [(1.3e36, 1e-36), (1e34, 1e-30), (1e20, 1e-25)])
@pytest.mark.parametrize("r", [4, 128])
def test_large_factors_beside_small_ones_are_merged(backend, dtype, large, small, r, device):
    for a, b in ((large, small), (small, large)):
        weight = torch.zeros(4, 8, dtype=dtype, device=device)
        factors = torch.full((r, 8), a, device=device), torch.full((4, r), b, device=device)
        with use_backend(backend):
            merge_(weight, *factors, 1e-4)
        exact = factors[1].double() @ factors[0].double() * 1e-4
        least = 2.0**-24 if dtype == torch.float16 else 0.0  # its step at zero
        assert torch.allclose(weight.double(), exact, rtol=2.0**-7, atol=least)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("rounding", checks.ROUNDINGS)
def test_a_float16_sum_at_the_end_of_its_range_is_refused_or_finite(backend, rounding, device):
    """Kernels round the factors to tf32: up, by as much as 2^-10 of the product."""
    refused = 0
    for a, b in (
        (256.125, 255.6875),
        (256.125, 255.5),
        (256.0, 255.75),
        (1.0, 65504.0),
        (250.0, 260.0),
    ):
        weight = torch.zeros(4, 8, dtype=torch.float16, device=device)
        rest = torch.zeros_like(weight) if rounding == "compensated" else None
        factors = torch.full((1, 8), a, device=device), torch.full((4, 1), b, device=device)
        try:
            with use_backend(backend):
                merge_(weight, *factors, 1.0, rounding, rest)
        except FloatingPointError:
            refused += 1
            assert weight.eq(0).all()
        else:
            assert torch.allclose(
                weight.double(), torch.full_like(weight, a * b).double(), rtol=2.0**-9
            )
    assert refused == 3


def test_float16_overflow_of_the_sum_is_refused():
    weight = torch.full((4, 4), 65000.0).half()
    with pytest.raises(FloatingPointError):
        merge_(weight, torch.ones(1, 4), torch.full((4, 1), 1000.0), 1.0)
    assert weight.eq(65000.0).all()


@pytest.mark.parametrize("rounding", checks.ROUNDINGS)
def test_opcheck(rounding):
    weight, lora_A, lora_B = factors(8, 12, 3, torch.bfloat16)
    residual = torch.zeros_like(weight) if rounding == "compensated" else None
    with use_backend("reference"):
        torch.library.opcheck(
            torch.ops.relora_kernels._merge_.default,
            (weight, lora_A, lora_B, 0.5, rounding, residual, 3, 0, True),
        )


@pytest.mark.parametrize("backend", backends())
def test_version_counters_move(backend, device):
    weight, lora_A, lora_B = factors(8, 12, 3, torch.bfloat16, device=device)
    residual = torch.zeros_like(weight)
    before = weight._version, residual._version
    with use_backend(backend):
        merge_(weight, lora_A, lora_B, 0.5, "compensated", residual)
    assert weight._version > before[0] and residual._version > before[1]


def test_float64_is_merged_in_float64():
    weight, lora_A, lora_B = (t.double() for t in factors(9, 11, 4))
    exact = weight + 0.3 * (lora_B @ lora_A)
    merge_(weight, lora_A, lora_B, 0.3)
    torch.testing.assert_close(weight, exact, rtol=1e-14, atol=1e-14)


def test_empty_weights(device):
    for shape in ((0, 4), (4, 0), (0, 0)):
        weight = torch.empty(shape, device=device)
        factors_ = torch.ones(2, shape[1], device=device), torch.ones(shape[0], 2, device=device)
        assert merge_(weight, *factors_, 1.0) is weight


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"weight": torch.zeros(4, 6, dtype=torch.int32)}, TypeError, "int32"),
        ({"weight": torch.zeros(24)}, ValueError, r"weight \(out, in\)"),
        ({"weight": torch.zeros(1, 6).expand(4, 6)}, ValueError, "overlapping.*clone"),
        ({"lora_A": torch.zeros(2, 5)}, ValueError, r"\(r, 6\).*got \(2, 5\)"),
        ({"lora_A": torch.zeros(0, 6), "lora_B": torch.zeros(4, 0)}, ValueError, "r >= 1"),
        ({"lora_B": torch.zeros(4, 2).half()}, TypeError, "one dtype"),
        ({"lora_B": torch.zeros(4, 2, device="meta")}, ValueError, "lora_B on meta"),
        ({"scaling": float("inf")}, ValueError, "finite scaling"),
        ({"rounding": "up"}, ValueError, "nearest.*got 'up'"),
        ({"rounding": "compensated", "weight": torch.zeros(4, 6).half()}, ValueError, "zeros_like"),
        ({"residual": torch.zeros(4, 6)}, ValueError, "residual=None with .* leave it out"),
        ({"rounding": "compensated", "residual": torch.zeros(4, 5)}, ValueError, r"got \(4, 5\)"),
        ({"seed": 1.5}, ValueError, "int64, got 1.5"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(changes, error, says):
    good = {"weight": torch.ones(4, 6), "lora_A": torch.ones(2, 6), "lora_B": torch.ones(4, 2),
            "scaling": 0.5}  # fmt: skip
    with pytest.raises(error, match=says):
        merge_(**{**good, **changes})
    assert good["weight"].eq(1).all()


def test_named_backend_never_falls_back():
    weight, lora_A, lora_B = (t.double() for t in factors(4, 6, 2))
    for name in ("triton", "cuda"):
        if name in op.IMPLEMENTATIONS:
            with use_backend(name), pytest.raises(BackendUnavailable, match=name):
                merge_(weight, lora_A, lora_B, 1.0)


@pytest.mark.parametrize("backend", backends())
def test_a_piece_of_rows_draws_the_whole_weights_bits(backend, device):
    """A shard's rows are rounded as they are in the unsharded weight."""
    weight, lora_A, _ = factors(20, 45, 3, torch.bfloat16, device=device)
    lora_B = torch.randint(-4, 4, (20, 3), device=device).float() / 2**9
    lora_A = (lora_A * 4).round()
    with use_backend(backend):
        whole = merge_(weight.clone(), lora_A, lora_B, 1.0, "stochastic", seed=8)
        piece = op.merge_checked(
            weight[7:15].clone(), lora_A, lora_B[7:15], 1.0, "stochastic", None, 8, first_row=7
        )
    assert torch.equal(piece, whole[7:15])


@pytest.mark.parametrize("rounding", checks.ROUNDINGS)
def test_merge_compiles_whole(rounding):
    weight, lora_A, lora_B = factors(8, 12, 3, torch.bfloat16)
    residual = torch.zeros_like(weight) if rounding == "compensated" else None
    expected = merge_(weight.clone(), lora_A, lora_B, 0.5, rounding,
                      None if residual is None else residual.clone(), 3)  # fmt: skip
    compiled = torch.compile(merge_, fullgraph=True)
    assert torch.equal(compiled(weight, lora_A, lora_B, 0.5, rounding, residual, 3), expected)
    lora_A[0, 0] = torch.nan
    with pytest.raises(FloatingPointError):
        compiled(weight, lora_A, lora_B, 0.5, rounding, residual, 3)
    assert torch.equal(weight, expected)


def test_meta_tensors_merge_to_meta():
    weight, lora_A, lora_B = (t.to("meta") for t in factors(4, 6, 2))
    assert merge_(weight, lora_A, lora_B, 1.0).is_meta


def test_memory_that_two_elements_share_is_refused():
    args = torch.ones(2, 3), torch.ones(3, 2), 1.0
    window = torch.randn(10).as_strided((3, 3), (1, 1))
    with pytest.raises(ValueError, match="weight without overlapping"):
        merge_(window, *args)
    weight = torch.randn(3, 3).half()
    before = weight.clone()
    with pytest.raises(ValueError, match="residual without overlapping"):
        merge_(weight, *args, "compensated", torch.zeros(1).half().expand(3, 3))
    with pytest.raises(ValueError, match="memory of their own"):
        merge_(weight, *args, "compensated", weight)
    assert torch.equal(weight, before)
    wide = torch.randn(3, 7).half()
    before = wide.clone()
    for residual in (wide[:, 1:4], wide[:, 2:5]):
        with pytest.raises(ValueError, match="two that overlap"):
            merge_(wide[:, :3], *args, "compensated", residual)
    with pytest.raises(ValueError, match="two that overlap"):
        merge_(wide[:, :3], wide[:2, 1:4], torch.ones(3, 2).half(), 1.0)
    assert torch.equal(wide, before)
    merge_(wide[:, :3], *args, "compensated", wide[:, 3:6])
    assert torch.equal(wide[:, 6], before[:, 6]) and not torch.equal(wide[:, :3], before[:, :3])


def test_tensors_that_share_memory_are_refused_and_neighbours_are_not():
    buffer = torch.randn(7, 6)
    before = buffer.clone()
    A, B = torch.ones(2, 6), torch.ones(4, 2)
    for clash in (
        (buffer[:4], buffer[2:4], B, "nearest", None),
        (buffer[:4], A, buffer[3:5].view(6, 2)[2:], "nearest", None),
        (buffer[:4], A, B, "compensated", buffer[3:]),
        (buffer[:4], A, B, "compensated", buffer[:4]),
    ):
        weight, *factors, rounding, residual = clash
        with pytest.raises(ValueError, match="memory of their own"):
            merge_(weight, *factors, 1.0, rounding, residual)
        assert torch.equal(buffer, before)
    wide = torch.zeros(4, 12)
    merge_(wide[:, :6], A, B, 1.0, "compensated", wide[:, 6:])
    merge_(buffer[:4], buffer[4:6], B, 1.0)
    assert (wide[:, :6] == 2).all() and (wide[:, 6:] == 0).all()
    torch.testing.assert_close(buffer[:4], before[:4] + B @ before[4:6])


@pytest.mark.parametrize("backend", backends())
def test_what_only_float32_cannot_hold_is_refused(backend, device):
    """They become inf in float32, and 0 times inf would be NaN in every element of W."""
    zero = torch.zeros(4, 2, device=device)
    for lora_A, lora_B, scaling in (
        (torch.ones(2, 4, device=device), zero, 1e39),
        (torch.full((2, 4), 1e300, device=device, dtype=WIDE), zero.to(WIDE), 1.0),
    ):
        weight = torch.ones(4, 4, device=device)
        with use_backend(backend), pytest.raises((FloatingPointError, BackendUnavailable)):
            merge_(weight, lora_A, lora_B, scaling)
        assert (weight == 1).all()


@pytest.mark.parametrize("rounding", checks.ROUNDINGS)
def test_failing_after_the_first_rows_changes_nothing(monkeypatch, rounding):
    """The reference goes through a large W in pieces; memory may run out at any of them."""
    weight, lora_A, lora_B = factors(40, 16, 3, torch.bfloat16, size=1.0)
    residual = torch.zeros_like(weight) if rounding == "compensated" else None
    kept, whole = weight.clone(), weight.clone()
    reference.merge_(whole, lora_A, lora_B, 0.5, rounding, residual, 3, 0)
    monkeypatch.setattr(reference, "_ROW_BLOCK_ELEMENTS", 16 * 16)  # 16 rows: three pieces
    rest = None if residual is None else torch.zeros_like(residual)
    original, calls = reference._as, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("injected")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "_as", failing)
        with pytest.raises(torch.OutOfMemoryError):
            reference.merge_(weight, lora_A, lora_B, 0.5, rounding, rest, 3, 0)
    assert torch.equal(weight, kept) and (rest is None or not rest.any())
    reference.merge_(weight, lora_A, lora_B, 0.5, rounding, rest, 3, 0)
    assert torch.equal(weight, whole) and (rest is None or torch.equal(rest, residual))


def test_float16_overflow_with_the_residual_is_refused():
    weight, residual = torch.full((2, 2), 65472.0).half(), torch.full((2, 2), 15.0).half()
    args = weight, torch.ones(1, 2), torch.full((2, 1), 20.0)
    with pytest.raises(FloatingPointError):
        merge_(*args, 1.0, "compensated", residual)
    assert weight.eq(65472).all() and residual.eq(15).all()
    merge_(*args, 0.5, "compensated", residual)
    assert weight.eq(65504).all() and residual.eq(-7).all()


def test_a_float16_weight_that_is_inf_stays_so_alone():
    weight = torch.ones(2, 3).half()
    weight[0, 1] = torch.inf
    merge_(weight, torch.ones(1, 3), torch.full((2, 1), 2.0), 1.0)
    assert weight[0, 1].isinf() and weight[1].eq(3).all() and weight[0, ::2].eq(3).all()


@pytest.mark.parametrize("where", op._LARGEST)
@pytest.mark.parametrize("dtype", [*DTYPES, WIDE])
def test_largest_magnitudes_of_any_strides(where, dtype, device):
    """How the check reads factors; either way works on either device."""
    tensors = []
    for poison in (0.0, -300.0, torch.inf, -torch.inf, torch.nan):
        for view in (
            lambda base: base,
            lambda base: base.T,
            lambda base: base[1::2, 2::3],
            lambda base: base[:1].expand(9, 90),
            lambda base: base.flatten()[3:-4],
            lambda base: base[0, 0],
        ):
            tensor = view(torch.randn(67, 90, device=device).to(dtype))
            tensor[(-1,) * tensor.dim()] = poison
            tensors += [tensor, tensor.flip(0) if tensor.dim() else tensor]
    expected = torch.stack([t.abs().amax() for t in tensors])
    got = torch.stack(list(op._LARGEST[where](tensors)))
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_check_of_many_layers_reads_the_device_once_and_makes_no_copy(dtype, device):
    """Neither a synchronisation for each layer nor a temporary of W's or a factor's size."""

    class Reads(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") in {"cpu", "item", "tolist", "__float__", "__bool__"}:
                reads.append(func.__name__)
            return func(*args, **(kwargs or {}))

    def updates(layers):
        for i in range(layers):
            factors_dtype = (torch.float32, torch.bfloat16)[i % 2]
            weight, lora_A, lora_B = factors(640, 960, 64, dtype, factors_dtype, device=device)
            yield weight, lora_A, lora_B, 0.5, torch.zeros_like(weight), str(i)

    found = []
    for layers in (2, 9):
        reads, merges = [], list(updates(layers))
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as seen:
            with Reads():
                op.check_finite(merges)
        key = f"{device}_memory_usage".replace("cuda", "device")
        assert max(getattr(event, key) for event in seen.events()) <= 2**15 < merges[1][2].nbytes
        found.append(reads)
    assert found[0] == found[1] and found[0].count("cpu") == 1
    merges[7][2][3, 5] = torch.nan
    with pytest.raises(FloatingPointError, match="^7: "):
        op.check_finite(merges)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_merge(backend, autocast, device):
    """Products under autocast would lose a tiny B in 16 bits, and overflow in float16 where float32 does not."""
    cast = torch.autocast(device, autocast)
    for size, scaling in ((1e-6, 0.25), (300.0, 1e-3)):
        weight, lora_A, lora_B = (t.to(device) for t in factors(32, 48, 8, size=size))
        expected = weight.clone()
        with use_backend(backend):
            merge_(expected, lora_A * size, lora_B, scaling)
            with cast:
                merge_(weight, lora_A * size, lora_B, scaling)
        assert torch.equal(weight, expected)
    for dtype in (torch.float16, torch.bfloat16):
        weight, lora_A, lora_B = (t.to(device) for t in factors(8, 8, 2, dtype, autocast))
        expected = weight.clone()
        with use_backend(backend):
            merge_(expected, lora_A, lora_B, 1.0)
            with cast:
                merge_(weight, lora_A, lora_B, 1.0)
        assert torch.equal(weight, expected)
    # Decided element by element, because the bound r max|A| max|B| is over the range.
    lora_A, lora_B = torch.eye(64, device=device) * 1e19, torch.eye(64, device=device) * 1e18
    weight = torch.zeros(64, 64, device=device)
    with use_backend(backend), cast:
        merge_(weight, lora_A, lora_B, 1.0)
    assert torch.allclose(weight.diagonal(), torch.tensor(1e37, device=device))


@pytest.mark.parametrize("backend", backends())
def test_an_inference_tensor_is_refused_before_it_is_written(backend, device):
    """Otherwise the write would succeed and a later step raise, so that a retry would merge twice."""
    with torch.inference_mode():
        weight = torch.zeros(4, 6, device=device)
    lora_A, lora_B = torch.ones(2, 6, device=device), torch.ones(4, 2, device=device)
    with use_backend(backend):
        with pytest.raises(ValueError, match="torch.inference_mode"):
            merge_(weight, lora_A, lora_B, 1.0)
        assert not weight.any()
        with torch.inference_mode():
            merge_(weight, lora_A, lora_B, 1.0)
    assert (weight == 2).all()
