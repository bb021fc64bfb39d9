"""lora_linear: the layer's forward and backward. Formula: reference/lora_linear.py."""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from relora_kernels import backend
from relora_kernels.cuda import lora_linear as _cuda
from relora_kernels.ops import LIBRARY, checks, no_autocast
from relora_kernels.reference import lora_linear as _reference

# `auto` takes the backends listed before the reference without a record (see backend.py).
IMPLEMENTATIONS = {"reference": _reference, "cuda": _cuda}
if backend.triton_missing() is None:
    from relora_kernels._triton import lora_linear as _triton
    from relora_kernels._triton import lora_linear_mask as _triton_mask
    from relora_kernels._triton import lora_linear_tma as _triton_tma

    IMPLEMENTATIONS = {
        _triton_mask.NAME: _triton_mask,
        **IMPLEMENTATIONS,
        "triton": _triton,
        _triton_tma.NAME: _triton_tma,
    }

LIBRARY.define(
    "_lora_linear_forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
    "Tensor? bias, float dropout_p, Tensor? seed) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "_lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, "
    "Tensor p, float scaling, float dropout_p, Tensor? seed, bool need_dx, bool need_dA, "
    "bool need_dB, bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward(*args):
    module = backend.resolve("lora_linear", IMPLEMENTATIONS, "why_not_forward", *args)
    with no_autocast(args[0].device.type):
        return module.forward(*args)


def _backward(*args):
    module = backend.resolve("lora_linear backward", IMPLEMENTATIONS, "why_not_backward", *args)
    with no_autocast(args[0].device.type):
        return module.backward(*args)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("_lora_linear_forward", _forward, _device)
    LIBRARY.impl("_lora_linear_backward", _backward, _device)


@torch.library.register_fake("relora_kernels::_lora_linear_forward", lib=LIBRARY)
def _forward_fake(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0])


@torch.library.register_fake("relora_kernels::_lora_linear_backward", lib=LIBRARY)
def _backward_fake(
    dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, seed,
    need_dx, need_dA, need_dB, need_dbias,
):  # fmt: skip
    return (
        x.new_empty(x.shape if need_dx else 0),
        lora_A.new_empty(lora_A.shape if need_dA else 0),
        lora_B.new_empty(lora_B.shape if need_dB else 0),
        dy.new_empty(
            weight.shape[0] if need_dbias else 0,
            dtype=torch.promote_types(dy.dtype, torch.float32),
        ),
    )


@register_flop_formula(torch.ops.relora_kernels._lora_linear_forward)
def _forward_flops(x, weight, lora_A, *rest, out_shape=None, **kwargs) -> int:
    (M, K), N, r = x, weight[0], lora_A[0]
    return 2 * M * (N * K + r * K + N * r)


