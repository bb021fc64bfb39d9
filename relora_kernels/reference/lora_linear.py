"""lora_linear: y = x W^T + s * (dropout(x) A^T) B^T + bias, forward and backward.

    P  = s * dropout(x) A^T        (M, r), rounded once to x's dtype
    y  = x W^T + (P B^T + bias)    the small product first, the large GEMM accumulates onto it
    Q  = s * dy B                  (M, r)
    dx = dy W + mask * (Q A)       dA = Q^T dropout(x)      dB = dy^T P      dbias = sum over M of dy

dropout(x) = mask * x, where the mask is 0 or 1 / keep. Dropped elements are set to zero, whatever they held.
1 / keep goes into the products' scale, so it adds no rounding.

There is no dW: W is frozen. lora_A and lora_B are rounded to x's dtype for the products (float32
masters, bf16 compute); their gradients are summed in float32 and returned in their own dtype.
The order (small product first, then the large GEMM adds onto it in place) hides the read of y behind
the large GEMM and rounds the small term instead of the large one. On a GPU these are cuBLAS calls, and
nothing else touches a tensor of y's size. A fused kernel has to beat this plan.
"""

from __future__ import annotations

import torch

from relora_kernels.reference import philox


def why_not_forward(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed) -> str | None:
    return None


def why_not_backward(
    dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, seed, *needed
) -> str | None:  # fmt: skip
    return None


def forward(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, *, drop=None):
    """x (M, in) -> y (M, out), P (M, r), both in x's dtype. `drop`: replaces zero_dropped."""
    drop = drop or zero_dropped
    keep_scale = dropout_constants(dropout_p)[1]
    p = _scaled_mm(drop(x, dropout_p, seed), lora_A.to(x.dtype).T, scaling * keep_scale)
    b = lora_B.to(x.dtype).T
    y = p @ b if bias is None else torch.addmm(bias.to(x.dtype), p, b)
    return y.addmm_(x, weight.T), p


def backward(
    dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, seed,
    need_dx, need_dA, need_dB, need_dbias, *, drop=None,
):  # fmt: skip
    """dy (M, out) -> dx (M, in), dA (r, in), dB (out, r), dbias (out,) in float32 (float64 for float64).

    A gradient that is not needed is returned with 0 elements.
    """
    drop = drop or zero_dropped
    keep_scale = dropout_constants(dropout_p)[1]
    wide = torch.promote_types(dy.dtype, torch.float32)
    dx, dlora_A, dlora_B = x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    dbias = dy.new_empty(0, dtype=wide)
    if need_dx or need_dA:
        q = _scaled_mm(dy, lora_B.to(dy.dtype), scaling)  # (M, r)
    if need_dx:
        dx = _scaled_mm(q, lora_A.to(dy.dtype), keep_scale)  # (M, in)
        dx = drop(dx, dropout_p, seed, out=dx).addmm_(dy, weight)
    if need_dA:
        dlora_A = _mm_wide(q.T, drop(x, dropout_p, seed))
        if keep_scale != 1.0:
            dlora_A *= keep_scale
        dlora_A = dlora_A.to(lora_A.dtype)
    if need_dB:
        dlora_B = _mm_wide(dy.T, p).to(lora_B.dtype)
    if need_dbias:
        dbias = dy.sum(0, dtype=wide)
    return dx, dlora_A, dlora_B, dbias


def zero_dropped(x: torch.Tensor, p: float, seed, out: torch.Tensor | None = None) -> torch.Tensor:
    """x (M, in) with zeros where elements are dropped, in `out` (which may be x) or a new tensor.

    Element (m, k) is dropped if its 16 random bits are below round(p * 2^16). p < 2^-17 drops nothing
    and returns x.
    """
    threshold = dropout_constants(p)[0]
    if threshold == 0:
        return x
    bits = philox.bits16(seed, philox.STREAM_DROPOUT, tuple(x.shape), device=x.device)
    out = x.new_empty(x.shape) if out is None else out
    return torch.where(bits < threshold, x.new_zeros(()), x, out=out)


def dropout_constants(p: float) -> tuple[int, float]:
    """(drop an element if its 16 random bits are below this, 1 / the resulting probability to keep)."""
    threshold = round(p * 65536)
    return threshold, 65536.0 / (65536 - threshold) if threshold < 65536 else 0.0


def dropout_mask(x: torch.Tensor, p: float, seed) -> torch.Tensor:
    """(M, in) in x's dtype: 0 where dropped, 1 / keep elsewhere. For oracles only: no backend builds it."""
    return zero_dropped(torch.full_like(x, dropout_constants(p)[1]), p, seed)


def _scaled_mm(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * a @ b, rounded once, after scaling (the GEMM's alpha, applied in its epilogue)."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)  # beta 0: not read


def _mm_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with a float32 result (float64 for float64), accumulated in at least float32."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
