"""Histograms of magnitude keys in Triton, for sharded pruning. Contract: relora_kernels/reference/prune.py.

Memory traffic per element: 4 bytes in float32, 2 in 16 bits.
"""

import torch
import triton
import triton.language as tl

from relora_kernels._triton import prune
from relora_kernels.reference.prune import NONE_ABOVE

MOST_BITS = 11  # tl.histogram spills above 2048 bins
LEAST_BINS = 32
NONE = tl.constexpr(NONE_ABOVE)
# Columns of the int64 table, which has one row per tensor.
ADDRESS, SIZE, PREFIX, COLUMNS = (tl.constexpr(i) for i in range(4))


@triton.jit
def counts_kernel(
    table_ptr, counts_ptr, lowest_ptr, highest_ptr,
    SHIFT: tl.constexpr, BITS: tl.constexpr, BINS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add one tensor's blocks to counts (tensor, BINS), lowest and highest (tensor,), by atomics."""
    tensor = tl.program_id(1)
    table = table_ptr + tensor * COLUMNS
    address = tl.load(table + ADDRESS)
    size = tl.load(table + SIZE)
    prefix = tl.load(table + PREFIX)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    lowest = tl.full((BLOCK,), NONE, dtype=tl.int64)
    highest = tl.full((BLOCK,), -1, dtype=tl.int64)
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at = block * tl.full((), BLOCK, tl.int64) + tl.arange(0, BLOCK)
        inside = at < size
        full = (block + 1) * BLOCK <= size
        raw = prune.load_block(prune.elements(address, at, DTYPE), inside, full)
        keys = prune.key_of(raw, DTYPE)
        higher = keys.to(tl.int64) >> (SHIFT + BITS)
        digit = (keys >> SHIFT) & ((1 << BITS) - 1)
        counts += tl.histogram(digit, BINS, mask=inside & (higher == prefix))
        lowest = tl.minimum(lowest, tl.where(inside & (higher > prefix), keys.to(tl.int64), NONE))
        highest = tl.maximum(highest, tl.where(inside, keys.to(tl.int64), -1))
    bins = tl.arange(0, BINS)
    target = counts_ptr + tensor * BINS + bins
    tl.atomic_add(target, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    tl.atomic_min(lowest_ptr + tensor, tl.min(lowest, 0), sem="relaxed")
    tl.atomic_max(highest_ptr + tensor, tl.max(highest, 0), sem="relaxed")


def why_not_counts(tensors, prefixes, shift, bits) -> str | None:
    if bits > MOST_BITS:
        return f"digits of {bits} bits; the kernel counts up to {MOST_BITS}"
    return prune.why_not(tensors, None, [])


def magnitude_counts(tensors, prefixes, shift, bits):
    """Arguments and results as in reference/prune.py."""
    device, bins = prefixes.device, max(2**bits, LEAST_BINS)
    flat = [prune._aligned(t) for t in tensors]
    counts = torch.zeros(len(flat), bins, dtype=torch.int64, device=device)
    lowest = torch.full((len(flat),), NONE_ABOVE, dtype=torch.int64, device=device)
    highest = torch.full_like(lowest, -1)
    known = torch.tensor([[t.data_ptr(), t.numel()] for t in flat], dtype=torch.int64)
    known = known.to(device, non_blocking=True)
    table = torch.cat([known, prefixes[:, None]], dim=1)
    blocks = triton.cdiv(max(t.numel() for t in flat), prune.SWEEP["BLOCK"])
    with torch.cuda.device_of(prefixes):
        counts_kernel[(max(1, min(blocks, prune.PROGRAMS)), len(flat))](
            table, counts, lowest, highest,
            SHIFT=shift, BITS=bits, BINS=bins, DTYPE=prune.DTYPES[flat[0].dtype], **prune.SWEEP,
        )  # fmt: skip
    return counts[:, : 2**bits], lowest, highest
