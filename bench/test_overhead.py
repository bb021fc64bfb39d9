"""The layer's cost on top of its arithmetic: Python's time per call, against the same formula by hand.

The functions of a group are timed in turns; `extra_info["in_turns"]` of each row holds all their medians.
"""

import common
import pytest
import torch
import torch.nn.functional as F

from relora_kernels import FusedReLoRaLinear


def functions(tokens: int, features: int, r: int) -> dict:
    """Forward + backward of the layer, and of its formula as it is usually written."""
    torch.manual_seed(0)
    layer = FusedReLoRaLinear(features, features, bias=False, r=r, device=common.DEVICE)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(tokens, features, device=common.DEVICE, requires_grad=True)
    dy = torch.randn(tokens, features, device=common.DEVICE)
    weight, lora_A, lora_B, scaling = layer.weight, layer.lora_A, layer.lora_B, layer.scaling
    leaves = [x, lora_A, lora_B]

    def by_hand():
        y = F.linear(x, weight) + scaling * F.linear(F.linear(x, lora_A), lora_B)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    def ours():
        y = layer(x)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    for got, expected in zip(ours(), by_hand()):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    return {"by hand": by_hand, "FusedReLoRaLinear": ours}


@pytest.mark.parametrize("row", ["by hand", "FusedReLoRaLinear"])
def test_python_overhead(benchmark, row):
    """One token of eight features: what remains is Python's time for a forward and backward call."""
    common.measure_in_turns(benchmark, "overhead: 1 token, 8 x 8", row, functions(1, 8, 2))


@pytest.mark.parametrize("row", ["by hand", "FusedReLoRaLinear"])
def test_layer_beside_its_formula(benchmark, row):
    common.measure_in_turns(
        benchmark, "layer: 512 tokens, 512 x 512", row, functions(512, 512, 128)
    )
