"""lora_linear in CUDA: forward and backward. Formulas: reference/lora_linear.py. Kernels: csrc/two_segment*.

    product  y = P B^T + x W^T + bias, dx = mask * (Q A) + dy W: both segments in one float32 accumulator
             P = s dropout(x) A^T, Q = s dy B: one segment, the scale applied before the one rounding
    summed   dA = Q^T dropout(x), dB = dy^T P: slabs of M in float32, added in a fixed order
    pair     Q and dB in one launch, which alternates between the two

dbias is torch's sum. No atomics are used, so results are bitwise repeatable. On sm_90 the products use TMA
and wgmma (csrc/two_segment_sm90.cu), from sm_80 on cp.async and mma.sync (csrc/two_segment_sm80.cu).

Results of any pitch are written directly. Operands whose rows do not start at multiples of 16 bytes (x, dy
and weight with in or out = 5461) are copied to a padded pitch at each call: cp.async and TMA accept no
others, and a TMA box may not begin anywhere else either. For 2048 x 5461 in bfloat16 the copy of the weight
reads and writes 45 MB: 10 us on an H200 at 4.3 TB/s. For 16384 tokens of 5461 it is 358 MB: 84 us, next to
464 us for the product at 790 TFLOP/s. These are estimated lower bounds, not measurements.
"""

from __future__ import annotations

import functools

import torch

from relora_kernels.cuda import extension, why_no_device
from relora_kernels.reference.lora_linear import dropout_constants

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
PER_16_BYTES = 8  # elements
STEP = 64  # rows of M per step; a slab is a whole number of steps
TILE = 128  # rows of a tile, and columns of a narrow one
WIDE = 256  # columns of sm_90's large tile
# Blocks that share a tile of W on sm_90: 1, or 2 for wide tiles without dropout. Measured once, beside cuBLAS, on
# an H200 ("main loop" of bench/gpu_check.py, 2026-11-27, bench/results/nvidia-h200.json): 2 takes 0.988 of its
# time where 1 takes 1.002 (4096 to 4096), and 1.056 where 1 takes 1.066 (2048 to 5464). Too little to switch on
# what one run has tried at two shapes.
CLUSTER = 1
CLUSTERS = (1, 2)
# Q and dB on sm_90: 0 for a launch each, else one launch in clusters of this many blocks. Why it may gain:
# csrc/two_segment.h. Measured likewise ("backward by PAIR"), the backward by 0, 1 and 2: 0.876, 0.870 and 0.868 ms at
# 4096 to 4096, 0.112, 0.107 and 0.109 at 1024 to 1024.
PAIR = 0
PAIRS = (0, 1, 2)


def why_not_forward(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed) -> str | None:
    """Why the kernels cannot serve this call; None if they can."""
    reason = why_no_device(x.device)
    if reason is not None:
        return reason
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"expected x in bfloat16 or float16, got {x.dtype}"
    if 0 in weight.shape:
        return f"expected at least one feature in and out, got weight {tuple(weight.shape)}"
    if _kernel(x.device) is None:
        major, minor = torch.cuda.get_device_capability(x.device)
        return f"expected a GPU of compute capability 8.0 or newer, got {major}.{minor}"
    return None


def why_not_backward(
    dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, seed, *needed
) -> str | None:  # fmt: skip
    return why_not_forward(x, weight, lora_A, lora_B, scaling, None, dropout_p, seed)


def forward(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed):
    """x (M, in) -> y (M, out), P (M, r), both in x's dtype."""
    dropout = _dropout(dropout_p, seed)
    a, b = _rows(lora_A, x.dtype), _rows(lora_B, x.dtype)
    x = _rows(x)
    p = _product("nt", _masked(x, dropout), a, scale=scaling * dropout[2], padded=True)
    y = _product("nt", x, _rows(weight), p, b, bias=bias)
    return y, p.contiguous()


