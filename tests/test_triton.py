"""The Triton kernels of lora_linear: on a CPU in Triton's interpreter, on a GPU compiled.

test_merge.py runs the merge kernel; test_triton_compile.py compiles all of them for every target.
"""

import mmap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check_against_fp64, operands, results

from relora_kernels import FusedReLoRaLinear, backend, lora_linear, prune_, use_backend
from relora_kernels.ops import lora_linear as linear_op
from relora_kernels.reference import lora_linear as reference

if backend.triton_missing() is not None:
    pytest.skip(backend.triton_missing(), allow_module_level=True)

import interpreter  # noqa: E402

from relora_kernels._triton import lora_linear as kernels  # noqa: E402
from relora_kernels._triton import lora_linear_tma as tma  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _on_triton():
    with use_backend("triton"):
        yield


@pytest.fixture
def nan_filled(monkeypatch):
    """What a kernel does not write stays NaN and is found."""
    new_empty = torch.Tensor.new_empty

    def filled(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


class TestInterpretedBfloat16:
    """The test helper that teaches the interpreter bfloat16."""

    def test_every_pattern_widens_and_narrows_as_torch_does(self):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
        wide = bits.view(torch.bfloat16).float()
        assert torch.equal(
            torch.from_numpy(interpreter.widen(bits.numpy().view("uint16"))).view(torch.int32),
            wide.view(torch.int32),
        )
        steps = torch.tensor([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
        values = (wide.view(torch.int32)[:, None] | steps).view(torch.float32).flatten()
        narrowed = interpreter.narrow(values.numpy()).view("int16")
        got, want = torch.from_numpy(narrowed).view(torch.bfloat16), values.bfloat16()
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got[~got.isnan()], want[~want.isnan()])

    @pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter is for CPUs")
    def test_the_interpreter_is_wrong_without_it_and_right_with_it(self):
        a, b = torch.randn(8, 16).bfloat16(), torch.randn(8, 16).bfloat16()
        got = kernels._low_rank(a, b, True, 1.0, 0.0, None)
        torch.testing.assert_close(got, (a.float() @ b.float().T).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 8, 24, 100, 128, 256, 512])
def test_forward_and_gradients(dtype, r, nan_filled):
    check_against_fp64(operands(150, 136, 264, r, dtype, torch.float32, DEVICE, bias=r % 16 == 0))


@pytest.mark.parametrize("lora_dtype", [torch.bfloat16, torch.float32])
def test_gradients_come_in_the_parameters_dtype(lora_dtype):
    check_against_fp64(operands(70, 96, 80, 16, torch.bfloat16, lora_dtype, DEVICE))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([1, 2, 15, 16, 17, 31, 129]), st.sampled_from([1, 3, 31, 32, 33, 67, 128]),
    st.sampled_from([1, 2, 64, 65, 127, 131, 257]), st.sampled_from([1, 3, 16, 33]),
    st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip
def test_drawn_shapes(rows, in_features, out_features, r, dtype, bias):
    torch.manual_seed(rows + in_features)
    check_against_fp64(
        operands(rows, in_features, out_features, r, dtype, torch.float32, DEVICE, bias)
    )


def test_odd_pitch_of_the_papers_largest_model_case13():
    check_against_fp64(operands(5, 5461, 40, 16, torch.bfloat16, device=DEVICE))
    check_against_fp64(operands(5, 40, 5461, 16, torch.float16, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_is_the_references_mask(dtype, p, nan_filled):
    tensors = operands(140, 72, 50, 20, dtype, torch.float32, DEVICE)

    def ours(x, weight, lora_A, lora_B, scaling, bias):
        return lora_linear(x, weight, lora_A, lora_B, scaling, bias, p, seed=-77)

    def eager(x, weight, lora_A, lora_B, scaling, bias):
        dropped = x * reference.dropout_mask(x, p, -77)
        low = F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))
        return F.linear(x, weight, bias.to(x.dtype)) + scaling * low

    check_against_fp64(tensors, ours=ours, eager=eager)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_misaligned_and_expanded_operands_cases_10_11_12(dtype):
    _, weight, lora_A, lora_B, bias = operands(1, 40, 48, 6, dtype, device=DEVICE)
    like = {"device": DEVICE}
    for view in (
        torch.randn(40, 37, **like).to(dtype).T,
        torch.randn(37, 80, **like).to(dtype)[:, ::2],
        torch.randn(40, **like).to(dtype).expand(37, 40),
        torch.randn(37 * 40 + 3, **like).to(dtype)[3:].view(37, 40),
    ):
        for dy in (
            None,
            torch.ones((), **like).to(dtype).expand(37, 48),
            torch.randn(48, 37, **like).to(dtype).T,
            torch.randn(48, **like).to(dtype).expand(37, 48),
        ):
            x = view.detach().requires_grad_()
            check_against_fp64((x, weight, lora_A, lora_B, bias), dy=dy)
    transposed = weight.T.contiguous().T
    check_against_fp64((x, transposed, lora_A, lora_B, bias))


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 3, 16)])
def test_shapes_of_x_cases_2_3(shape):
    _, weight, lora_A, lora_B, bias = operands(1, 16, 12, 4, torch.float32, device=DEVICE)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    y = lora_linear(x, weight, lora_A, lora_B, 0.5, bias)
    assert y.shape == (*shape[:-1], 12)
    y.sum().backward()
    assert x.grad.shape == shape and lora_A.grad.shape == (4, 16) and not lora_A.grad.isnan().any()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, x[..., 0].numel()))


