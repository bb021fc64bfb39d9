"""The two-segment product without a GPU: its schedule and descriptors, its kernels' own source on a model of
the machine (tests/gemm/model.h), and what nvcc makes of them. test_cuda_gemm_gpu.py runs them on a GPU."""

import contextlib
import ctypes
import re
import subprocess
import types
from pathlib import Path

import gemm_program
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import assert_as_good_as, check_against_fp64, eager_lora_linear, operands
from simt_build import CSRC, TESTS, cuda_build, host_library

from relora_kernels import lora_linear, use_backend
from relora_kernels.cuda import lora_linear as launcher
from relora_kernels.reference import lora_linear as reference
from relora_kernels.reference import philox

# ---- The schedule and the descriptors --------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    library = host_library(
        tmp_path_factory, TESTS / "gemm/schedule.cpp", "-O1", "-g", "-fsanitize=undefined",
        "-fno-sanitize-recover=all", f"-I{CSRC}",
    )  # fmt: skip
    for function in (library.walk, library.walk_pair, library.turn_ring):
        function.restype = ctypes.c_char_p
    library.walk.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_int] * 4
    library.walk_pair.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int] * 4
    library.descriptor.restype = ctypes.c_uint64
    library.map_of.argtypes = [
        ctypes.c_size_t,
        *[ctypes.c_int64] * 3,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    return library


@settings(deadline=None, max_examples=300)
@given(
    m=st.integers(1, 3000), n=st.integers(1, 3000), k=st.integers(1, 700), r=st.integers(1, 200),
    block_n=st.sampled_from([128, 256]), cluster=st.sampled_from([1, 2]), clusters=st.integers(1, 140),
)  # fmt: skip
@example(m=16384, n=5461, k=2048, r=128, block_n=256, cluster=2, clusters=66)
@example(m=16384, n=2048, k=5461, r=100, block_n=256, cluster=1, clusters=132)
def test_every_k_step_of_every_tile_is_done_once(plan, m, n, k, r, block_n, cluster, clusters):
    assert plan.walk(m, n, k, r, 2**30, block_n, cluster, clusters * cluster) is None


@settings(deadline=None, max_examples=150)
@given(
    m=st.integers(1, 1500), n=st.integers(1, 1500), k=st.integers(1, 5000),
    slab_steps=st.integers(1, 90), blocks=st.integers(1, 140),
)  # fmt: skip
def test_every_k_step_of_every_slab_is_done_once(plan, m, n, k, slab_steps, blocks):
    assert plan.walk(m, n, k, 0, slab_steps, 128, 1, blocks) is None


@settings(deadline=None, max_examples=300)
@given(
    m=st.integers(1, 3000), n=st.integers(1, 400), k=st.integers(1, 3000), cluster=st.sampled_from([1, 2]),
    slab=st.integers(1, 20), clusters=st.integers(1, 140),
)  # fmt: skip
@example(m=16384, n=128, k=4096, cluster=2, slab=16, clusters=66)
@example(m=16384, n=512, k=5461, cluster=2, slab=22, clusters=66)
def test_every_unit_of_a_pair_is_done_once_and_slab_by_slab(plan, m, n, k, cluster, slab, clusters):
    steps = slab * 2 * cluster
    assert plan.walk(m, n, k, 0, 2**30, 128, cluster, clusters * cluster) is None
    assert plan.walk(k, n, m, 0, steps, 128, cluster, clusters * cluster) is None
    assert plan.walk_pair(m, n, k, steps, 128, cluster, clusters * cluster) is None


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 60), st.integers(1, 8), st.integers(0, 2**31)
)
def test_producer_and_consumers_never_cross(plan, stages, steps, consumers, seed):
    assert plan.turn_ring(stages, steps, consumers, seed) is None


def test_wgmma_descriptors_are_those_of_tritons_compiler(plan):
    """As Triton 3.7 emits them for these tiles on sm_90: K-contiguous rows of 64, and 64 x 256."""
    for step in range(4):
        address = 0x1C400
        for contiguous_k, constant, advance in (
            (1, 4611686293305294848, 2),
            (0, 4611686293338849280, 128),
        ):
            expected = (address >> 4) + constant + step * advance
            assert plan.descriptor(contiguous_k, address, 16 * step) == expected


