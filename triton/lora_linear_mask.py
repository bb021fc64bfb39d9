"""lora_linear as the reference computes it, but its dropout mask takes one pass, not PyTorch's dozens.

    mask    out = x where kept, else 0      x read once, out written once; three times a training step

Equal bit for bit to the reference, because it uses the same matrix products (cuBLAS's on a GPU). It
is a backend of its own, `triton_mask`: with dropout, `auto` prefers it to the reference, which, when
named, remains an independent oracle.
"""

import torch
import triton
import triton.language as tl

from relora_kernels import backend
from relora_kernels._triton import philox
from relora_kernels.reference import lora_linear as reference

NAME = "triton_mask"
MASK = {"BLOCK_M": 16, "BLOCK_K": 256, "num_warps": 4}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # keyed by element size in bytes


@triton.jit
def mask_kernel(
    out_ptr, x_ptr, seed_ptr, M, K, out_stride0, x_stride0, x_stride1, threshold,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (M, K), column stride 1, = x where the 16 random bits are >= threshold, else 0."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    rows = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col0 = (tl.program_id(0) % tiles_k) * BLOCK_K
    cols = (col0 + tl.arange(0, BLOCK_K)).to(tl.int64)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride0 + cols[None, :] * x_stride1, mask=inside, other=0)
    bits = philox.bits16(tl.load(seed_ptr), philox.STREAM_DROPOUT, rows, col0, BLOCK_K)
    out_ptrs = out_ptr + rows[:, None] * out_stride0 + cols[None, :]
    tl.store(out_ptrs, tl.where(bits >= threshold, x, 0), mask=inside)


def why_not_forward(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed) -> str | None:
    return _why_not(x, dropout_p)


def why_not_backward(
    dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, seed, *needed
) -> str | None:  # fmt: skip
    return _why_not(x, dropout_p)


def _why_not(x, dropout_p) -> str | None:
    if reason := backend.why_not_in_triton(x, mask_kernel, NAME):
        return reason
    # `auto` uses it without a record, so first make sure that Triton can start kernels here.
    nothing = "nothing is dropped, and all else is the reference's" if dropout_p == 0.0 else None
    reason = nothing or backend.triton_cannot_start()
    return None if reason is None or backend.is_named(NAME) else reason


def forward(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed):
    """x (M, in) -> y (M, out), P (M, r), both in x's dtype."""
    return reference.forward(
        x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, drop=zero_dropped
    )


def backward(
    dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, seed,
    need_dx, need_dA, need_dB, need_dbias,
):  # fmt: skip
    """dy (M, out) -> dx (M, in), dA (r, in), dB (out, r), dbias (out,) in float32."""
    return reference.backward(
        dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, seed,
        need_dx, need_dA, need_dB, need_dbias, drop=zero_dropped,
    )  # fmt: skip


def zero_dropped(x, p: float, seed, out=None) -> torch.Tensor:
    """As reference.zero_dropped, with the seed on x's device; `out` must have a column stride of 1."""
    threshold = reference.dropout_constants(p)[0]
    if threshold == 0:
        return x
    (M, K), bits = x.shape, _BITS[x.element_size()]
    out = x.new_empty(M, K) if out is None else out
    if x.numel() > 0:
        tiles = triton.cdiv(M, MASK["BLOCK_M"]) * triton.cdiv(K, MASK["BLOCK_K"])
        with torch.cuda.device_of(x):
            mask_kernel[(tiles,)](  # on raw bits: one kernel per element size, NaNs unchanged
                out.view(bits), x.view(bits), seed, M, K,
                out.stride(0), *x.stride(), threshold, **MASK,
            )  # fmt: skip
    return out