def test_nan_and_inf_propagate_case16():
    x, weight, lora_A, lora_B, _ = operands(4, 8, 6, 2, torch.float32, device=DEVICE)
    x = x.detach().clone()
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    y = lora_linear(x, weight, lora_A, lora_B, 0.5)
    assert y[1].isnan().all() and not y[2].isfinite().any() and y[[0, 3]].isfinite().all()


def test_gradients_are_bitwise_repeatable():
    tensors = operands(700, 96, 80, 16, torch.bfloat16, torch.float32, DEVICE)
    dy = torch.randn(700, 80, device=DEVICE).bfloat16()
    for a, b in zip(results(lora_linear, tensors, dy), results(lora_linear, tensors, dy)):
        assert torch.equal(a, b)


def test_only_needed_gradients_are_computed():
    x, weight, lora_A, lora_B, bias = operands(4, 8, 6, 2, torch.float32, device=DEVICE)
    want = torch.autograd.grad(lora_linear(x, weight, lora_A, lora_B, 0.5, bias).sum(), [bias])
    assert torch.equal(want[0], torch.full_like(bias, 4.0))
    y = lora_linear(x.detach(), weight, lora_A, lora_B, 0.5, bias.detach())
    y.sum().backward()
    assert x.grad is None and lora_A.grad is not None and bias.grad is None


@pytest.mark.skipif(DEVICE != "cpu", reason="reserves memory that a GPU would have to commit")
def test_rows_more_than_two_to_the_31_elements_apart_case14():
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, unnamed until 3.12
    pitch = 2**31 + 8
    memory = mmap.mmap(-1, 2 * (pitch + 64), flags=flags)
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided((2, 48), (pitch, 1))
    near = torch.randn(2, 48).half()
    far.copy_(near)
    _, weight, lora_A, lora_B, _ = operands(1, 48, 20, 4, torch.float16)
    y = lora_linear(far, weight, lora_A, lora_B, 0.5, None, 0.25, 3)
    assert torch.equal(y, lora_linear(near, weight, lora_A, lora_B, 0.5, None, 0.25, 3))
    y.sum().backward()
    got, lora_A.grad = lora_A.grad, None
    lora_linear(near, weight, lora_A, lora_B, 0.5, None, 0.25, 3).sum().backward()
    assert torch.equal(got, lora_A.grad)


def test_layer_and_compile():
    layer = FusedReLoRaLinear(32, 24, r=4, lora_dropout=0.1, device=DEVICE)
    layer.lora_B.data.normal_()
    x = torch.randn(5, 32, device=DEVICE)
    torch.compile(layer, fullgraph=True)(x).sum().backward()
    assert layer.lora_A.grad.any() and layer.lora_B.grad.any()


@pytest.mark.parametrize("name", ["triton", "triton_tma"])
@pytest.mark.parametrize("shape", [(70, 48, 33), (3, 67, 41)])
def test_main_loop_is_the_product_with_w_alone(name, shape, nan_filled):
    if name == "triton_tma" and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    M, K, N = shape
    x, weight = torch.randn(M, K, device=DEVICE).half(), torch.randn(N, K, device=DEVICE).half()
    with use_backend(name):
        y = linear_op.IMPLEMENTATIONS[name].main_loop(x, weight)
    torch.testing.assert_close(y, (x.float() @ weight.float().T).half(), rtol=2**-9, atol=1e-3)