def backward(
    dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, seed,
    need_dx, need_dA, need_dB, need_dbias,
):  # fmt: skip
    """dy (M, out) -> dx (M, in), dA (r, in), dB (out, r), dbias (out,) in float32.

    A gradient that is not needed is returned with 0 elements.
    """
    dropout = _dropout(dropout_p, seed)
    dx, dlora_A, dlora_B = x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    dbias = dy.new_empty(0, dtype=torch.float32)
    if need_dbias:
        dbias = dy.sum(0, dtype=torch.float32)
    if need_dx or need_dA or need_dB:
        dy = _rows(dy)
    need_q = need_dx or need_dA
    if PAIR and need_q and need_dB and len(dy) and _kernel(dy.device) == "sm90":
        q, dlora_B = _pair(dy, _rows(lora_B, dy.dtype), _rows(p), scaling, lora_B.dtype)
    else:
        if need_q:
            q = _product("nn", dy, _rows(lora_B, dy.dtype), scale=scaling, padded=True)
        if need_dB:  # right after Q, which leaves dy in L2, or the part that fits
            dlora_B = _summed(dy, _rows(p), 1.0, lora_B.dtype)
    if need_dx:
        a = _rows(lora_A, dy.dtype)
        dx = _product("nn", dy, _rows(weight), q, a, dropout=dropout)
    if need_dA:
        dlora_A = _summed(q, _masked(_rows(x), dropout), dropout[2], lora_A.dtype)
    return dx, dlora_A, dlora_B, dbias


def main_loop(x, weight) -> torch.Tensor:
    """x W^T (M, out): the two-segment product without its first segment, for benchmarks."""
    return _product("nt", _rows(x), _rows(weight))


def _product(
    form: str, x, w, p=None, b=None, *, bias=None, scale=1.0, dropout=(None, 0, 1.0), padded=False
) -> torch.Tensor:
    """scale * (dropout(p @ b) + x @ w) + bias. Form nt: w (N, K), b (N, r); nn: w (K, N), b (r, N).

    Returns (M, N), contiguous or, if `padded`, with a row pitch that is a multiple of 16 bytes.
    """
    (M, K), N = x.shape, w.shape[0 if form == "nt" else 1]
    pitch = _padded(N) if padded else N
    out = x.new_empty(M, pitch)[:, :N]
    if M == 0:
        return out
    variant = _variant(_kernel(x.device), M, N, dropout[1] > 0, x.device)
    sizes = M, N, K, 0 if p is None else p.shape[1]
    _multiply(form, out, x, w, sizes, p, b, bias=bias, scale=scale, dropout=dropout, **variant)
    return out


def _summed(x, w, scale: float, dtype) -> torch.Tensor:
    """scale * x (M, m)^T @ w (M, n) in `dtype`, summed in float32 over slabs of M."""
    (M, m), n = x.shape, w.shape[1]
    if M == 0:
        return x.new_zeros(m, n, dtype=dtype)
    slab_steps = _slab_steps(M, m, n, x.device)
    partial = _partial(x, n, slab_steps)
    _multiply("tn", partial[0], x, w, (m, n, M, 0), slab_steps=slab_steps)
    return _total(partial, n, scale, dtype)