@pytest.mark.parametrize("contiguous_k", [True, False])
def test_wgmma_reads_what_tma_wrote(plan, contiguous_k):
    """For every element of a 256 x 64 tile, the descriptor's canonical layout finds it where TMA's 128-byte
    swizzle puts it. By formulas of the PTX ISA, not the kernel's."""
    base = 0x8400

    def swizzle(address):
        return address ^ ((address >> 7 & 7) << 4)

    for k0 in range(0, 64, 16):
        word = plan.descriptor(int(contiguous_k), base, k0)
        start, leading, stride = ((word >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        assert word >> 62 == 1 and word >> 49 & 7 == 0 and base % 1024 == 0
        for i in range(256):
            for k in range(16):
                if contiguous_k:  # boxes of 64 k by rows
                    written = i * 128 + (k0 + k) * 2
                    read = i // 8 * stride + i % 8 * 128 + k * 2
                else:  # boxes of 64 columns by 64 k
                    written = i // 64 * 8192 + (k0 + k) * 128 + i % 64 * 2
                    read = i // 64 * leading + k // 8 * stride + k % 8 * 128 + i % 64 * 2
                assert swizzle(base + written) == swizzle(start + read)


def test_the_epilogues_swizzle_is_tmas(plan):
    for row in range(64):
        for chunk in range(8):
            address = row * 128 + chunk * 16
            assert plan.swizzle(row, chunk) == address ^ ((address >> 7 & 7) << 4)


@pytest.mark.parametrize(
    "data, rows, cols, pitch, box_rows, ok",
    [
        (0x1000, 7, 5, 8, 128, True),
        (0x1000, 16384, 5461, 5464, 128, True),
        (0x1000, 16384, 5461, 5461, 128, False),  # a pitch of 10922 bytes
        (0x1008, 7, 5, 8, 128, False),  # starts at 8 modulo 16
        (0x1000, 7, 9, 8, 128, False),  # rows overlap
        (0, 7, 5, 8, 128, False),
        (0x1000, 0, 5, 8, 128, False),
        (0x1000, 7, 0, 8, 128, False),
        (0x1000, 7, 5, 8, 257, False),
        (0x1000, 7, 5, 2**39, 128, False),  # a pitch of 2^40 bytes
        (0x1000, 2**31, 5, 8, 128, False),  # coordinates are 32-bit
    ],
)
def test_tensor_maps(plan, data, rows, cols, pitch, box_rows, ok):
    out = (ctypes.c_uint64 * 6)()
    plan.map_of(data, rows, cols, pitch, box_rows, out)
    assert list(out) == [cols, rows, 2 * pitch, 64, box_rows, int(ok)]


@pytest.mark.parametrize("block_n, stages", [(256, 4), (256, 3), (128, 6)])
def test_shared_memory_fits_and_is_aligned(plan, block_n, stages):
    total, left, stage, output, buffer, barriers, buffers = (
        plan.layout(block_n, stages, i) for i in range(7)
    )
    assert total <= 232448 and stage == left + block_n * 128 and buffers >= 2
    assert all(part % 1024 == 0 for part in (left, stage, output, buffer)) and barriers % 8 == 0


# ---- The kernels on the model -----------------------------------------------------------------------


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("row", ctypes.c_int64), ("col", ctypes.c_int64)]


class Bias(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int)]


class Dropout(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_void_p),
        ("threshold", ctypes.c_uint32),
        ("keep_scale", ctypes.c_float),
    ]


class TwoSegmentArgs(ctypes.Structure):
    _fields_ = [
        ("form", ctypes.c_int),
        *((name, Matrix) for name in ("out", "p", "b", "x", "w")),
        *((name, ctypes.c_int64) for name in "mnkr"),
        ("dtype", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("bias", Bias),
        ("dropout", Dropout),
        *((name, ctypes.c_int) for name in ("slab_steps", "block_n", "cluster")),
        ("sums", Matrix),
    ]


class MaskArgs(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("out", "x")),
        *((name, ctypes.c_int64) for name in "mk"),
        ("dropout", Dropout),
    ]


class SumArgs(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("out", "partial")),
        *((name, ctypes.c_int64) for name in ("slabs", "m", "n")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int),
    ]


DTYPES = ("float32", "bfloat16", "float16")  # launch.h's enums
FORMS = ("nt", "nn", "tn")