def test_float64_is_refused_by_name():
    x, weight, lora_A, lora_B, _ = operands(4, 8, 6, 2, torch.float64)
    with pytest.raises(backend.BackendUnavailable, match="float64"):
        lora_linear(x, weight, lora_A, lora_B, 0.5)


@pytest.mark.parametrize("backend_name", ["triton", "triton_tma"])
@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 8, 0), (0, 8, 5), (0, 0, 0)])
def test_gradients_without_rows_or_columns(backend_name, shape, nan_filled):
    rows, in_features, out_features = shape
    tensors = operands(rows, in_features or 1, out_features, 2, torch.float16, device=DEVICE)
    x, weight, lora_A, lora_B, bias = tensors
    if in_features == 0:
        x, weight, lora_A = (t.detach()[:, :0].requires_grad_(t is not weight) for t in tensors[:3])
    with use_backend(backend_name):
        y = lora_linear(x, weight, lora_A, lora_B, 0.5, bias, 0.5, 1)
        y.sum().backward()
    torch.testing.assert_close(y, bias.expand(rows, -1) if in_features == 0 else y.nan_to_num())
    for t in (x, lora_A, lora_B, bias):
        assert t.grad.shape == t.shape and t.grad.isfinite().all()


@pytest.mark.parametrize("r", [1, 8, 24, 100, 128])
def test_small_ranks_do_not_narrow_the_loads_of_x_and_weight(r):
    """One loop loads both segments; Triton treats a pitch as aligned if 16 divides it."""
    pitches = []

    def recorded(p, b, *rest):
        pitches.extend([p.stride(0), p.shape[1], b.shape[1 if rest[2] else 0]])
        return kernels._two_segment(p, b, *rest)

    x, weight, lora_A, lora_B, _ = operands(70, 48, 32, r, torch.float16, device=DEVICE)
    arguments = (x, weight, lora_A, lora_B)
    _, p = kernels.forward(*arguments, 1.0, None, 0.0, None, two_segment=recorded)
    dy = torch.ones(70, 32, device=DEVICE).half()
    needs = (True,) * 4
    kernels.backward(dy, *arguments, p, 1.0, 0.0, None, *needs, two_segment=recorded)
    assert p.shape == (70, r) and p.is_contiguous()
    assert pitches and all(n % 16 == 0 for n in pitches), pitches


def test_tiles_of_what_cannot_be_loaded_sixteen_bytes_at_a_time(monkeypatch):
    odd, config = [], kernels.two_segment_config

    def recorded(M, dropout_p, x, is_odd):
        odd.append(is_odd)
        return config(M, dropout_p, x, is_odd)

    monkeypatch.setattr(kernels, "two_segment_config", recorded)
    for in_features, out_features, want in (
        (48, 32, [False, False]),
        (5461, 32, [True, True]),
        (48, 41, [False, True]),  # y's rows are N (41) long, dx's loop goes over them
    ):
        x, weight, lora_A, lora_B, _ = operands(
            70, in_features, out_features, 16, torch.bfloat16, device=DEVICE
        )
        odd.clear()
        lora_linear(x, weight, lora_A, lora_B, 1.0).sum().backward()
        assert odd == want, (in_features, out_features)
    for dtype in DTYPES:
        x = torch.empty(1, dtype=dtype, device=DEVICE)
        assert config(128, 0.0, x, True)["BLOCK_N"] < 256


