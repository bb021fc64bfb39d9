"""merge_: W <- round(W + s * B @ A) in place.

The specification of the merge. The kernels of the other backends compute, for each element,

    d = fl32(fl32(s) * (B @ A))      products accumulated in float32
    v = fl32(W + d)                  compensated: v = fl32(fl32(W + residual) + d)

and round v once to W's dtype. (float64 weights: the same in float64, for gradcheck-like oracles.)
"""

from __future__ import annotations

import torch

from relora_kernels.reference import philox

_ROW_BLOCK_ELEMENTS = 2**24  # keeps float32 temporaries under about 200 MB for any size of W
_BF16_MAX_BITS = 0x7F7F0000


def why_not(weight, lora_A, lora_B, scaling, rounding, residual, seed, first_row) -> str | None:
    return None


def merge_(weight, lora_A, lora_B, scaling, rounding, residual, seed, first_row) -> None:
    """weight (out, in), lora_A (r, in), lora_B (out, r), residual (out, in) or None; all 2-D.

    `first_row` is the logical row of weight[0] (of a shard): random bits belong to logical elements.
    """
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a = lora_A.to(work)
    rows_at_once = max(1, _ROW_BLOCK_ELEMENTS // max(1, weight.shape[1]))
    compensated = rounding == "compensated" and residual is not None
    # W is written after all of it has been computed, so running out of memory changes nothing.
    merged = torch.empty_like(weight)
    rest = torch.empty_like(residual) if compensated else None
    for row in range(0, weight.shape[0], rows_at_once):
        rows = slice(row, row + rows_at_once)
        value = weight[rows].to(work)
        if compensated:
            value = value + residual[rows].to(work)
        value = value + (lora_B[rows].to(work) @ a) * _as(scaling, work)
        if rounding == "stochastic" and weight.dtype in (torch.bfloat16, torch.float16):
            bits = philox.bits16(
                seed, philox.STREAM_ROUND, tuple(value.shape), (first_row + row, 0), weight.device
            )
            merged[rows] = stochastic_round(value, bits, weight.dtype)
        else:
            merged[rows] = value
        if compensated:
            rest[rows] = value - merged[rows].to(work)
    if compensated:
        residual.copy_(rest)
    weight.copy_(merged)


def merge_many_(merges, restarts=None, merge_one=None) -> None:
    """Every merge, a tuple of merge_'s arguments, one after the other, by merge_ or another backend's.

    `restarts`: for each merge (lora_A, lora_B, merge_count, bound, seed, first_row), or None. After W is
    written, lora_A (the parameter, or the rows of its shard) is drawn from U(-bound, bound) by
    (seed, first_row), lora_B is zeroed, and 1 is added to merge_count. Whatever can run out of memory comes
    before the write, so a layer is either merged and restarted, or untouched.
    """
    merge_one = merge_one or merge_
    for merge, restart in zip(merges, restarts or [None] * len(merges)):
        if restart is None:
            merge_one(*merge)
            continue
        lora_A, lora_B, merge_count, bound, seed, first_row = restart
        drawn = philox.uniform_(torch.empty_like(lora_A), first_row, bound, seed)
        merge_one(*merge)
        lora_B.zero_()
        lora_A.copy_(drawn)
        merge_count += 1


def stochastic_round(value: torch.Tensor, bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 `value` to `dtype` (bfloat16 or float16) with 16 random `bits` (int64) per element.

    Rounds away from zero with probability equal to the discarded fraction, so the mean is exact to
    2^-16 of a step (float16: 2^-13). inf, NaN and values above the largest finite number round to nearest.
    """
    magnitude = value.abs()
    raw = value.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if dtype == torch.bfloat16:
        rounded = _from_bits((raw + bits) & 0xFFFF0000)
        in_range = (raw & 0x7FFFFFFF) <= _BF16_MAX_BITS
    else:
        rounded = _from_bits((raw + (bits >> 3)) & 0xFFFFE000)
        # Below 2^-14 float16 is a fixed-point grid of 2^-24, coarser than the bits masked above.
        scaled = magnitude * 2.0**24
        floor = scaled.floor()
        up = bits < (scaled - floor) * 65536.0
        subnormal = torch.copysign((floor + up) * 2.0**-24, value)
        rounded = torch.where(magnitude < 2.0**-14, subnormal, rounded)
        in_range = magnitude <= 65504.0
    return torch.where(in_range, rounded, value).to(dtype)


def _from_bits(bits: torch.Tensor) -> torch.Tensor:
    """int64 holding 32 bits -> float32."""
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def _as(scaling: float, dtype: torch.dtype) -> float:
    """`scaling` rounded to `dtype`, as a Python float."""
    return torch.tensor(scaling, dtype=dtype).item()