@register_flop_formula(torch.ops.relora_kernels._lora_linear_backward)
def _backward_flops(dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, seed,
                    need_dx, need_dA, need_dB, need_dbias, out_shape=None, **kwargs) -> int:  # fmt: skip
    (M, K), N, r = x, weight[0], lora_A[0]
    low_rank = N * r * (need_dx or need_dA) + r * K * (need_dx + need_dA) + N * r * need_dB
    return 2 * M * (N * K * need_dx + low_rank)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed):
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # (M, in)
        y, p = torch.ops.relora_kernels._lora_linear_forward(
            rows, weight, lora_A, lora_B, scaling, bias, dropout_p, seed
        )
        ctx.save_for_backward(rows, weight, lora_A, lora_B, p, seed)
        ctx.scaling, ctx.dropout_p, ctx.x_shape = scaling, dropout_p, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        # As in F.linear, the result is not a view for autograd, so in-place operations on it stay legal
        # under FSDP2, whose hooks a view would drop.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, weight, lora_A, lora_B, p, seed = ctx.saved_tensors
        need_dx, _, need_dA, need_dB, _, need_dbias, _, _ = ctx.needs_input_grad
        dx, dlora_A, dlora_B, dbias = torch.ops.relora_kernels._lora_linear_backward(
            dy.reshape(rows.shape[0], weight.shape[0]), rows, weight, lora_A, lora_B, p,
            ctx.scaling, ctx.dropout_p, seed, need_dx, need_dA, need_dB, need_dbias,
        )  # fmt: skip
        return (
            dx.view(ctx.x_shape) if need_dx else None,
            None,
            dlora_A if need_dA else None,
            dlora_B if need_dB else None,
            None,
            dbias.to(ctx.bias_dtype) if need_dbias else None,
            None,
            None,
        )


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + scaling * (dropout(x) A^T) B^T + bias, with W frozen.

    Equivalent to ``F.linear(x, W, bias) + scaling * F.linear(F.linear(dropout(x), A), B)`` (LoRA:
    Hu et al., arXiv 2106.09685; trained in restarts: ReLoRA, arXiv 2307.05695).

    Args:
        x: (..., in), float32, bfloat16, float16 or float64; any strides.
        weight: (out, in), x's dtype, must not require grad: dW is never computed.
        lora_A, lora_B: (r, in) and (out, r), both x's dtype or both float32 masters, which are
            rounded to x's dtype for the products. Their gradients are summed in float32 and come
            back in their own dtype.
        scaling: s, a number (LoRA: lora_alpha / r).
        bias: (out,) in x's dtype or float32, or None.
        dropout_p: probability, in steps of 2^-16, of zeroing an element of x on the low-rank branch.
        seed: of the dropout mask; an int, or an int64 tensor of one element on x's device. None
            draws one from torch's generator. The mask depends on (seed, element) alone.

    Returns: (..., out) in x's dtype.

    Under autocast x, weight and bias are cast to its dtype as by ``F.linear``. Differentiable once; does
    not support torch.func's transforms (grad, vmap) or fx.symbolic_trace. What torch.export exports is for
    inference: the exported ops have no gradients.

    Raises ValueError or TypeError for other shapes, dtypes, devices or ranges, and `BackendUnavailable` if
    a named backend cannot serve the call.
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, lora_A, lora_B, bias)
    scaling = checks.finite_number("lora_linear", "scaling", scaling)
    dropout_p = checks.fraction("lora_linear", "dropout_p", dropout_p)
    seed = _seed_tensor(seed, x.device) if dropout_p > 0.0 else None
    return _LoraLinear.apply(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)


def _check(x, weight, lora_A, lora_B, bias) -> None:
    op = "lora_linear"
    tensors = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    if bias is not None:
        tensors["bias"] = bias
    checks.plain_tensors(op, **tensors)
    checks.lora_shapes(op, weight, lora_A, lora_B)
    out_features, in_features = weight.shape
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(
            f"{op}: expected x (..., in) with in = {in_features} as in weight "
            f"{tuple(weight.shape)}, got x {tuple(x.shape)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(
            f"{op}: expected weight in x's dtype, got x {x.dtype} and weight {weight.dtype}; "
            f"cast one of them or run under torch.autocast"
        )
    if lora_A.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{op}: expected lora_A and lora_B in float32 or x's dtype {x.dtype}, got {lora_A.dtype}"
        )
    if bias is not None:
        if tuple(bias.shape) != (out_features,):
            raise ValueError(f"{op}: expected bias ({out_features},), got {tuple(bias.shape)}")
        if bias.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"{op}: expected bias in x's dtype {x.dtype} or float32, got {bias.dtype}"
            )
    if weight.requires_grad:
        raise ValueError(
            f"{op}: expected a frozen weight, got one that requires grad, whose gradient would "
            f"never be computed; call weight.requires_grad_(False)"
        )


def _autocast(x, weight, bias):
    """Cast as autocast casts F.linear's arguments. lora_A and lora_B keep their dtype."""
    if not isinstance(x, torch.Tensor) or x.device.type == "meta":  # autocast does not support meta
        return x, weight, bias
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t):
        eligible = (
            isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
        )
        return t.to(dtype) if eligible else t

    return cast(x), cast(weight), cast(bias)


def _seed_tensor(seed, device) -> torch.Tensor:
    """A 0-dim or 1-element int64 tensor on `device`, where kernels read it without synchronising."""
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(
                f"lora_linear: expected seed to be one int64 element on {device}, "
                f"got {checks.describe(seed)}"
            )
        return seed
    # full() is a fill; torch.tensor would copy from the host and wait.
    seed = checks.int64("lora_linear", "seed", seed)
    return torch.full((), seed, dtype=torch.int64, device=device)