@pytest.mark.skipif(DEVICE != "cuda", reason="a CPU waits for nothing")
def test_nothing_waits_for_the_device():
    tensors = operands(64, 64, 64, 8, torch.bfloat16, device=DEVICE)
    moments = [torch.randn(1000, device=DEVICE), torch.randn(77, device=DEVICE)]

    def step():
        lora_linear(*tensors[:4], 1.0, tensors[4], 0.25, 5).sum().backward()
        prune_([t.clone() for t in moments], 0.9)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class TestTma:
    """The two-segment product with tiles fetched by TMA: a backend of its own."""

    @pytest.fixture(autouse=True)
    def _on_tma(self):
        if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("TMA needs compute capability 9.0")
        with use_backend("triton_tma"):
            yield

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    @pytest.mark.parametrize("r", [1, 24, 128])
    def test_forward_and_gradients(self, dtype, r, nan_filled):
        check_against_fp64(operands(150, 136, 264, r, dtype, torch.float32, DEVICE, bias=r > 1))

    @settings(deadline=None, max_examples=15)
    @given(
        st.sampled_from([1, 15, 64, 65, 129]), st.sampled_from([1, 3, 32, 67, 128]),
        st.sampled_from([1, 2, 65, 131, 257]), st.sampled_from([1, 3, 16, 33]),
        st.sampled_from(DTYPES[1:]), st.booleans(),
    )  # fmt: skip
    def test_drawn_shapes(self, rows, in_features, out_features, r, dtype, bias):
        torch.manual_seed(rows + in_features)
        check_against_fp64(
            operands(rows, in_features, out_features, r, dtype, torch.float32, DEVICE, bias)
        )

    @pytest.mark.parametrize("p", [0.3, 1.0])
    def test_dropout_is_the_portable_kernels(self, p, nan_filled):
        tensors = operands(140, 72, 50, 20, torch.bfloat16, torch.float32, DEVICE)
        dy = torch.randn(140, 50, device=DEVICE).bfloat16()

        def dropped(x, weight, lora_A, lora_B, scaling, bias):
            return lora_linear(x, weight, lora_A, lora_B, scaling, bias, p, seed=-77)

        ours = results(dropped, tensors, dy)
        with use_backend("triton"):
            theirs = results(dropped, tensors, dy)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-3)

    def test_rows_that_tma_cannot_address_are_copied_cases_10_11_12(self):
        _, weight, lora_A, lora_B, bias = operands(1, 40, 48, 6, torch.bfloat16, device=DEVICE)
        for view in (
            torch.randn(37 * 40 + 3, device=DEVICE).bfloat16()[3:].view(37, 40),
            torch.randn(37, 41, device=DEVICE).bfloat16()[:, 1:],
            torch.randn(40, device=DEVICE).bfloat16().expand(37, 40),
            torch.randn(40, 37, device=DEVICE).bfloat16().T,
        ):
            for dy in (None, torch.ones((), device=DEVICE).bfloat16().expand(37, 48)):
                x = view.detach().requires_grad_()
                check_against_fp64((x, weight, lora_A, lora_B, bias), dy=dy)

    def test_a_descriptor_never_has_overlapping_or_unaligned_rows_case11_12(self):
        row = torch.randn(40, device=DEVICE).half()
        unaligned = torch.randn(37 * 40 + 3, device=DEVICE).half()[3:].view(37, 40)
        odd = torch.randn(37, 41, device=DEVICE).half()
        for view in (row.expand(37, 40), unaligned, odd, row.expand(37, 40)[:0]):
            found = tma._described(view, [16, 16])
            assert found.strides[0] >= found.shape[1] and found.strides[0] * 2 % 16 == 0
            assert found.base.data_ptr() % 16 == 0
            if view.numel():
                assert torch.equal(found.base, view)

    def test_no_columns_and_no_rows(self):
        for rows, in_features in ((3, 0), (0, 8)):
            like = {"device": DEVICE, "dtype": torch.float16}
            x = torch.randn(rows, in_features, **like, requires_grad=True)
            weight, lora_A = (torch.randn(n, in_features, **like) for n in (5, 2))
            lora_B, bias = torch.randn(5, 2, **like), torch.randn(5, **like)
            y = lora_linear(x, weight, lora_A, lora_B, 0.5, bias)
            torch.testing.assert_close(y, bias.expand(rows, 5))
            y.sum().backward()
            assert x.grad.shape == x.shape

    @pytest.mark.skipif(DEVICE != "cpu", reason="refusals of a CPU")
    def test_serves_cpu_tensors_by_name_alone(self):
        with pytest.raises(backend.BackendUnavailable, match="float32"):
            lora_linear(*operands(2, 8, 8, 2, torch.float32)[:4], 1.0)
        x, weight, lora_A, lora_B, _ = operands(2, 8, 8, 2, torch.float16)
        arguments = (x, weight, lora_A, lora_B, 1.0, None, 0.0, None)
        assert linear_op.IMPLEMENTATIONS["triton_tma"].why_not_forward(*arguments) is None
        with use_backend("triton"):
            reason = linear_op.IMPLEMENTATIONS["triton_tma"].why_not_forward(*arguments)
        assert "on a CPU" in reason
