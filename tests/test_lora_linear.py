"""lora_linear against fp64, hostile inputs, and what autograd and torch.compile do with it.

test_reliability.py explains the numbers of cases.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check_against_fp64, eager_lora_linear, operands, results
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from relora_kernels import FusedReLoRaLinear, lora_linear
from relora_kernels.reference import lora_linear as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 8, 24, 100, 128])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients(dtype, r, bias, device):
    check_against_fp64(operands(96, 136, 104, r, dtype, device=device, bias=bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_masters_get_float32_gradients(dtype, device):
    tensors = operands(64, 96, 80, 16, dtype, lora_dtype=torch.float32, device=device)
    check_against_fp64(tensors)
    y = lora_linear(*tensors[:4], 0.25, tensors[4])
    y.sum().backward()
    assert y.dtype == dtype and tensors[2].grad.dtype == tensors[3].grad.dtype == torch.float32
    # Summed in float32: a gradient rounded to 16 bits on the way would not change when rounded again.
    assert (tensors[2].grad != tensors[2].grad.to(dtype)).any()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.sampled_from([1, 2, 3, 7, 17, 31, 64, 65]),
    st.sampled_from([1, 2, 5, 16, 33, 63, 64]), st.integers(1, 40), st.sampled_from(DTYPES),
)  # fmt: skip
def test_drawn_shapes(rows, in_features, out_features, r, dtype):
    check_against_fp64(operands(rows, in_features, out_features, r, dtype))


def test_odd_pitch_of_the_papers_largest_model_case13(device):
    check_against_fp64(operands(8, 5461, 64, 16, torch.float32, device=device))
    check_against_fp64(operands(8, 64, 5461, 16, torch.bfloat16, device=device))


def test_gradcheck():
    x, weight, lora_A, lora_B, bias = operands(6, 10, 8, 3, torch.float64)
    for p in (0.0, 0.3):
        torch.autograd.gradcheck(
            lambda *t: lora_linear(t[0], weight, t[1], t[2], 0.5, t[3], p, 11),
            (x, lora_A, lora_B, bias),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_opcheck(dtype, p, device):
    x, weight, lora_A, lora_B, bias = (
        t.detach() for t in operands(8, 16, 24, 4, dtype, torch.float32, device)
    )
    seed = torch.tensor(3, device=device) if p else None
    ops = torch.ops.relora_kernels
    torch.library.opcheck(
        ops._lora_linear_forward.default, (x, weight, lora_A, lora_B, 0.5, bias, p, seed)
    )
    y, low = ops._lora_linear_forward(x, weight, lora_A, lora_B, 0.5, bias, p, seed)
    for needs in [(True,) * 4, (True, False, False, False), (False, True, False, True)]:
        torch.library.opcheck(
            ops._lora_linear_backward.default,
            (torch.randn_like(y), x, weight, lora_A, lora_B, low, 0.5, p, seed, *needs),
        )


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compiled_equals_eager(p, device):
    x, weight, lora_A, lora_B, bias = operands(24, 32, 40, 8, torch.float32, device=device)
    compiled = torch.compile(lora_linear, fullgraph=True)
    for rows in (24, 17):  # another batch size must not break the graph either
        args = (x[:rows], weight, lora_A, lora_B, 0.25, bias, p, 5)
        for a, b in zip(
            torch.autograd.grad(lora_linear(*args).square().sum(), (x, lora_A, lora_B, bias)),
            torch.autograd.grad(compiled(*args).square().sum(), (x, lora_A, lora_B, bias)),
        ):
            torch.testing.assert_close(a, b)


def test_compiled_layer_draws_a_fresh_mask_each_call(device):
    layer = FusedReLoRaLinear(64, 64, r=8, lora_dropout=0.5, device=device)
    layer.lora_B.data.normal_()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(16, 64, device=device)
    assert not torch.equal(compiled(x), compiled(x))


class TestDropout:
    def test_equals_the_formula_with_the_masked_input(self, device):
        x, weight, lora_A, lora_B, bias = operands(33, 20, 12, 5, torch.float64, device=device)
        mask = reference.dropout_mask(x, 0.4, 9)
        y = lora_linear(x, weight, lora_A, lora_B, 0.5, bias, 0.4, 9)
        low = torch.nn.functional.linear(x * mask, lora_A) @ lora_B.T
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias) + 0.5 * low)

    def test_rate_and_expectation(self):
        mask = reference.dropout_mask(torch.empty(512, 512), 0.1, 1)
        dropped = (mask == 0).double().mean().item()
        assert abs(dropped - 0.1) < 4 * (0.09 / 512**2) ** 0.5
        assert mask.max().item() == pytest.approx(1 / 0.9, rel=1e-4)

    def test_the_mask_belongs_to_the_element(self):
        whole = reference.dropout_mask(torch.empty(12, 40), 0.5, 4)
        assert torch.equal(reference.dropout_mask(torch.empty(5, 40), 0.5, 4), whole[:5])

    def test_seed_none_follows_torch_generator(self, device):
        tensors = operands(16, 32, 24, 4, torch.float32, device=device)

        def draw():
            return lora_linear(*tensors[:4], 1.0, None, 0.5)

        torch.manual_seed(3)
        first, second = draw(), draw()
        torch.manual_seed(3)
        assert torch.equal(first, draw()) and torch.equal(second, draw())
        assert not torch.equal(first, second)

    def test_all_dropped_leaves_the_frozen_part(self, device):
        x, weight, lora_A, lora_B, _ = operands(4, 8, 6, 2, torch.float32, device=device)
        y = lora_linear(x, weight, lora_A, lora_B, 1.0, None, 1.0, 0)
        torch.testing.assert_close(y, x @ weight.T)
        y.sum().backward()
        assert not lora_A.grad.any() and not lora_B.grad.any()
        torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (2, 3, 4, 16)])
def test_any_number_of_dimensions_case3(shape, device):
    _, weight, lora_A, lora_B, bias = operands(1, 16, 12, 4, torch.float64, device=device)
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    y = lora_linear(x, weight, lora_A, lora_B, 0.5, bias)
    torch.testing.assert_close(y, eager_lora_linear(x, weight, lora_A, lora_B, 0.5, bias))
    y.square().sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_zero_rows_case2(shape, device):
    _, weight, lora_A, lora_B, bias = operands(1, 16, 12, 4, torch.float32, device=device)
    x = torch.empty(shape, device=device, requires_grad=True)
    y = lora_linear(x, weight, lora_A, lora_B, 0.5, bias)
    assert y.shape == (*shape[:-1], 12)
    y.sum().backward()
    assert x.grad.shape == shape
    for t in (lora_A, lora_B, bias):
        assert t.grad.shape == t.shape and not t.grad.any()


def test_strided_x_and_gradient_cases_10_11(device):
    x, weight, lora_A, lora_B, bias = operands(12, 16, 10, 4, torch.float64, device=device)
    views = [
        torch.randn(16, 12, dtype=torch.float64, device=device).T,
        torch.randn(12, 32, dtype=torch.float64, device=device)[:, ::2],
        torch.randn(16, dtype=torch.float64, device=device).expand(12, 16),
        torch.randn(12 * 16 + 1, dtype=torch.float64, device=device)[1:].view(12, 16),
    ]
    for view in views:
        for reduce in (lambda y: y.sum(), lambda y: y.T.contiguous().T.square().sum()):
            view = view.detach().requires_grad_()
            plain = view.detach().clone().requires_grad_()
            got = torch.autograd.grad(
                reduce(lora_linear(view, weight, lora_A, lora_B, 0.5, bias)), (view, lora_A, lora_B)
            )
            want = torch.autograd.grad(
                reduce(eager_lora_linear(plain, weight, lora_A, lora_B, 0.5, bias)),
                (plain, lora_A, lora_B),
            )
            for a, b in zip(got, want):
                torch.testing.assert_close(a, b)


def test_nan_and_inf_propagate_case16(device):
    x, weight, lora_A, lora_B, _ = operands(4, 8, 6, 2, torch.float32, device=device)
    x = x.detach().clone()
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    y = lora_linear(x, weight, lora_A, lora_B, 0.5)
    assert y[1].isnan().all() and not y[2].isfinite().any() and y[[0, 3]].isfinite().all()


def test_double_backward_fails_plainly_case17():
    x, weight, lora_A, lora_B, _ = operands(4, 8, 6, 2, torch.float64)
    (dx,) = torch.autograd.grad(
        lora_linear(x, weight, lora_A, lora_B, 0.5).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("victim", ["x", "weight", "lora_A", "lora_B"])
def test_in_place_edit_of_a_saved_tensor_case18(victim):
    args = {k: v.detach() for k, v in good().items() if k in ("x", "weight", "lora_A", "lora_B")}
    leaf = torch.zeros(2, 8, requires_grad=True)
    args["lora_A"] = args["lora_A"] + leaf
    y = lora_linear(**args, scaling=0.5)
    with torch.no_grad():
        args[victim].add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


def test_no_grad_and_inference_mode_case19(device):
    x, weight, lora_A, lora_B, bias = operands(4, 8, 6, 2, torch.float32, device=device)
    expected = eager_lora_linear(x, weight, lora_A, lora_B, 0.5, bias).detach()
    with torch.no_grad():
        y = lora_linear(x, weight, lora_A, lora_B, 0.5, bias)
    with torch.inference_mode():
        z = lora_linear(x, weight, lora_A, lora_B, 0.5, bias)
    assert not y.requires_grad and z.is_inference()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(z.clone(), expected)


def test_only_needed_gradients_are_given(device):
    x, weight, lora_A, lora_B, bias = operands(4, 8, 6, 2, torch.float32, device=device)
    for wanted in ([x], [lora_A], [lora_B], [bias], [x, bias]):
        leaves = {
            k: v.detach().requires_grad_(any(v is w for w in wanted))
            for k, v in {"x": x, "A": lora_A, "B": lora_B, "b": bias}.items()
        }
        y = lora_linear(leaves["x"], weight, leaves["A"], leaves["B"], 0.5, leaves["b"])
        y.sum().backward()
        for leaf in leaves.values():
            assert (leaf.grad is not None) == leaf.requires_grad


def test_gradients_are_bitwise_repeatable(device):
    tensors = operands(64, 96, 80, 16, torch.bfloat16, torch.float32, device)
    dy = torch.randn(64, 80, device=device).bfloat16()
    for a, b in zip(results(lora_linear, tensors, dy), results(lora_linear, tensors, dy)):
        assert torch.equal(a, b)


def test_autocast_matches_linear(device):
    x, weight, lora_A, lora_B, bias = operands(16, 32, 24, 4, torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = lora_linear(x, weight, lora_A, lora_B, 0.5, bias)
        compiled = torch.compile(lora_linear, fullgraph=True)(x, weight, lora_A, lora_B, 0.5, bias)
        assert y.dtype == torch.nn.functional.linear(x, weight, bias).dtype == torch.bfloat16
    assert torch.equal(y, compiled)
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, lora_A, lora_B, bias))
    with torch.autocast(device, dtype=torch.bfloat16):
        doubles = [t.detach().double() for t in (x, weight, lora_A, lora_B)]
        assert lora_linear(*doubles, 0.5).dtype == torch.float64


def test_gradient_checkpointing_replays_the_same_mask(device):
    x, weight, lora_A, lora_B, bias = operands(16, 32, 24, 4, torch.float64, device=device)

    leaves = (x, lora_A, lora_B, bias)

    def gradients(function):
        torch.manual_seed(5)
        for leaf in leaves:
            leaf.grad = None
        function(x, weight, lora_A, lora_B, 0.5, bias, 0.5).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    plain = gradients(lora_linear)
    for reentrant in (False, True):
        checkpointed = functools.partial(checkpoint, lora_linear, use_reentrant=reentrant)
        for a, b in zip(plain, gradients(checkpointed)):
            assert torch.equal(a, b)


def good():
    x, weight, lora_A, lora_B, bias = (t.detach() for t in operands(4, 8, 6, 2, torch.float32))
    return {
        "x": x,
        "weight": weight,
        "lora_A": lora_A,
        "lora_B": lora_B,
        "scaling": 0.5,
        "bias": bias,
    }


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"x": torch.zeros(4, 9)}, ValueError, r"in = 8.*got x \(4, 9\)"),  # case 1
        ({"x": torch.zeros(())}, ValueError, "got x"),
        ({"lora_A": torch.zeros(0, 8), "lora_B": torch.zeros(6, 0)}, ValueError, "r >= 1"),  # case 4
        ({"lora_A": torch.zeros(2, 7)}, ValueError, r"\(r, 8\).*got \(2, 7\)"),
        ({"lora_B": torch.zeros(6, 3)}, ValueError, r"\(6, 2\), got \(6, 3\)"),
        ({"weight": torch.zeros(8)}, ValueError, r"weight \(out, in\), got shape \(8,\)"),
        ({"weight": torch.zeros(6, 8).bfloat16()}, TypeError, "weight torch.bfloat16.*autocast"),  # case 5
        ({"lora_A": torch.zeros(2, 8).half()}, TypeError, "one dtype"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias \(6,\), got \(5,\)"),
        ({"bias": torch.zeros(6).half()}, TypeError, "bias"),
        ({"x": torch.zeros(4, 8).int()}, TypeError, "got .*int32"),  # case 6
        ({"x": torch.zeros(4, 8).to(torch.float8_e4m3fn)}, TypeError, "float8"),
        ({"x": torch.zeros(4, 8).cfloat()}, TypeError, "complex64"),
        ({"x": [[0.0] * 8]}, TypeError, "tensor, got list"),
        ({"x": torch.zeros(4, 8, device="meta")}, ValueError, "one device.*x on meta"),  # cases 7, 8
        ({"weight": torch.zeros(6, 8, requires_grad=True)}, ValueError, "requires_grad_"),
        ({"scaling": float("nan")}, ValueError, "finite scaling"),
        ({"scaling": "1"}, TypeError, "scaling to be a number"),
        ({"dropout_p": 1.5}, ValueError, "0 <= dropout_p <= 1, got 1.5"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p"),
        ({"dropout_p": 0.5, "seed": 2**63}, ValueError, "int64"),
        ({"dropout_p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "one int64"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(changes, error, says):
    with pytest.raises(error, match=says):
        lora_linear(**{**good(), **changes})


def test_low_rank_larger_than_the_layer_works_case4():
    check_against_fp64(operands(5, 6, 4, 9, torch.float32))


def test_dtensor_is_refused_by_name_case20(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        args = good()
        args["lora_A"] = distribute_tensor(args["lora_A"], mesh)
        with pytest.raises(TypeError, match="lora_A.*DTensor"):
            lora_linear(**args)
    finally:
        dist.destroy_process_group()


def test_almost_all_dropped_is_all_dropped():
    x, weight, lora_A, lora_B, _ = operands(4, 8, 6, 2, torch.float32)
    y = lora_linear(x, weight, lora_A, lora_B, 1.0, None, 0.999999, 3)
    assert torch.equal(y, lora_linear(x, weight, lora_A, lora_B, 1.0, None, 1.0, 3))


def test_compiled_under_autocast_has_eager_dtypes_inside(device):
    """Low-rank products of a float32 master under autocast: eager and compiled agree bit for bit."""
    x, weight, lora_A, lora_B, bias = operands(
        64, 96, 80, 16, torch.bfloat16, torch.float32, device
    )
    y = [t.detach() for t in (x, weight, lora_A, lora_B, bias)]
    with torch.autocast(device, dtype=torch.float16):
        op = torch.ops.relora_kernels._lora_linear_forward
        inside = op(*y[:4], 0.5, y[4], 0.0, None)
    outside = torch.ops.relora_kernels._lora_linear_forward(*y[:4], 0.5, y[4], 0.0, None)
    assert inside[0].dtype == outside[0].dtype == torch.bfloat16
    assert torch.equal(inside[0], outside[0])


def test_flops_are_counted():
    """Twice the products' multiplications: W, A and B forward; dx, Q, dA and dB backward."""
    M, K, N, r = 6, 16, 8, 4
    x, weight, lora_A, lora_B, bias = operands(M, K, N, r, torch.float32)
    with FlopCounterMode(display=False) as forward:
        y = lora_linear(x, weight, lora_A, lora_B, 0.5, bias)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * M * (N * K + r * K + N * r)
    assert backward.get_total_flops() == 2 * M * (N * K + 2 * r * K + 2 * N * r)
    with FlopCounterMode(display=False) as factors_only:
        y = lora_linear(x.detach(), weight, lora_A, lora_B, 0.5)
        y.sum().backward()
    assert factors_only.get_total_flops() == 2 * M * (N * K + 2 * r * K + 3 * N * r)
