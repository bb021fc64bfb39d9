"""lora_linear in Triton, with the tiles of the two-segment product fetched by TMA (sm_90 and newer).

The tensor memory accelerator fetches a whole tile with one instruction of one thread, checks bounds and
fills with zeros. That frees the registers that pointers and masks take in lora_linear.py's kernel, so
two plain loops, one per segment, are both pipelined. Rows must start at multiples of 16 bytes; other
operands are copied to a padded pitch. Everything but this product is lora_linear.py's.

It is a backend of its own, `triton_tma`, because which of the two is faster depends on the device.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from relora_kernels import backend
from relora_kernels._triton import lora_linear as portable
from relora_kernels._triton import philox
from relora_kernels.reference.lora_linear import dropout_constants

NAME = "triton_tma"
# Not float32, which does not use tensor cores and has 700 spills.
DTYPES = (torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes, of a row's start


@triton.jit
def two_segment_tma_kernel(
    out_ptr, p, b, x, w, bias_ptr, seed_ptr, M, N, K, r, keep_scale, threshold,
    W_IS_N_BY_K: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (M, N) = dropout'(p (M, r) @ b) + x (M, K) @ w + bias, w and b given as (N, K) or (K, N).

    p, b, x, w are tensor descriptors. The low-rank segment comes first, so that its mask (in dx)
    applies to nothing else.
    """
    row_tile, col_tile = portable.output_tile(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row0, col0 = row_tile * BLOCK_M, col_tile * BLOCK_N
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, r, BLOCK_K):
        acc = _step(acc, p, b, row0, col0, k0, W_IS_N_BY_K, PRECISION)
    if DROPOUT:
        bits = philox.bits16(tl.load(seed_ptr), philox.STREAM_DROPOUT, rows, col0, BLOCK_N)
        acc = tl.where(bits >= threshold, acc * keep_scale, 0.0)
    for k0 in range(0, K, BLOCK_K):
        acc = _step(acc, x, w, row0, col0, k0, W_IS_N_BY_K, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(
        out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :]
    )


@triton.jit
def _step(
    acc, left, right, row0, col0, k0, W_IS_N_BY_K: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """acc + one k-step of (left, right)."""
    a = left.load([row0, k0])
    if W_IS_N_BY_K:
        b = right.load([col0, k0]).T
    else:
        b = right.load([k0, col0])
    return tl.dot(a, b, acc, input_precision=PRECISION)


def why_not_forward(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed) -> str | None:
    return _why_not(x)


def why_not_backward(
    dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, seed, *needed
) -> str | None:  # fmt: skip
    return _why_not(x)


def _why_not(x) -> str | None:
    if x.dtype not in DTYPES:
        return f"x in {x.dtype}; the kernel takes bfloat16 and float16"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0):
        return "TMA needs a GPU of compute capability 9.0 or newer"
    return backend.why_not_in_triton(x, two_segment_tma_kernel, NAME)


def forward(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed):
    """x (M, in) -> y (M, out), P (M, r), both in x's dtype."""
    return portable.forward(
        x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, two_segment=_two_segment
    )


def backward(
    dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, seed,
    need_dx, need_dA, need_dB, need_dbias,
):  # fmt: skip
    """dy (M, out) -> dx (M, in), dA (r, in), dB (out, r), dbias (out,) in float32."""
    return portable.backward(
        dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, seed,
        need_dx, need_dA, need_dB, need_dbias, two_segment=_two_segment,
    )  # fmt: skip


def main_loop(x, weight) -> torch.Tensor:
    """x W^T (M, out): the two-segment product without its first segment, for benchmarks."""
    return portable.main_loop(x, weight, two_segment=_two_segment)


def _two_segment(p, b, x, w, w_is_n_by_k: bool, bias, dropout_p: float, seed) -> torch.Tensor:
    (M, K), N, r = x.shape, w.shape[0 if w_is_n_by_k else 1], p.shape[1]
    out = x.new_empty(M, N)
    if out.numel() == 0:
        return out
    # Loads go through TMA at any size; an odd N only narrows the stores.
    config = portable.two_segment_config(M, dropout_p, x, N % portable.MULTIPLE != 0)
    left = [config["BLOCK_M"], config["BLOCK_K"]]
    right = [config["BLOCK_N"], config["BLOCK_K"]] if w_is_n_by_k else [
        config["BLOCK_K"], config["BLOCK_N"]]  # fmt: skip
    threshold, keep_scale = dropout_constants(dropout_p)
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    two_segment_tma_kernel[(tiles,)](
        out, _described(p, left), _described(b, right), _described(x, left), _described(w, right),
        x if bias is None else bias, x if seed is None else seed, M, N, K, r, keep_scale, threshold,
        W_IS_N_BY_K=w_is_n_by_k, HAS_BIAS=bias is not None, DROPOUT=dropout_p > 0.0,
        PRECISION=portable.precision(x), GROUP_M=portable.GROUP_M, **config,
    )  # fmt: skip
    return out


def _described(t: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """A descriptor of `t`, or of a copy if rows overlap or do not start at multiples of 16 bytes."""
    per_row = ALIGNMENT // t.element_size()
    rows, cols = t.shape
    if t.numel() == 0:  # never read, but an empty descriptor is refused
        t = t.new_empty(1, per_row)
    elif t.stride(0) % per_row or t.stride(0) < cols or t.data_ptr() % ALIGNMENT:
        t = t.new_empty(rows, triton.cdiv(cols, per_row) * per_row)[:, :cols].copy_(t)
    return TensorDescriptor(t, list(t.shape), [t.stride(0), 1], block)
