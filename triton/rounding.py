"""16-bit floats as their bits, for Triton kernels: 16-bit weights are passed as int16.

Integer arithmetic gives the same result in the compiler and in the CPU interpreter, whose bfloat16
arithmetic is wrong. Rules: relora_kernels/reference/merge.py.
"""

import triton
import triton.language as tl


@triton.jit
def widen(raw, DTYPE: tl.constexpr):
    """Values as tl.load returns them for DTYPE ("bf16" and "fp16" as int16, "fp32") -> float32."""
    if DTYPE == "bf16":
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == "fp16":
        return raw.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return raw


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """float32 -> DTYPE in the form `widen` takes, rounded to nearest, ties to even."""
    if DTYPE == "bf16":
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(is_nan, (bits >> 16) | 0x40, rounded).to(tl.int16)
    elif DTYPE == "fp16":
        return value.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        return value


@triton.jit
def narrow_stochastic(value, random16, DTYPE: tl.constexpr):
    """float32 -> DTYPE, away from zero with probability equal to the discarded fraction.

    inf, NaN and values above the largest finite number are rounded to nearest.
    """
    bits = value.to(tl.uint32, bitcast=True)
    if DTYPE == "bf16":
        rounded = ((bits + random16) >> 16).to(tl.int16)
        in_range = (bits & 0x7FFFFFFF) <= 0x7F7F0000
        return tl.where(in_range, rounded, narrow(value, DTYPE))
    elif DTYPE == "fp16":
        magnitude = tl.abs(value)
        normal = ((bits + (random16 >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Below 2^-14 float16 is a fixed-point grid of 2^-24, coarser than the bits masked above.
        scaled = magnitude * 16777216.0
        floor = tl.floor(scaled)
        up = random16.to(tl.float32) < (scaled - floor) * 65536.0
        grid = (floor + up.to(tl.float32)) * (1.0 / 16777216.0)
        sign = bits & 0x80000000
        subnormal = (grid.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        rounded = tl.where(magnitude < 0.00006103515625, subnormal, normal)
        return narrow(tl.where(magnitude <= 65504.0, rounded, value), DTYPE)
    else:
        return value
