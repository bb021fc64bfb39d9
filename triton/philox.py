"""The random-bit contract of relora_kernels/reference/philox.py, for Triton kernels."""

import triton
import triton.language as tl

STREAM_ROUND = tl.constexpr(0)
STREAM_DROPOUT = tl.constexpr(1)


@triton.jit
def bits16(seed, stream, rows, cols0, COLS: tl.constexpr):
    """(len(rows), COLS) uint32 below 2^16 for the elements (rows, cols0 ... cols0 + COLS - 1).

    cols0 and COLS are multiples of 8: one draw of four words serves eight neighbours in a row.
    """
    block = (cols0 // 8 + tl.arange(0, COLS // 8)).to(tl.uint32)
    row = rows.to(tl.uint32)
    c0 = block[None, :] + tl.zeros_like(row)[:, None]
    c1 = row[:, None] + tl.zeros_like(block)[None, :]
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + stream, zero)
    # Element lanes 0..7 are (w0 low, w0 high, w1 low, ...); interleaving a, b gives a0, b0, a1, b1.
    low = tl.interleave(
        tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF)
    )
    high = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
    return tl.interleave(low, high)
