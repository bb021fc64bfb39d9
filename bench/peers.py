"""The alternatives that people use, re-implemented in a few lines of PyTorch (PEFT: its own layer).

A row of `linear_rows` returns y of an operands object `o` (x, weight, lora_A, lora_B, scaling), in the
operands' dtype; rows of `merge_rows` and `prune_rows` change the operands in place.
"""

import torch
import torch.nn.functional as F

from relora_kernels.measure import Row
from relora_kernels.problems import Linear, Merge, Prune

QUANTILE_LIMIT = 2**24  # the most elements that torch.quantile takes before torch 2.14


def eager_lora(o):
    """LoRA as its paper and the ReLoRA authors' code compute it."""

    def eager():
        lora_A, lora_B = factors(o)
        return F.linear(o.x, o.weight) + o.scaling * F.linear(F.linear(o.x, lora_A), lora_B)

    return eager


def factors(o):
    """A and B in x's dtype; cast at each call if they are float32 masters."""
    return o.lora_A.to(o.x.dtype), o.lora_B.to(o.x.dtype)


def full_rank(o):
    """nn.Linear with a trained W: its backward computes dW, too."""
    return lambda: F.linear(o.x, o.trained_weight)


class Chain(torch.autograd.Function):
    """Hand-written LoRA of cuBLAS calls, with P = s x A^T saved or recomputed in the backward.

    small_first: y = P B^T, then y.addmm_(x, W^T) (the two-call order); else y = x W^T, then
    y.addmm_(P, B^T) (the addmm chain: Unsloth and Axolotl recompute P, RunLoRA has both).
    """

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, small_first, save_p):
        p = (x @ lora_A.T).mul_(scaling)
        ctx.save_for_backward(x, weight, lora_A, lora_B, *([p] if save_p else []))
        ctx.scaling, ctx.small_first = scaling, small_first
        return Chain.accumulate((p, lora_B.T), (x, weight.T), small_first)

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, *saved = ctx.saved_tensors
        p = saved[0] if saved else (x @ lora_A.T).mul_(ctx.scaling)
        q = (dy @ lora_B).mul_(ctx.scaling)
        dx = Chain.accumulate((q, lora_A), (dy, weight), ctx.small_first)
        return dx, None, q.T @ x, dy.T @ p, None, None, None

    @staticmethod
    def accumulate(small, large, small_first):
        first, second = (small, large) if small_first else (large, small)
        return torch.mm(*first).addmm_(*second)


def chain(small_first: bool, save_p: bool):
    def make(o):
        return lambda: Chain.apply(o.x, o.weight, *factors(o), o.scaling, small_first, save_p)

    return make


def why_no_peft(o) -> str | None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        return f"peft is not installed ({error})"
    return None


def peft_layer(o):
    """PEFT's own layer around the operands."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear as LoraLinear

    base = torch.nn.Linear(1, 1, bias=False)
    base.weight = o.weight
    base.out_features, base.in_features = o.weight.shape
    r = len(o.lora_A)
    config = LoraConfig(r=r, lora_alpha=o.scaling * r, lora_dropout=0.0)
    layer = LoraLinear(base, "default", config, r=r, lora_alpha=o.scaling * r)
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = o.lora_A, o.lora_B
    return lambda: layer(o.x)


def linear_rows(problem: Linear) -> dict[str, Row]:
    if problem.direction in ("main loop", "backward by PAIR"):
        return {problem.BASELINE: problem.baseline(), **problem.ours()}
    return {
        problem.BASELINE: problem.baseline(),
        "full-rank nn.Linear": Row(full_rank, computes="full"),
        "eager LoRA": Row(eager_lora),
        "PEFT": Row(peft_layer, why_not=why_no_peft),
        "addmm chain, P saved": Row(chain(small_first=False, save_p=True)),
        "addmm chain, P recomputed": Row(chain(small_first=False, save_p=False)),
        "two-call order": Row(chain(small_first=True, save_p=True)),
        **problem.ours(),
    }


def eager_merge(o):
    def merge():
        for weight, lora_A, lora_B, scaling, *_ in o.calls():
            weight += scaling * (lora_B @ lora_A).to(weight.dtype)

    return merge


def merge_rows(problem: Merge) -> dict[str, Row]:
    rows = {problem.BASELINE: problem.baseline()}
    if problem.rounding == "nearest" and not problem.by:
        rows["eager merge"] = Row(eager_merge)
    return rows | problem.ours()


def _zero(o, i: int, drop: torch.Tensor) -> None:
    o.tensors[i].masked_fill_(drop, 0)
    if o.partners:
        o.partners[i].masked_fill_(drop, 0)


def quantile_prune(o):
    """The loop of the ReLoRA authors' code."""

    def prune():
        for i, t in enumerate(o.tensors):
            size = t.abs()
            _zero(o, i, ~(size > torch.quantile(size.flatten(), o.ratio)))

    return prune


def why_no_quantile(o) -> str | None:
    largest = max(t.numel() for t in o.tensors)
    if largest > QUANTILE_LIMIT:
        return f"torch.quantile takes at most 2^24 elements, got {largest:,}"
    return None


def kthvalue_prune(o):
    def prune():
        for i, t in enumerate(o.tensors):
            size = t.abs()
            k = int(o.ratio * (t.numel() - 1)) + 1
            _zero(o, i, ~(size > size.flatten().kthvalue(k).values))

    return prune


def sort_prune(o):
    def prune():
        for i, t in enumerate(o.tensors):
            size = t.abs()
            k = int(o.ratio * (t.numel() - 1))
            _zero(o, i, ~(size > size.flatten().sort().values[k]))

    return prune


def prune_rows(problem: Prune) -> dict[str, Row]:
    """kthvalue and sort take one order statistic where the quantile interpolates between two."""
    return {
        problem.BASELINE: problem.baseline(),
        "torch.quantile loop": Row(quantile_prune, why_not=why_no_quantile),
        "kthvalue loop": Row(kthvalue_prune, computes="about"),
        "sort loop": Row(sort_prune, computes="about"),
        **problem.ours(),
    }


def rows(problem) -> dict[str, Row]:
    """Every row of a problem by name: the baseline, the peers' formulas, ours."""
    return {Linear: linear_rows, Merge: merge_rows, Prune: prune_rows}[type(problem)](problem)
