"""Each op on every backend that can run it, beside the formulas that people use instead.

A row is checked against fp64 before it is timed. `extra_info` holds the FLOPs or bytes that the op
needs at least, and the row's error against fp64.
"""

import pytest
import torch
import torch.nn.functional as F

from relora_kernels import FusedReLoRaLinear, lora_linear, merge_, prune_, use_backend
from relora_kernels.ops import lora_linear as linear_op
from relora_kernels.ops import merge as merge_op
from relora_kernels.ops import prune as prune_op

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# 16-bit where ReLoRA runs; a CPU checks the plumbing in float32.
DTYPE = torch.bfloat16 if GPU else torch.float32

# (tokens, in, out, r): the paper's 350M and 1.3B projections and 4096^2, or a CPU's share of them.
LAYERS = (
    [(16384, 1024, 1024, 128), (16384, 2048, 5461, 128), (16384, 4096, 4096, 128)]
    if GPU
    else [(512, 512, 512, 64)]
)
WEIGHTS = [(2048, 2048, 128), (5461, 2048, 128), (4096, 4096, 128)] if GPU else [(512, 512, 64)]
MOMENTS = 100_000_000 if GPU else 1_000_000


def eager_lora(x, weight, lora_A, lora_B, scaling):
    return F.linear(x, weight) + scaling * F.linear(F.linear(x, lora_A), lora_B)


def addmm_chain(x, weight, lora_A, lora_B, scaling):
    return torch.addmm(x @ weight.T, x @ lora_A.T, lora_B.T, alpha=scaling)


def frozen_linear(x, weight, lora_A, lora_B, scaling):
    """The floor: the base product alone."""
    return F.linear(x, weight)


def on(backend: str, function):
    def run(*args):
        with use_backend(backend):
            return function(*args)

    return run


PRODUCTS = {
    "frozen linear (floor)": frozen_linear,
    "eager LoRA": eager_lora,
    "addmm chain": addmm_chain,
    **{f"ours {name}": on(name, lora_linear) for name in linear_op.IMPLEMENTATIONS},
}


def skip_if_it_cannot(name: str, op, why_not: str, arguments) -> None:
    module = op.IMPLEMENTATIONS.get(name.removeprefix("ours "))
    if module and (reason := getattr(module, why_not)(*arguments)):
        pytest.skip(reason)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def layer_operands(tokens, in_features, out_features, r):
    torch.manual_seed(0)
    x = torch.randn(tokens, in_features, device=DEVICE).to(DTYPE).requires_grad_()
    weight = (torch.randn(out_features, in_features, device=DEVICE) * in_features**-0.5).to(DTYPE)
    lora_A = (torch.randn(r, in_features, device=DEVICE) * in_features**-0.5).to(DTYPE)
    lora_B = (torch.randn(out_features, r, device=DEVICE) * 0.1).to(DTYPE)
    return x, weight, lora_A.requires_grad_(), lora_B.requires_grad_(), 0.25


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def test_layer(benchmark, direction, shape, name):
    tokens, in_features, out_features, r = shape
    operands, product = layer_operands(*shape), PRODUCTS[name]
    skip_if_it_cannot(name, linear_op, "why_not_forward", (*operands, None, 0.0, None))
    base = frozen_linear if product is frozen_linear else eager_lora
    with torch.no_grad():
        exact = base(*(t.detach().double() if torch.is_tensor(t) else t for t in operands))
        error = relative_error(product(*operands), exact)
    assert error < 4 * torch.finfo(DTYPE).eps
    dy = torch.randn_like(exact).to(DTYPE)
    del exact
    leaves = [operands[0]] if product is frozen_linear else [operands[0], *operands[2:4]]

    def step():
        y = product(*operands)
        if direction != "forward":
            torch.autograd.grad(y, leaves, dy)

    passes = 1 if direction == "forward" else 2
    low_rank = 0 if product is frozen_linear else r * (in_features + out_features)
    flops = 2 * tokens * (passes * in_features * out_features + (2 * passes - 1) * low_rank)
    benchmark.group = f"layer {direction} {shape}"
    benchmark.extra_info.update(flops=flops, error=error, dtype=str(DTYPE))
    benchmark(step)


def test_layer_overhead(benchmark):
    """FusedReLoRaLinear at a size where only the calls cost: Python's share, in microseconds."""
    layer = FusedReLoRaLinear(8, 8, r=2, device=DEVICE)
    x = torch.randn(1, 8, device=DEVICE, requires_grad=True)
    benchmark.group = "overhead a call, forward + backward"
    benchmark(lambda: layer(x).sum().backward())


def eager_merge(weight, lora_A, lora_B, scaling):
    weight += scaling * (lora_B @ lora_A).to(weight.dtype)


MERGES = {"eager merge": eager_merge} | {
    f"ours {name}": on(name, merge_) for name in merge_op.IMPLEMENTATIONS
}


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_merge(benchmark, shape, name):
    out_features, in_features, r = shape
    torch.manual_seed(0)
    dtype = torch.bfloat16
    weight = torch.randn(out_features, in_features, device=DEVICE).to(dtype)
    lora_A = torch.randn(r, in_features, device=DEVICE)
    lora_B = torch.randn(out_features, r, device=DEVICE) * 1e-3
    arguments = (weight, lora_A, lora_B, 0.25, "nearest", None, 0, 0)
    skip_if_it_cannot(name, merge_op, "why_not", arguments)
    merged, exact = weight.clone(), weight.double() + 0.25 * (lora_B.double() @ lora_A.double())
    MERGES[name](merged, lora_A, lora_B, 0.25)
    error = relative_error(merged, exact)
    assert error < torch.finfo(dtype).eps
    benchmark.group = f"merge {shape} {dtype}"
    benchmark.extra_info.update(bytes=4 * weight.numel() + 4 * r * sum(shape[:2]), error=error)
    benchmark(MERGES[name], weight, lora_A, lora_B, 0.25)


def quantile_prune(t, ratio):
    flat = t.abs().flatten()
    if len(flat) > 2**24:
        pytest.skip("torch.quantile takes at most 2^24 elements")
    t.masked_fill_(~(t.abs() > torch.quantile(flat, ratio)), 0)


def kthvalue_prune(t, ratio):
    flat = t.abs().flatten()
    t.masked_fill_(~(t.abs() > flat.kthvalue(int(ratio * (len(flat) - 1)) + 1).values), 0)


PRUNES = {"torch.quantile": quantile_prune, "kthvalue": kthvalue_prune} | {
    f"ours {name}": on(name, prune_) for name in prune_op.IMPLEMENTATIONS
}


@pytest.mark.parametrize("name", PRUNES)
def test_prune(benchmark, name):
    torch.manual_seed(0)
    moments = torch.randn(MOMENTS, device=DEVICE)
    skip_if_it_cannot(name, prune_op, "why_not", ([moments], 0.9, []))
    pruned = moments.clone()
    PRUNES[name](pruned, 0.9)
    # Ties at the threshold are dropped: a few fewer than a tenth may be left.
    assert -100 <= (pruned != 0).sum().item() - MOMENTS // 10 <= 1
    assert torch.equal(pruned[pruned != 0], moments[pruned != 0])
    benchmark.group = f"prune {MOMENTS:,} float32"
    benchmark.extra_info.update(bytes=8 * MOMENTS)
    # Each round prunes fresh moments: pruned ones are mostly ties at zero.
    benchmark.pedantic(
        PRUNES[name], setup=lambda: ((moments.clone(), 0.9), {}), rounds=10 if GPU else 3
    )