class Shim:
    """Stands in for relora_kernels._C: the same sources, on the model."""

    two_segment_kernels = ("sm80", "sm90")

    def __init__(self, library):
        self.library, self.processors, self.seed, self.launches = library, 3, 0, []

    def two_segment(
        self, kernel, form, out, p, b, x, w, bias, sizes, dtype, bias_dtype, scale, dropout,
        slab_steps, block_n, cluster, sums, device, stream,
    ):  # fmt: skip
        args = TwoSegmentArgs(
            FORMS.index(form), *(Matrix(*t) for t in (out, p, b, x, w)), *sizes, DTYPES.index(dtype),
            scale, Bias(bias, DTYPES.index(bias_dtype)), Dropout(*dropout), slab_steps, block_n, cluster,
            Matrix(*sums),
        )  # fmt: skip
        form += "+tn" if sums[0] else ""
        self._run(f"two_segment_{kernel}", args, (form, block_n, cluster))

    def mask_rows(self, out, x, sizes, dropout, device, stream):
        self._run("mask_rows", MaskArgs(Matrix(*out), Matrix(*x), *sizes, Dropout(*dropout)))

    def sum_slabs(self, out, partial, sizes, scale, dtype, device, stream):
        dtype = DTYPES.index(dtype)
        self._run("sum_slabs", SumArgs(Matrix(*out), Matrix(*partial), *sizes, scale, dtype))

    def _run(self, name, args, *variant):
        message, counts = ctypes.c_char_p(), (ctypes.c_long * 3)()
        function = getattr(self.library, f"model_{name}")
        self.seed += 1
        error = function(
            ctypes.byref(args), self.processors, self.seed, ctypes.byref(message), counts
        )
        self.launches.append((name, *variant, *counts))
        if error:
            raise RuntimeError(f"cudaError {error}: {message.value.decode()}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sources = (CSRC / f"two_segment_{name}.cu" for name in ("passes", "sm80", "sm90"))
    return host_library(
        tmp_path_factory, TESTS / "gemm/harness.cpp",
        *"-O2 -g -ffp-contract=off -fno-strict-aliasing -x c++ -include model.h".split(),
        f"-I{TESTS / 'gemm'}", f"-I{CSRC}", *sources,
    )  # fmt: skip


@pytest.fixture(params=["sm90", "sm80"])
def shim(request, model, monkeypatch):
    """The launcher of relora_kernels/cuda/lora_linear.py on top of the model, with every new tensor filled
    with NaN."""
    shim = Shim(model)
    monkeypatch.setattr(launcher, "extension", lambda: (shim, None))
    monkeypatch.setattr(launcher, "why_no_device", lambda device: None)
    monkeypatch.setattr(launcher, "_processors", lambda device: shim.processors)
    capability = {"sm90": (9, 0), "sm80": (8, 6)}[request.param]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    new_empty = torch.Tensor.new_empty

    def filled(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    shim.kernel = request.param
    return shim


def padded(rows, cols, dtype, pitch=None, start=0):
    """A random matrix with this pitch, by default a multiple of 16 bytes, and NaN beside it."""
    pitch = pitch or -(-cols // 8) * 8 + 8
    buffer = torch.full((start + rows * pitch,), torch.nan, dtype=dtype)
    matrix = buffer[start:].view(rows, pitch)[:, :cols]
    return matrix.copy_(torch.randn(rows, cols))


def product_case(shim, form, m, n, k, r, dtype, variant, bias=None, scale=1.0, pitch=None, p=0.0):
    """(result, exact, eager) of one launch."""
    x = padded(m, k, dtype)
    w, b = (padded(*((n, d) if form == "nt" else (d, n)), dtype) for d in (k, max(r, 1)))
    low = padded(m, max(r, 1), dtype)
    seed = torch.tensor(1234567)
    dropout = launcher._dropout(p, seed)
    out = torch.full((m, pitch or -(-n // 8) * 8), 7.0, dtype=dtype)
    shim.two_segment(
        shim.kernel, form, *(launcher._matrix(t) for t in (out, low, b, x, w)),
        0 if bias is None else bias.data_ptr(), (m, n, k, r), launcher.DTYPES[dtype],
        launcher.DTYPES[dtype if bias is None else bias.dtype], scale,
        (seed.data_ptr(), *dropout[1:]), 1, *variant, (0, 0, 0), 0, 0,
    )  # fmt: skip
    assert (out[:, n:] == 7).all()

    def formula(change):
        right, small = (change(t).T if form == "nt" else change(t) for t in (w, b))
        y = change(x) @ right
        if r:
            correction = change(low) @ small
            if p:
                correction = correction * reference.dropout_mask(correction, p, seed)
            y = y + correction
        return y * scale if bias is None else y * scale + change(bias).to(y.dtype)

    return out[:, :n], formula(torch.Tensor.double), formula(apart)


def apart(operand):
    """A copy without the NaNs around it: oneDNN multiplies them by zero on a CPU with AMX (torch 2.13)."""
    return operand.contiguous()


VARIANTS = {"sm90": [(128, 1), (256, 1), (256, 2)], "sm80": [(128, 1)]}


@pytest.mark.parametrize("form", ["nt", "nn"])
@pytest.mark.parametrize(
    "m, n, k, r, options",
    [
        (1, 1, 1, 1, {}),
        (129, 40, 72, 20, {"bias": torch.float32}),
        (300, 264, 200, 65, {}),  # three tiles of rows: the last has no partner in its cluster
        (70, 300, 130, 3, {"bias": torch.bfloat16, "scale": -0.75}),
        (140, 515, 64, 0, {"pitch": 515}),  # an output that TMA cannot store
        (513, 128, 40, 130, {"processors": 1}),  # every tile by the same block
        (141, 300, 131, 66, {}),
        (8, 40, 61, 3, {}),  # boxes that would begin beyond the operands
    ],
)
def test_product_on_the_model(shim, form, m, n, k, r, options):
    shim.processors = options.get("processors", 4)
    for number, variant in enumerate(VARIANTS[shim.kernel]):
        if variant[1] > shim.processors:
            continue
        dtype = (torch.bfloat16, torch.float16)[(number + m) % 2]
        bias = torch.randn(n).to(options["bias"]) if "bias" in options else None
        if bias is not None and bias.dtype != torch.float32:
            dtype = bias.dtype
        got, exact, eager = product_case(
            shim, form, m, n, k, r, dtype, variant, bias, options.get("scale", 1.0),
            options.get("pitch"),
        )  # fmt: skip
        assert_as_good_as(got, eager, exact, 2, dtype)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_masks_the_low_rank_segment_alone(shim, p):
    variant = VARIANTS[shim.kernel][min(1, len(VARIANTS[shim.kernel]) - 1)]
    for dtype in (torch.bfloat16, torch.float16):
        case = product_case(shim, "nn", 150, 300, 70, 65, dtype, variant, p=p)
        assert_as_good_as(case[0], case[2], case[1], 2, dtype)


@pytest.mark.parametrize("variant", VARIANTS["sm90"])
def test_any_interleaving_gives_the_same_bits(shim, variant):
    """Producer, consumers and TMA at different speeds; the ring goes round several times."""
    if variant not in VARIANTS[shim.kernel]:
        pytest.skip("a variant of sm_90")
    shim.processors = 2
    results = []
    for number in range(4 if shim.kernel == "sm90" else 2):
        torch.manual_seed(0)
        shim.seed = 100 * number
        got, exact, eager = product_case(
            shim, "nn", 260, 136, 520, 70, torch.bfloat16, variant, pitch=139
        )
        results.append(got.clone())
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert_as_good_as(results[0], eager, exact, 2, torch.bfloat16)


@pytest.mark.parametrize("shim", ["sm90"], indirect=True)
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(
    "m, n, k, slab, options",
    [
        (1, 1, 1, 1, {}),
        (700, 40, 200, 1, {}),  # slab after slab; in clusters the last tiles have no partner
        (520, 136, 300, 2, {"processors": 2}),  # two tiles of columns; one cluster takes turns
        (
            300,
            23,
            390,
            5,
            {"pitch": 23, "scale": -0.75},
        ),  # one slab; an output that TMA cannot store
        (270, 24, 133, 1, {}),
        (130, 72, 61, 1, {"processors": 2}),
    ],
)
def test_a_pair_is_its_two_products_on_the_model(shim, cluster, m, n, k, slab, options):
    """Bit for bit what two separate launches give."""
    shim.processors, scale = options.get("processors", 6), options.get("scale", 0.5)
    dtype = (torch.bfloat16, torch.float16)[m // 10 % 2]
    x, p, w = (padded(*shape, dtype) for shape in ((m, k), (m, n), (k, n)))
    steps, pitch = slab * 2 * cluster, options.get("pitch", -(-n // 8) * 8)
    out = torch.full((2, m, pitch), 7.0, dtype=dtype)
    sums = torch.full((2, -(-m // (64 * steps)), k, n + n % 2), torch.nan)
    sizes, sums_of = (m, n, k, 0), {"slab_steps": steps, "cluster": cluster}
    launcher._multiply("nn", out[0], x, w, sizes, p, scale=scale, sums=sums[0, 0], **sums_of)
    launcher._multiply("nn", out[1], x, w, sizes, scale=scale)
    launcher._multiply("tn", sums[1, 0], x, p, (k, n, m, 0), slab_steps=steps)
    assert torch.equal(out[0], out[1]) and torch.equal(sums[0, :, :, :n], sums[1, :, :, :n])
    exact = scale * (x.double() @ w.double()), x.double().T @ p.double()
    assert_as_good_as(out[0, :, :n], scale * (apart(x) @ apart(w)), exact[0], 2, dtype)
    assert (sums[0, :, :, :n].sum(0) - exact[1]).abs().max() <= 1e-5 * exact[1].abs().max()


@pytest.mark.parametrize("shim", ["sm90"], indirect=True)
def test_any_interleaving_of_a_pair_gives_the_same_bits(shim):
    shim.processors, results = 4, []
    x, w, p = (padded(*shape, torch.bfloat16) for shape in ((520, 390), (390, 30), (520, 30)))
    for number in range(4):
        shim.seed = 100 * number
        out = torch.full((520, 32), torch.nan, dtype=torch.bfloat16)
        sums = torch.full((3, 390, 30), torch.nan)
        launcher._multiply(
            "nn", out, x, w, (520, 30, 390, 0), p, slab_steps=4, sums=sums[0], cluster=2
        )
        results.append((out[:, :30].clone(), sums))
    assert results[0][0].isfinite().all() and results[0][1].isfinite().all()
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_wgmma_and_tma_do_the_work_of_sm90(shim):
    product_case(shim, "nt", 130, 260, 130, 5, torch.bfloat16, VARIANTS[shim.kernel][-1])
    ((_, _, loads, stores, wgmmas),) = shim.launches
    # 2 x 2 tiles of 4 k-steps: each block fetches x's tile and its share of W's; 5 of 8 x 64 columns hold
    # something, in three of the four bands of 64 rows; 4 wgmmas a step for each of 256 threads.
    assert (loads, stores, wgmmas) == (
        (2 * 2 * 4 * 2, 5 * 3, 2 * 2 * 4 * 4 * 256) if shim.kernel == "sm90" else (0, 0, 0)
    )


# ---- The backend on the model -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, in_features, out_features, r, dtype, lora_dtype, bias",
    [
        (150, 136, 264, 24, torch.bfloat16, torch.float32, True),
        (70, 96, 200, 16, torch.float16, torch.float16, False),
        (33, 61, 43, 5, torch.bfloat16, torch.bfloat16, True),  # no pitch is a multiple of 16 bytes
        (1, 8, 8, 1, torch.bfloat16, torch.float32, True),
    ],
)
def test_forward_and_gradients(shim, rows, in_features, out_features, r, dtype, lora_dtype, bias):
    with use_backend("cuda"):
        check_against_fp64(
            operands(rows, in_features, out_features, r, dtype, lora_dtype, bias=bias)
        )
    assert {launch[0] for launch in shim.launches} == {f"two_segment_{shim.kernel}", "sum_slabs"}


@pytest.mark.parametrize("pair", launcher.PAIRS[1:])
def test_gradients_with_q_and_dB_in_one_launch(shim, monkeypatch, pair):
    monkeypatch.setattr(launcher, "PAIR", pair)

    def pairs():
        """The launches of pairs since the last call."""
        found = [launch[1] for launch in shim.launches if "+tn" in str(launch[1])]
        shim.launches.clear()
        return found

    with use_backend("cuda"):
        for sizes in ((330, 72, 264, 24), (33, 61, 43, 5)):
            tensors = operands(*sizes, torch.bfloat16, torch.float32)
            check_against_fp64(tensors)
            assert pairs() == ([("nn+tn", 128, pair)] if shim.kernel == "sm90" else [])
        x, weight, lora_A, lora_B, _ = tensors
        y = lora_linear(x, weight, lora_A, lora_B, 0.5)
        both = torch.autograd.grad(y, (lora_A, lora_B), y.detach(), retain_graph=True)
        assert len(pairs()) == (shim.kernel == "sm90")
        for i in range(2):  # one of the two alone
            factors = [t.detach().requires_grad_(i == j) for j, t in enumerate((lora_A, lora_B))]
            y = lora_linear(x.detach(), weight, *factors, 0.5)
            (alone,) = torch.autograd.grad(y, factors[i], y.detach())
            torch.testing.assert_close(alone, both[i], rtol=1e-5, atol=1e-5)
        lora_linear(x[:0], weight, lora_A, lora_B, 0.5).sum().backward()
        assert pairs() == [] and not lora_B.grad.any()


def test_slabs_of_a_pair_are_square_where_that_fills_the_machine(monkeypatch):
    slabs = []
    monkeypatch.setattr(launcher, "_processors", lambda device: 132)
    monkeypatch.setattr(
        launcher, "_multiply", lambda *_, sums, slab_steps, **__: slabs.append(slab_steps)
    )
    monkeypatch.setattr(launcher, "_total", lambda partial, *_: partial)
    monkeypatch.setattr(launcher, "PAIR", 2)
    for M, K in ((16384, 4096), (65536, 4096), (16384, 5461), (16384, 768), (2048, 4096), (100, 8)):
        x = torch.empty(M, K, dtype=torch.bfloat16, device="meta")
        out, sums = launcher._pair(x, x.new_empty(K, 128), x.new_empty(M, 128), 1.0, torch.float32)
        assert out.shape == (M, 128) and sums.shape == (-(-M // (64 * slabs[-1])), K, 128)
    assert slabs == [64, 64, 88, 12, 8, 4]  # steps of 64 rows; a multiple of two blocks' 256 rows


def test_sums_over_slabs_are_added_in_order(shim):
    shim.processors = 8
    x, w = padded(1100, 20, torch.bfloat16), padded(1100, 31, torch.bfloat16)
    got = launcher._summed(x, w, 0.5, torch.float32)
    exact = 0.5 * (x.double().T @ w.double())
    assert shim.launches[0][1][0] == "tn" and (got - exact).abs().max() <= 1e-5 * exact.abs().max()
    shim.seed += 17
    assert torch.equal(launcher._summed(x, w, 0.5, torch.float32), got)
    assert torch.equal(launcher._summed(x, w, 0.5, torch.bfloat16), got.bfloat16())


@pytest.mark.parametrize("in_features, out_features", [(72, 56), (71, 53)])
def test_dropout_forward_and_backward(shim, in_features, out_features):
    """Against eager, with the input masked by the reference's Philox."""
    x, weight, lora_A, lora_B, bias = operands(90, in_features, out_features, 9, torch.bfloat16)
    dy, seed, p = torch.randn(90, out_features).bfloat16(), 11, 0.4
    wanted = (x, lora_A, lora_B, bias)
    with use_backend("cuda"):
        y = lora_linear(x, weight, lora_A, lora_B, 0.5, bias, p, seed)
        got = [y.detach(), *torch.autograd.grad(y, wanted, dy)]
    expected = {}
    for dtype in (torch.float64, torch.bfloat16):
        t = [v.detach().to(dtype).requires_grad_() for v in (x, weight, lora_A, lora_B, bias)]
        mask = reference.dropout_mask(t[0], p, seed)
        low = torch.nn.functional.linear(torch.nn.functional.linear(t[0] * mask, t[2]), t[3])
        y = torch.nn.functional.linear(t[0], t[1], t[4]) + 0.5 * low
        gradients = torch.autograd.grad(y, (t[0], *t[2:]), dy.to(dtype))
        expected[dtype] = [y.detach(), *gradients]
    for i, (a, b, c) in enumerate(zip(got, expected[torch.bfloat16], expected[torch.float64])):
        assert_as_good_as(a, b, c, 2 if i == 0 else 3, torch.bfloat16)


@pytest.mark.parametrize("k", [8, 13])
def test_the_mask_of_x_is_the_references(shim, k):
    seed = torch.tensor(-5)
    x = torch.randn(37, k + 3).bfloat16()[:, 3:]  # rows start anywhere
    got = launcher._masked(x, launcher._dropout(0.25, seed))
    kept = philox.bits16(seed, philox.STREAM_DROPOUT, tuple(x.shape)) >= 16384
    assert torch.equal(got, torch.where(kept, x, 0)) and got.stride(0) % 8 == 0


def test_hostile_layouts(shim):
    """Expanded, transposed, offset and overlapping operands are copied; few rows, no rows."""
    weight = torch.randn(24, 40).bfloat16()
    lora_A, lora_B = torch.randn(3, 40), torch.randn(24, 3)
    row = torch.randn(40).bfloat16()
    layouts = (
        row.expand(9, 40),
        torch.randn(40, 9).bfloat16().T,
        torch.randn(9 * 40 + 1).bfloat16()[1:].view(9, 40),
        torch.randn(9 * 8 + 40).bfloat16().as_strided((9, 40), (8, 1)),
        torch.randn(9, 48).bfloat16()[:, 8:],
        torch.randn(0, 40).bfloat16(),
    )
    for x in layouts:
        with use_backend("cuda"):
            y = lora_linear(x, weight, lora_A, lora_B, 0.5)
        exact = eager_lora_linear(
            *(t.double() for t in (x, weight, lora_A.bfloat16(), lora_B.bfloat16())), 0.5
        )
        assert y.shape == (len(x), 24) and y.is_contiguous()
        torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.2)
    with use_backend("cuda"):
        x = torch.randn(0, 40, dtype=torch.bfloat16, requires_grad=True)
        A, B = lora_A.requires_grad_(), lora_B.requires_grad_()
        lora_linear(x, weight, A, B, 0.5).sum().backward()
    assert x.grad.shape == (0, 40) and not A.grad.any() and not B.grad.any()


def test_rows_that_start_anywhere_are_copied():
    x = torch.randn(40, 61).bfloat16()
    for other in (x, x[:7], x.expand(2, 40, 61)[:, 0].T, x[:, ::2], x[:1].expand(9, 61)):
        copy = launcher._rows(other)
        assert torch.equal(copy, other) and copy.stride(0) % 8 == 0 and copy.stride(1) == 1
    aligned = torch.randn(9, 16).bfloat16()[:, 8:]
    assert launcher._rows(aligned) is aligned


def test_the_variant_fills_the_machine():
    processors = launcher._processors
    try:
        launcher._processors = lambda device: 132
        assert launcher._variant("sm90", 16384, 4096, False, None) == {"block_n": 256, "cluster": 1}
        assert launcher._variant("sm90", 16384, 128, False, None) == {"block_n": 128, "cluster": 1}
        assert launcher._variant("sm90", 64, 4096, False, None) == {"block_n": 128, "cluster": 1}
        assert launcher._variant("sm90", 64, 64, True, None) == {"block_n": 256, "cluster": 1}
        assert launcher._variant("sm80", 16384, 4096, False, None) == {"block_n": 128, "cluster": 1}
    finally:
        launcher._processors = processors


def test_what_the_launchers_refuse(shim):
    x = torch.zeros(8, 16).bfloat16()
    sums = torch.zeros(16, 8)
    pair = dict(form="nn", p=x, sums=launcher._matrix(sums), slab_steps=2)
    pairs = (
        dict(slab_steps=3), dict(slab_steps=0), dict(slab_steps=2, variant=(128, 2)), dict(variant=(256, 1)),
        dict(form="nt"), dict(form="tn"), dict(sizes=(7, 7, 16, 3)), dict(dropout=(x.data_ptr(), 5, 1.0)),
        dict(p=None), dict(sums=(sums.data_ptr(), 7, 1)),
    )  # fmt: skip
    good = dict(form="nt", x=x, w=x, sizes=(7, 7, 16, 0), dropout=(0, 0, 1.0), variant=(128, 1))
    for changes in (
        dict(x=torch.zeros(7, 17).bfloat16()),
        dict(w=torch.zeros(130).bfloat16()[1:129].view(8, 16)),
        dict(sizes=(0, 7, 16, 0)),
        dict(sizes=(7, 7, 0, 0)),
        dict(variant=(192, 1)),
        dict(variant=(128, 2)),
        dict(dropout=(x.data_ptr(), 5, 1.0)),  # no low-rank segment to drop from
        dict(form="tn", slab_steps=0),
        dict(sizes=(7, 2**31 - 1, 16, 0)),
        *({**pair, **c} for c in pairs),
    ):
        case = {**good, **changes}
        with pytest.raises(RuntimeError, match="cudaError (1|9): $"):
            shim.two_segment(
                shim.kernel, case["form"], launcher._matrix(x), launcher._matrix(case.get("p")), (0, 0, 0),
                launcher._matrix(case["x"]), launcher._matrix(case["w"]), 0, case["sizes"], "bfloat16",
                "bfloat16", 1.0, case["dropout"], case.get("slab_steps", 1), *case["variant"],
                case.get("sums", (0, 0, 0)), 0, 0,
            )  # fmt: skip


def test_reasons_in_words(shim, monkeypatch):
    x, weight = torch.zeros(4, 8), torch.zeros(8, 8)
    arguments = (weight, None, None, 1.0, None, 0.0, None)
    assert "bfloat16 or float16, got torch.float32" in launcher.why_not_forward(x, *arguments)
    assert launcher.why_not_forward(x.bfloat16(), *arguments) is None
    assert "at least one feature" in launcher.why_not_forward(x.half(), weight[:0], *arguments[1:])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or newer, got 7.5" in launcher.why_not_forward(x.half(), *arguments)


def test_without_a_gpu_the_backend_says_so():
    x, weight = torch.zeros(4, 8).bfloat16(), torch.zeros(8, 8).bfloat16()
    assert launcher.why_not_forward(x, weight, None, None, 1.0, None, 0.0, None) is not None


def test_the_program_for_gpus_finds_what_is_wrong(shim, monkeypatch):
    """gemm_program.py's checks, on the model."""
    monkeypatch.setattr(gemm_program, "DEVICE", "cpu")
    for name in ("_kernel", "_variant"):
        monkeypatch.setattr(launcher, name, getattr(launcher, name))  # it replaces them
    variant = VARIANTS[shim.kernel][-1]
    gemm_program.product(shim.kernel, variant, "nt", (7, 72, 40, 3), torch.float16)
    if shim.kernel == "sm90":
        gemm_program.product(shim.kernel, variant, "nn", (9, 40, 70, 3), torch.float16)
    gemm_program.product(shim.kernel, (variant[0], 1), "nn", (7, 72, 40, 3), torch.bfloat16, 0.3)
    gemm_program.layer(9, 24, 40, 4, torch.bfloat16, torch.float32)
    if shim.kernel == "sm90":
        monkeypatch.setattr(launcher, "PAIR", 0)  # it sets that, too
        gemm_program.pair(2, (130, 40, 3), torch.bfloat16)
        gemm_program.pair(1, (9, 70, 3), torch.float16)
        gemm_program.pair_layer(2, 9, 24, 40, 4)
        assert sum("+tn" in str(launch[1]) for launch in shim.launches) == 7
    gemm_program.dropout_layer(0.3, (20, 24, 40, 4))
    product = launcher._product
    monkeypatch.setattr(launcher, "_product", lambda *a, **k: product(*a, **k).mul_(1.02))
    with pytest.raises(AssertionError):
        gemm_program.product(shim.kernel, variant, "nt", (7, 72, 40, 3), torch.float16)


# ---- What nvcc makes of it ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nvcc():
    found = cuda_build.find_nvcc()
    if found is None:
        pytest.skip("no nvcc on this machine")
    return found


def test_files_are_compiled_for_what_they_can_run_on():
    archs = cuda_build.source_archs
    sm90, sm80, other = (Path(f"{name}.cu") for name in ("a_sm90", "a_sm80", "a"))
    assert archs(sm90, ["80", "90", "120"]) == ["90a"] == archs(sm90, ["90a"])
    assert archs(sm90, ["80", "100"]) == [] == archs(sm80, ["75"])
    assert archs(sm80, ["75", "80", "90a"]) == ["80", "90a"]
    assert archs(other, ["75", "90"]) == ["75", "90"]


def test_sm90_registers_and_machine_code(nvcc, tmp_path):
    """The kernels use their full share of registers without spills, and wgmma and TMA. No wgmma is serialised."""
    if "90" not in cuda_build.archs(nvcc):
        pytest.skip("this nvcc does not know sm_90a")
    cubin = tmp_path / "kernels.cubin"
    report = cuda_build.run(
        nvcc, *cuda_build.COMPILE_FLAGS, "-arch=sm_90a", "-Xptxas=-v,-warn-spills,-warn-lmem-usage",
        "-cubin", CSRC / "two_segment_sm90.cu", "-o", cubin,
    )  # fmt: skip
    used = re.findall(r"Used (\d+) registers", report)
    # setmaxnreg redistributes exactly these. With fewer at the launch, the consumers would wait for ever.
    assert used == ["168"] * 20, report
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", report)
    assert frames == [("0", "0", "0")] * 20, report
    assert "serialized" not in report and "setmaxnreg" not in report, report
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    for kernel in sass.split("Function : ")[1:]:
        name = kernel.split("\n")[0]
        assert re.search(r"HGMMA\.64x(128|256)x16\.F32", kernel) and "UTMALDG.2D" in kernel, name
        assert ("UTMASTG.2D" in kernel) != ("Form2" in name or "FormE2" in name), name
        assert ("UTMALDG.2D.MULTICAST" in kernel) == ("ELi2E" in name), name
        assert not re.search(r"\b(STL|LDL)\b", kernel), name
