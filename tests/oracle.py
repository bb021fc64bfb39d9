"""The tests' measure: eager PyTorch in fp64, and how far the same formula strays in the working dtype."""

import torch
import torch.nn.functional as F


def eager_lora_linear(x, weight, lora_A, lora_B, scaling, bias=None):
    """The formula as everybody writes it, dtype by dtype as given; A and B are cast to x's dtype."""
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y + scaling * F.linear(F.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute error; NaN or inf where the oracle has none never passes."""
    assert actual.shape == exact.shape, f"{actual.shape} instead of {exact.shape}"
    difference = (actual.double() - exact).abs()
    assert torch.equal(actual.isfinite(), exact.isfinite()), "not finite where the oracle is"
    return difference[exact.isfinite()].max().item() if exact.isfinite().any() else 0.0


def assert_as_good_as(actual, eager, exact, factor: float) -> None:
    """error(actual) <= factor * error(eager), both against fp64 (FlashAttention's rule).

    Half a unit in the last place of the largest value is allowed on top: the result of a tiny case
    can be exact by luck in one of the two.
    """
    ours, theirs = error(actual, exact), error(eager, exact)
    last_place = (
        torch.finfo(actual.dtype).eps / 2 * exact.abs().max().item() if exact.numel() else 0.0
    )
    assert ours <= factor * theirs + last_place, f"error {ours:.3g}, eager's {theirs:.3g}"