def _pair(x, w, p, scale: float, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """scale * x (M, K) @ w (K, n), as a `padded` product, and x^T @ p (M, n) in `dtype`, in one launch."""
    (M, K), n = x.shape, w.shape[1]
    # A slab takes as many steps as a tile of x @ w, so that all units of work take equally long; fewer if
    # that would leave processors idle; rounded up to whole tiles of rows.
    most, rows = min(-(-K // STEP), _slab_steps(M, K, n, x.device)), TILE // STEP * PAIR
    slab_steps = -(-most // rows) * rows
    out, sums = x.new_empty(M, _padded(n))[:, :n], _partial(x, n, slab_steps)
    _multiply(
        "nn",
        out,
        x,
        w,
        (M, n, K, 0),
        p,
        scale=scale,
        slab_steps=slab_steps,
        sums=sums[0],
        cluster=PAIR,
    )
    return out, _total(sums, n, 1.0, dtype)


def _slab_steps(M: int, m: int, n: int, device: torch.device) -> int:
    """Steps per slab of M for sums (m, n): a tile of a slab per processor, but at least four steps."""
    steps, tiles = -(-M // STEP), -(-m // TILE) * -(-n // TILE)
    return -(-steps // max(1, min(_processors(device) // tiles, steps // 4)))


def _partial(x, n: int, slab_steps: int) -> torch.Tensor:
    """Memory for the sums (slabs, m, n) of x (M, m). Its pitch is even, because sums are stored in pairs."""
    M, m = x.shape
    return x.new_empty(-(-M // (slab_steps * STEP)), m, n + n % 2, dtype=torch.float32)


def _total(partial, n: int, scale: float, dtype) -> torch.Tensor:
    """scale * the sum of `partial` over slabs, in their order: (m, n) in `dtype`."""
    slabs, m, _ = partial.shape
    out = partial.new_empty(m, n, dtype=dtype)
    _launch(
        "sum_slabs",
        partial.device,
        out=_matrix(out),
        partial=_matrix(partial[0]),
        sizes=(slabs, m, n),
        scale=scale,
        dtype=DTYPES[dtype],
    )
    return out


def _multiply(
    form: str, out, x, w, sizes, p=None, b=None, *, bias=None, scale=1.0, dropout=(None, 0, 1.0),
    slab_steps=1, sums=None, block_n=TILE, cluster=1,
) -> None:  # fmt: skip
    """Launch with the arguments of TwoSegmentArgs in csrc/launch.h."""
    bias = None if bias is None else bias.contiguous()
    seed, threshold, keep_scale = dropout
    _launch(
        "two_segment",
        x.device,
        kernel=_kernel(x.device),
        form=form,
        out=_matrix(out),
        p=_matrix(p),
        b=_matrix(b),
        x=_matrix(x),
        w=_matrix(w),
        bias=0 if bias is None else bias.data_ptr(),
        sizes=sizes,
        dtype=DTYPES[x.dtype],
        bias_dtype=DTYPES[x.dtype if bias is None else bias.dtype],
        scale=scale,
        dropout=(seed.data_ptr() if threshold else 0, threshold, keep_scale),
        slab_steps=slab_steps,
        block_n=block_n,
        cluster=cluster,
        sums=_matrix(sums),
    )


def _masked(x, dropout) -> torch.Tensor:
    """x with zeros where dropped; the product applies 1 / keep."""
    seed, threshold, keep_scale = dropout
    if threshold == 0 or x.numel() == 0:
        return x
    out = x.new_empty(x.shape[0], _padded(x.shape[1]))[:, : x.shape[1]]
    _launch(
        "mask_rows",
        x.device,
        out=_matrix(out),
        x=_matrix(x),
        sizes=tuple(x.shape),
        dropout=(seed.data_ptr(), threshold, keep_scale),
    )
    return out


def _launch(name: str, device: torch.device, **arguments) -> None:
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        getattr(extension()[0], name)(**arguments, device=device.index, stream=stream)


def _kernel(device: torch.device) -> str | None:
    """Which of the compiled kernels serves `device`."""
    capability = torch.cuda.get_device_capability(device)
    compiled = extension()[0].two_segment_kernels
    if capability == (9, 0) and "sm90" in compiled:
        return "sm90"
    return "sm80" if capability >= (8, 0) and "sm80" in compiled else None


def _variant(kernel: str, M: int, N: int, dropout: bool, device: torch.device) -> dict:
    """On sm_90 the wide tile if it keeps every processor busy, and always with dropout."""
    wide_tiles = -(-M // TILE) * -(-N // WIDE)
    if kernel != "sm90" or not dropout and (N <= TILE or wide_tiles < _processors(device)):
        return {"block_n": TILE, "cluster": 1}
    return {"block_n": WIDE, "cluster": 1 if dropout else CLUSTER}


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _dropout(p: float, seed) -> tuple:
    """(seed, drop an element if its 16 random bits are below this, 1 / the probability to keep)."""
    return seed, *dropout_constants(p)


def _padded(cols: int) -> int:
    return -(-cols // PER_16_BYTES) * PER_16_BYTES


def _rows(t: torch.Tensor, dtype=None) -> torch.Tensor:
    """`t` in `dtype`; a padded copy unless its rows are contiguous, apart and 16-byte aligned."""
    rows, cols = t.shape
    starts = t.stride(0) % PER_16_BYTES == 0 and t.stride(0) >= cols and t.data_ptr() % 16 == 0
    if t.dtype == (dtype or t.dtype) and starts and (t.stride(1) == 1 or cols == 1):
        return t
    return t.new_empty(rows, _padded(cols), dtype=dtype)[:, :cols].copy_(t)


def _matrix(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """Pointer and strides in elements."""
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), 1)
