"""The tests' error bounds: against eager PyTorch in fp64, by the error of the same formula in the working dtype."""

import torch
import torch.nn.functional as F

from relora_kernels import lora_linear


def eager_lora_linear(x, weight, lora_A, lora_B, scaling, bias=None):
    """The plain formula in the given dtypes; A, B and bias are cast to x's dtype."""
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y + scaling * F.linear(F.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute error. Asserts that `actual` is finite exactly where `exact` is."""
    assert actual.shape == exact.shape, f"{actual.shape} instead of {exact.shape}"
    difference = (actual.double() - exact).abs()
    assert torch.equal(actual.isfinite(), exact.isfinite()), "not finite where the oracle is"
    return difference[exact.isfinite()].max().item() if exact.isfinite().any() else 0.0


def assert_as_good_as(actual, eager, exact, factor: float, work, magnitude=None) -> None:
    """error(actual) <= factor * error(eager), both against fp64 (FlashAttention's rule).

    With fewer than 1024 elements, eager can be exact by luck. Then the error that two roundings (of P or Q, and of
    the result) can cause in the largest sum is allowed on top. `magnitude`: the sums of the terms'
    absolute values, for cases in which cancellation may make `exact` small.
    """
    ours, theirs = error(actual, exact), error(eager, exact)
    sums = exact if magnitude is None else magnitude
    few = 0 < sums.numel() < 1024
    roundings = torch.finfo(work).eps * sums.abs().max().item() if few else 0.0
    assert ours <= factor * theirs + roundings, f"error {ours:.3g}, eager's {theirs:.3g}"


def operands(rows, in_features, out_features, r, dtype, lora_dtype=None, device="cpu", bias=True):
    """x (rows, in), weight, lora_A, lora_B, bias as leaves; all but weight require grad."""
    lora_dtype = lora_dtype or dtype

    def leaf(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()

    weight = leaf(out_features, in_features, scale=in_features**-0.5).detach()
    return (
        leaf(rows, in_features),
        weight,
        leaf(r, in_features, scale=in_features**-0.5, dtype=lora_dtype),
        leaf(out_features, r, scale=0.1, dtype=lora_dtype),
        leaf(out_features) if bias else None,
    )


def results(function, tensors, dy, scaling=0.25):
    """y and the gradients of x, lora_A, lora_B and bias."""
    x, weight, lora_A, lora_B, bias = tensors
    wanted = [t for t in (x, lora_A, lora_B, bias) if t is not None]
    y = function(x, weight, lora_A, lora_B, scaling, bias)
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def check_against_fp64(tensors, scaling=0.25, ours=lora_linear, eager=eager_lora_linear, dy=None):
    """Checks y and the gradients of `ours`, on the current backend, by the rule of assert_as_good_as."""
    x, weight = tensors[:2]
    if dy is None:
        dy = torch.randn(*x.shape[:-1], weight.shape[0], device=x.device).to(x.dtype)

    def in_double(change):
        # The oracle starts from the same inputs as the formula: A and B rounded to x's dtype.
        return [
            None
            if t is None
            else change(t.detach().to(x.dtype).double()).requires_grad_(t.requires_grad)
            for t in tensors
        ]

    exact = results(eager, in_double(lambda t: t), dy.double(), scaling)
    sums = results(eager, in_double(torch.abs), dy.double().abs(), scaling)
    got, usual = results(ours, tensors, dy, scaling), results(eager, tensors, dy, scaling)
    for i, (a, b, c, d) in enumerate(zip(got, usual, exact, sums)):
        assert a.dtype == b.dtype
        assert_as_good_as(a, b, c, 2 if i == 0 else 3, x.dtype, d)
