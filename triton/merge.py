"""merge_ in Triton: W <- round(W + s * B @ A) in place, one read and one write of W.

Memory traffic: 4 bytes per element of a 16-bit W (8 of float32), as much again for the residual of
compensated merges, plus the factors, which stay in L2. FLOPs: 2 r per element. Formula and rounding:
relora_kernels/reference/merge.py.
"""

import torch
import triton
import triton.language as tl

from relora_kernels import backend
from relora_kernels._triton import philox
from relora_kernels._triton import rounding as rounding_mode
from relora_kernels.reference import merge as reference

# Tile of W, step along r, warps.
CONFIG = {"BLOCK_OUT": 64, "BLOCK_IN": 128, "BLOCK_R": 32, "num_warps": 8, "num_stages": 2}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Three tf32 products keep float32's precision; 16-bit factors are exact in a single one.
PRECISION = {"bf16": "tf32", "fp16": "tf32", "fp32": "tf32x3"}


@triton.jit
def merge_kernel(
    w_ptr, a_ptr, b_ptr, residual_ptr,
    out_features, in_features, r,
    w_stride0, w_stride1, a_stride0, a_stride1, b_stride0, b_stride1, res_stride0, res_stride1,
    scaling, seed: "i64", first_row,  # noqa: F821
    W_DTYPE: tl.constexpr, FACTOR_DTYPE: tl.constexpr, ROUNDING: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tiles_in = tl.cdiv(in_features, BLOCK_IN)
    row0 = (tl.program_id(0) // tiles_in) * BLOCK_OUT
    col0 = (tl.program_id(0) % tiles_in) * BLOCK_IN
    rows = row0 + tl.arange(0, BLOCK_OUT)
    cols = col0 + tl.arange(0, BLOCK_IN)
    row_ok = (rows < out_features)[:, None]
    col_ok = (cols < in_features)[None, :]
    row64 = rows.to(tl.int64)[:, None]
    col64 = cols.to(tl.int64)[None, :]

    update = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    for k0 in range(0, r, BLOCK_R):
        ks = k0 + tl.arange(0, BLOCK_R)
        k64 = ks.to(tl.int64)
        b = tl.load(
            b_ptr + row64 * b_stride0 + k64[None, :] * b_stride1,
            mask=row_ok & (ks < r)[None, :], other=0,
        )  # fmt: skip
        a = tl.load(
            a_ptr + k64[:, None] * a_stride0 + col64 * a_stride1,
            mask=(ks < r)[:, None] & col_ok, other=0,
        )  # fmt: skip
        update = tl.dot(
            rounding_mode.widen(b, FACTOR_DTYPE),
            rounding_mode.widen(a, FACTOR_DTYPE),
            update,
            input_precision=PRECISION,
        )

    w_ptrs = w_ptr + row64 * w_stride0 + col64 * w_stride1
    res_ptrs = residual_ptr + row64 * res_stride0 + col64 * res_stride1
    value = rounding_mode.widen(tl.load(w_ptrs, mask=row_ok & col_ok, other=0), W_DTYPE)
    if HAS_RESIDUAL:
        value += rounding_mode.widen(tl.load(res_ptrs, mask=row_ok & col_ok, other=0), W_DTYPE)
    value = value + update * scaling
    if ROUNDING == "stochastic":
        random = philox.bits16(seed, philox.STREAM_ROUND, first_row + rows, col0, BLOCK_IN)
        new = rounding_mode.narrow_stochastic(value, random, W_DTYPE)
    else:
        new = rounding_mode.narrow(value, W_DTYPE)
    tl.store(w_ptrs, new, mask=row_ok & col_ok)
    if HAS_RESIDUAL:
        rest = value - rounding_mode.widen(new, W_DTYPE)
        tl.store(res_ptrs, rounding_mode.narrow(rest, W_DTYPE), mask=row_ok & col_ok)


def why_not(weight, lora_A, lora_B, scaling, rounding, residual, seed, first_row) -> str | None:
    for name, tensor in (("weight", weight), ("lora_A and lora_B", lora_A)):
        if tensor.dtype not in DTYPES:
            return f"{name} in {tensor.dtype}; the kernel takes bfloat16, float16 and float32"
    return backend.why_not_in_triton(weight, merge_kernel)


def merge_(weight, lora_A, lora_B, scaling, rounding, residual, seed, first_row) -> None:
    """Arguments as checked by ops/merge.py; residual on weight's device."""
    out_features, in_features = weight.shape
    if weight.numel() == 0:
        return
    tiles = triton.cdiv(out_features, CONFIG["BLOCK_OUT"]) * triton.cdiv(
        in_features, CONFIG["BLOCK_IN"]
    )
    stored = weight if residual is None else residual
    with torch.cuda.device_of(weight):
        merge_kernel[(tiles,)](
            _bits(weight), _bits(lora_A), _bits(lora_B), _bits(stored),
            out_features, in_features, lora_A.shape[0],
            *weight.stride(), *lora_A.stride(), *lora_B.stride(), *stored.stride(),
            scaling, seed, first_row,
            W_DTYPE=DTYPES[weight.dtype],
            FACTOR_DTYPE=DTYPES[lora_A.dtype],
            ROUNDING=rounding,
            HAS_RESIDUAL=residual is not None,
            PRECISION=PRECISION[DTYPES[lora_A.dtype]],
            enable_fp_fusion=False,  # every backend rounds s * BA and the sum separately
            **CONFIG,
        )  # fmt: skip
    torch.autograd.graph.increment_version(weight)
    if residual is not None:
        torch.autograd.graph.increment_version(residual)


def merge_many_(merges, restarts=None) -> None:
    """As in reference/merge.py, with one launch per layer."""
    reference.merge_many_(merges, restarts, merge_)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """16-bit floats as int16: see rounding.py."""
    return tensor if tensor.dtype == torch.float32 else tensor.view(torch.int16)
