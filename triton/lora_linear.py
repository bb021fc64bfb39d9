"""lora_linear in Triton: forward and backward. Formulas: relora_kernels/reference/lora_linear.py.

    low_rank     P = s dropout(x) A^T and Q = s dy B        x or dy read once, scale in the epilogue
    two_segment  y = P B^T + x W^T + bias, dx = Q A + dy W  one float32 accumulator, one store
    split        dA = Q^T dropout(x), dB = dy^T P, dbias    M cut into slabs, summed in a fixed order

FLOPs: 2 M (N K + r (N + K)) forward, 2 M (N K + 2 r (N + K)) backward. No atomics, so the results are
bitwise repeatable. The dropout mask is drawn again wherever it is needed; only its seed is stored.
"""

import torch
import triton
import triton.language as tl

from relora_kernels import backend
from relora_kernels._triton import philox
from relora_kernels.reference.lora_linear import dropout_constants

# Tile sizes, keyed by element size in bytes. float32 is multiplied in float32 on the ordinary units,
# where large tiles spill. Masked float32 operands use 32-row tiles: with 64 rows, Triton 3.7 silently
# uses tf32 on sm_100, even under `ieee`, because it takes values selected by a mask of joined words
# for values widened from 16 bits.
LOW_RANK = {
    2: {"BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4},
    4: {"BLOCK_M": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 4},
}
LOW_RANK_MOST_R = 128  # BLOCK_R = r rounded up to a power of two, at least 16, at most this
# Then by the least shared memory per block, in bytes: A100, Hopper, data-centre Blackwell; others.
TWO_SEGMENT = {
    2: {
        160_000: {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        0: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    },
    4: {0: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3}},
}
# The mask is drawn while the accumulator is live: 71 spills at 128 x 256 on sm_90, none at 128 x 128.
TWO_SEGMENT_DROPOUT = {
    2: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    4: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3},
}
# Up to this many rows, reading W dominates the time. wgmma multiplies at least 64 rows.
FEW_ROWS = 64
TWO_SEGMENT_FEW_ROWS = {
    2: {"BLOCK_M": FEW_ROWS, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    4: {"BLOCK_M": FEW_ROWS, "BLOCK_N": 128, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3},
}
# Overrides for operands that cannot be loaded 16 bytes at a time: a pointer for each element fills the registers, and
# the loads are not pipelined. 128 x 256 would take hundreds of spill instructions, and thousands on sm_80.
TWO_SEGMENT_ODD = {2: {"BLOCK_N": 128, "BLOCK_K": 32}, 4: {"BLOCK_N": 64}}
MULTIPLE = 16  # elements; the only divisibility of sizes and pitches that Triton specialises on
SPLIT = {
    2: {"BLOCK_L": 128, "BLOCK_R": 128, "BLOCK_M": 32, "num_warps": 8, "num_stages": 3},
    4: {"BLOCK_L": 32, "BLOCK_R": 64, "BLOCK_M": 16, "num_warps": 4, "num_stages": 3},
}
SPLIT_PROGRAMS = 264  # M is cut into slabs to reach this many programs: two per SM of an H100
REDUCE = {"BLOCK": 1024, "num_warps": 4}
GROUP_M = 8  # row tiles that share a pass over W, for L2 hits
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def plus_product(acc, left, right, PRECISION: tl.constexpr):
    """acc + left @ right, one step of a long sum.

    The ordinary units add a float32 product's terms one after the other. Starting from acc would chain
    all steps, with the rounding error of one long chain, so each step's terms are summed separately.
    (The compiler folds `acc + tl.dot(left, right)` back into one chain; a difference it leaves alone.)
    """
    if PRECISION == "ieee":
        return acc - tl.dot(-left, right, input_precision=PRECISION)
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def low_rank_kernel(
    x_ptr, a_ptr, p_ptr, seed_ptr,
    M, K, r, x_stride, a_stride, scaling, threshold,
    A_IS_R_BY_K: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p (M, r) = scaling * dropout(x (M, K)) @ a, a given as (r, K) or (K, r)."""
    tiles_r = tl.cdiv(r, BLOCK_R)  # neighbouring programs share a tile of x, through L2
    rows = (tl.program_id(0) // tiles_r) * BLOCK_M + tl.arange(0, BLOCK_M)
    rs = (tl.program_id(0) % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + ks[None, :], mask=(rows < M)[:, None] & (ks < K)[None, :], other=0.0)
        if DROPOUT:
            bits = philox.bits16(seed, philox.STREAM_DROPOUT, rows, k0, BLOCK_K)
            x = tl.where(bits >= threshold, x, 0.0)
        if A_IS_R_BY_K:
            a_ptrs = a_ptr + rs.to(tl.int64)[None, :] * a_stride + ks[:, None]
        else:
            a_ptrs = a_ptr + ks.to(tl.int64)[:, None] * a_stride + rs[None, :]
        a = tl.load(a_ptrs, mask=(ks < K)[:, None] & (rs < r)[None, :], other=0.0)
        acc = plus_product(acc, x, a, PRECISION)
    p_ptrs = p_ptr + rows.to(tl.int64)[:, None] * r + rs[None, :]
    p = (acc * scaling).to(p_ptr.dtype.element_ty)
    tl.store(p_ptrs, p, mask=(rows < M)[:, None] & (rs < r)[None, :])


@triton.jit
def output_tile(row_tiles, col_tiles, GROUP_M: tl.constexpr):
    """(row, column) of this program's tile: GROUP_M rows of tiles share a pass over the columns."""
    group = tl.program_id(0) // (GROUP_M * col_tiles)
    first = group * GROUP_M
    group_rows = min(row_tiles - first, GROUP_M)
    within = tl.program_id(0) - group * GROUP_M * col_tiles
    return first + within % group_rows, within // group_rows


@triton.jit
def two_segment_kernel(
    out_ptr, p_ptr, b_ptr, x_ptr, w_ptr, bias_ptr, seed_ptr,
    M, N, K, r, p_stride, b_stride, x_stride, w_stride, keep_scale, threshold,
    W_IS_N_BY_K: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (M, N) = dropout'(p (M, r) @ b) + x (M, K) @ w + bias, w and b given as (N, K) or (K, N).

    One loop over the k-steps of both segments switches base pointers, so the pipeline stays full
    between them. With dropout there are two loops, because the mask applies to the first segment only.
    """
    row_tile, col_tile = output_tile(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col0 = col_tile * BLOCK_N
    cols = col0 + tl.arange(0, BLOCK_N)
    low_steps = tl.cdiv(r, BLOCK_K)
    steps = low_steps + tl.cdiv(K, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if DROPOUT:
        for step in range(0, low_steps):
            acc = _two_segment_step(
                acc, step, low_steps, rows, cols, p_ptr, b_ptr, x_ptr, w_ptr, M, N, K, r,
                p_stride, b_stride, x_stride, w_stride, W_IS_N_BY_K, PRECISION, BLOCK_K,
            )  # fmt: skip
        bits = philox.bits16(tl.load(seed_ptr), philox.STREAM_DROPOUT, rows, col0, BLOCK_N)
        acc = tl.where(bits >= threshold, acc * keep_scale, 0.0)
        for step in range(low_steps, steps):
            acc = _two_segment_step(
                acc, step, low_steps, rows, cols, p_ptr, b_ptr, x_ptr, w_ptr, M, N, K, r,
                p_stride, b_stride, x_stride, w_stride, W_IS_N_BY_K, PRECISION, BLOCK_K,
            )  # fmt: skip
    else:
        for step in range(0, steps):
            acc = _two_segment_step(
                acc, step, low_steps, rows, cols, p_ptr, b_ptr, x_ptr, w_ptr, M, N, K, r,
                p_stride, b_stride, x_stride, w_stride, W_IS_N_BY_K, PRECISION, BLOCK_K,
            )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(
        out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :]
    )


@triton.jit
def _two_segment_step(
    acc, step, low_steps, rows, cols, p_ptr, b_ptr, x_ptr, w_ptr, M, N, K, r,
    p_stride, b_stride, x_stride, w_stride,
    W_IS_N_BY_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + one k-step: of (p, b) before low_steps, of (x, w) from then on."""
    low = step < low_steps
    ks = tl.where(low, step, step - low_steps) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = ks < tl.where(low, r, K)
    left = tl.where(low, p_ptr, x_ptr)
    right = tl.where(low, b_ptr, w_ptr)
    left_stride = tl.where(low, p_stride, x_stride)
    right_stride = tl.where(low, b_stride, w_stride)
    a = tl.load(
        left + rows.to(tl.int64)[:, None] * left_stride + ks[None, :],
        mask=(rows < M)[:, None] & k_ok[None, :], other=0.0,
    )  # fmt: skip
    if W_IS_N_BY_K:
        b_ptrs = right + cols.to(tl.int64)[None, :] * right_stride + ks[:, None]
    else:
        b_ptrs = right + ks.to(tl.int64)[:, None] * right_stride + cols[None, :]
    b = tl.load(b_ptrs, mask=k_ok[:, None] & (cols < N)[None, :], other=0.0)
    return plus_product(acc, a, b, PRECISION)


@triton.jit
def split_kernel(
    partial_ptr, bias_ptr, left_ptr, right_ptr, seed_ptr,
    M, L, R, left_stride, right_stride, slab_rows, threshold,
    DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """partial (slab, L, R) = left (M, L)^T @ dropout(right (M, R)) over the slab's rows of M, in fp32.

    HAS_BIAS: also bias (slab, L), the column sums of left.
    """
    tiles_r = tl.cdiv(R, BLOCK_R)
    tile_r = tl.program_id(0) % tiles_r
    col0 = tile_r * BLOCK_R
    ls = (tl.program_id(0) // tiles_r) * BLOCK_L + tl.arange(0, BLOCK_L)
    rs = col0 + tl.arange(0, BLOCK_R)
    slab = tl.program_id(1)
    start = slab * slab_rows
    end = min(start + slab_rows, M)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_L, BLOCK_R), dtype=tl.float32)
    column_sums = tl.zeros((BLOCK_L,), dtype=tl.float32)
    for m0 in range(start, end, BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M)
        row64 = rows.to(tl.int64)
        row_ok = rows < end
        left = tl.load(
            left_ptr + row64[None, :] * left_stride + ls[:, None],
            mask=row_ok[None, :] & (ls < L)[:, None], other=0.0,
        )  # fmt: skip
        right = tl.load(
            right_ptr + row64[:, None] * right_stride + rs[None, :],
            mask=row_ok[:, None] & (rs < R)[None, :], other=0.0,
        )  # fmt: skip
        if DROPOUT:
            bits = philox.bits16(seed, philox.STREAM_DROPOUT, rows, col0, BLOCK_R)
            right = tl.where(bits >= threshold, right, 0.0)
        acc = plus_product(acc, left, right, PRECISION)
        if HAS_BIAS:
            column_sums += tl.sum(left.to(tl.float32), axis=1)
    partial = partial_ptr + slab.to(tl.int64) * L * R
    tl.store(
        partial + ls.to(tl.int64)[:, None] * R + rs[None, :],
        acc, mask=(ls < L)[:, None] & (rs < R)[None, :],
    )  # fmt: skip
    if HAS_BIAS:
        tl.store(bias_ptr + slab * L + ls, column_sums, mask=(ls < L) & (tile_r == 0))


@triton.jit
def reduce_kernel(partial_ptr, out_ptr, size, slabs, scale, BLOCK: tl.constexpr):
    """out (size,) = scale * sum over slabs of partial (slabs, size), first slab first."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    in_slab = partial_ptr + at
    for _ in range(0, slabs):
        total += tl.load(in_slab, mask=at < size, other=0.0)
        in_slab += size
    tl.store(out_ptr + at, (total * scale).to(out_ptr.dtype.element_ty), mask=at < size)


def why_not_forward(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed) -> str | None:
    if x.dtype not in DTYPES:
        return f"x in {x.dtype}; the kernels take bfloat16, float16 and float32"
    return backend.why_not_in_triton(x, low_rank_kernel)


def why_not_backward(
    dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, seed, *needed
) -> str | None:  # fmt: skip
    return why_not_forward(x, weight, lora_A, lora_B, scaling, None, dropout_p, seed)


def forward(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, *, two_segment=None):
    """x (M, in) -> y (M, out), P (M, r), both in x's dtype. `two_segment`: replaces `_two_segment`."""
    two_segment, r = two_segment or _two_segment, lora_A.shape[0]
    x, weight = unit_columns(x), unit_columns(weight)
    a, b = _compute_copy(lora_A, x, 0), _compute_copy(lora_B, x, 1)
    with torch.cuda.device_of(x):
        p = _low_rank(x, a, True, scaling, dropout_p, seed)
        y = two_segment(p, b, x, weight, True, bias, 0.0, None)
    return y, p[:, :r].contiguous()


def backward(
    dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, seed,
    need_dx, need_dA, need_dB, need_dbias, *, two_segment=None,
):  # fmt: skip
    """dy (M, out) -> dx (M, in), dA (r, in), dB (out, r), dbias (out,) in float32.

    A gradient that is not needed comes back with 0 elements.
    """
    two_segment = two_segment or _two_segment
    dy, x, weight = unit_columns(dy), unit_columns(x), unit_columns(weight)
    dx, dlora_A, dlora_B = x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    dbias = dy.new_empty(0, dtype=torch.float32)
    with torch.cuda.device_of(x):
        if need_dx or need_dA:
            q = _low_rank(dy, _compute_copy(lora_B, x, 1), False, scaling, 0.0, None)
        if need_dx:
            a = _compute_copy(lora_A, x, 0)
            dx = two_segment(q, a, dy, weight, False, None, dropout_p, seed)
        if need_dA:
            dlora_A, _ = _split(q[:, : len(lora_A)], x, lora_A.dtype, dropout_p, seed, False)
        if need_dB or need_dbias:
            dlora_B_and_dbias = _split(dy, p, lora_B.dtype, 0.0, None, need_dbias)
            dlora_B = dlora_B_and_dbias[0] if need_dB else dlora_B
            dbias = dlora_B_and_dbias[1] if need_dbias else dbias
    return dx, dlora_A, dlora_B, dbias


def main_loop(x, weight, *, two_segment=None) -> torch.Tensor:
    """x W^T (M, out): the two-segment product without its first segment, for benchmarks."""
    none = x.new_empty(1, MULTIPLE)[:, :0]
    two_segment = two_segment or _two_segment
    with torch.cuda.device_of(x):
        return two_segment(
            none.expand(len(x), 0),
            none,
            unit_columns(x),
            unit_columns(weight),
            True,
            None,
            0.0,
            None,
        )


def _low_rank(x, a, a_is_r_by_k: bool, scaling: float, dropout_p: float, seed) -> torch.Tensor:
    (M, K), r = x.shape, a.shape[0 if a_is_r_by_k else 1]
    p = x.new_empty(M, r)
    config = LOW_RANK[x.element_size()]
    block_r = min(max(16, triton.next_power_of_2(r)), LOW_RANK_MOST_R)
    threshold, keep_scale = dropout_constants(dropout_p)
    if p.numel() > 0:
        low_rank_kernel[(triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(r, block_r),)](
            x, a, p, x if seed is None else seed,
            M, K, r, x.stride(0), a.stride(0), scaling * keep_scale, threshold,
            A_IS_R_BY_K=a_is_r_by_k, DROPOUT=dropout_p > 0.0, PRECISION=precision(x),
            BLOCK_R=block_r, **config,
        )  # fmt: skip
    return p


def _two_segment(p, b, x, w, w_is_n_by_k: bool, bias, dropout_p: float, seed) -> torch.Tensor:
    (M, K), N, r = x.shape, w.shape[0 if w_is_n_by_k else 1], p.shape[1]
    out = x.new_empty(M, N)
    sizes = [K, r, *(t.stride(0) for t in (p, b, x, w)), *([] if w_is_n_by_k else [N])]
    odd = any(n % MULTIPLE for n in sizes) or any(t.data_ptr() % 16 for t in (p, b, x, w))
    config = two_segment_config(M, dropout_p, x, odd)
    threshold, keep_scale = dropout_constants(dropout_p)
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    if out.numel() > 0:
        two_segment_kernel[(tiles,)](
            out, p, b, x, w, x if bias is None else bias, x if seed is None else seed,
            M, N, K, r, p.stride(0), b.stride(0), x.stride(0), w.stride(0), keep_scale, threshold,
            W_IS_N_BY_K=w_is_n_by_k, HAS_BIAS=bias is not None, DROPOUT=dropout_p > 0.0,
            PRECISION=precision(x), GROUP_M=GROUP_M, **config,
        )  # fmt: skip
    return out


def _split(left, right, dtype, dropout_p: float, seed, want_bias: bool):
    """left (M, L), right (M, R) -> left^T dropout(right) (L, R) in `dtype`, column sums of left (L,)."""
    (M, L), R = left.shape, right.shape[1]
    config = SPLIT[left.element_size()]
    tiles = triton.cdiv(L, config["BLOCK_L"]) * triton.cdiv(R, config["BLOCK_R"])
    slabs = max(1, min(triton.cdiv(SPLIT_PROGRAMS, max(1, tiles)), triton.cdiv(M, 256)))
    slab_rows = triton.cdiv(triton.cdiv(M, slabs), config["BLOCK_M"]) * config["BLOCK_M"]
    threshold, keep_scale = dropout_constants(dropout_p)
    partial = left.new_empty((slabs, L, R), dtype=torch.float32)
    sums = left.new_empty((slabs, L if want_bias else 0), dtype=torch.float32)
    if tiles > 0:
        split_kernel[(tiles, slabs)](
            partial, sums, left, right, left if seed is None else seed,
            M, L, R, left.stride(0), right.stride(0), slab_rows, threshold,
            DROPOUT=dropout_p > 0.0, HAS_BIAS=want_bias, PRECISION=precision(left), **config,
        )  # fmt: skip
    return _reduced(partial, keep_scale, dtype), _reduced(sums, 1.0, torch.float32)


def _reduced(partial, scale: float, dtype) -> torch.Tensor:
    out = partial.new_empty(partial.shape[1:], dtype=dtype)
    if out.numel() > 0:
        grid = (triton.cdiv(out.numel(), REDUCE["BLOCK"]),)
        reduce_kernel[grid](partial, out, out.numel(), len(partial), scale, **REDUCE)
    return out


def two_segment_config(M: int, dropout_p: float, x: torch.Tensor, odd: bool) -> dict:
    size = x.element_size()
    if M <= FEW_ROWS:
        config = TWO_SEGMENT_FEW_ROWS[size]
    elif dropout_p > 0.0:
        config = TWO_SEGMENT_DROPOUT[size]
    else:
        shared = shared_memory(x.device)
        config = next(config for least, config in TWO_SEGMENT[size].items() if shared >= least)
    return config | TWO_SEGMENT_ODD[size] if odd else config


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may use; the interpreter has no limit."""
    if device.type != "cuda":
        return 2**31
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def precision(x: torch.Tensor) -> str:
    """For tl.dot: no tf32 for float32, as is torch's default. 16-bit types ignore it."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _compute_copy(factor: torch.Tensor, x: torch.Tensor, rank: int) -> torch.Tensor:
    """`factor` in x's dtype, zero-padded to a multiple of 16 in dimension `rank`, the one of size r.

    One loop loads both segments: if P had the pitch r = 8, x would also be loaded two bytes at a time.
    """
    r = factor.shape[rank]
    if r % MULTIPLE == 0:
        return unit_columns(factor.to(x.dtype))
    shape = list(factor.shape)
    shape[rank] += -r % MULTIPLE
    padded = x.new_zeros(shape)
    padded.narrow(rank, 0, r).copy_(factor)
    return padded


def unit_columns(t: torch.Tensor) -> torch.Tensor:
    """`t` with a column stride of 1; a view or expansion with another stride is copied."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()
