"""Random pruning in Triton, each element by itself. Contract: relora_kernels/reference/prune.py.

Memory traffic per element: 8 bytes in float32, 4 in 16 bits, and as much again for a partner.
"""

import torch
import triton
import triton.language as tl

from relora_kernels._triton import prune
from relora_kernels.reference import philox
from relora_kernels.reference.prune import drop_below

STREAM_PRUNE = tl.constexpr(philox.STREAM_PRUNE)
# Columns of the int64 table, which has one row per tensor.
ADDRESS, PARTNER, SIZE, SEED, FIRST, COLUMNS = (tl.constexpr(i) for i in range(6))


@triton.jit
def random_kernel(
    table_ptr, threshold,
    DTYPE: tl.constexpr, PAIRED: tl.constexpr, PARTNER_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zero the elements whose 32 random bits are below `threshold`.

    Each element draws four words and uses one: memory traffic hides the arithmetic, and `first` need
    not be a multiple of 4.
    """
    table = table_ptr + tl.program_id(1) * COLUMNS
    address = tl.load(table + ADDRESS)
    partner = tl.load(table + PARTNER)
    size = tl.load(table + SIZE)
    seed = tl.load(table + SEED)
    first = tl.load(table + FIRST)
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at = block * tl.full((), BLOCK, tl.int64) + tl.arange(0, BLOCK)
        inside = at < size
        full = (block + 1) * BLOCK <= size
        number = first + at
        counter = (number // 4).to(tl.uint32)
        zero = tl.zeros_like(counter)
        w0, w1, w2, w3 = tl.philox(seed, counter, zero, zero + STREAM_PRUNE, zero)
        lane = number % 4
        bits = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
        dropped = bits.to(tl.int64) < threshold
        pointers = prune.elements(address, at, DTYPE)
        raw = prune.load_block(pointers, inside, full)
        prune.store_block(pointers, tl.where(dropped, 0, raw), inside, full)
        if PAIRED:
            pointers = prune.elements(partner, at, PARTNER_DTYPE)
            raw = prune.load_block(pointers, inside, full)
            prune.store_block(pointers, tl.where(dropped, 0, raw), inside, full)


def why_not_random(tensors, ratio, paired_with, seeds, first_elements) -> str | None:
    return prune.why_not(tensors, ratio, paired_with)


def prune_random_(tensors, ratio, paired_with, seeds, first_elements) -> None:
    """Arguments as in reference/prune.py, on one device."""
    groups: dict = {}
    for i, t in enumerate(tensors):
        if t.numel() > 0:
            partner = paired_with[i] if paired_with else None
            kind = (t.dtype, partner.dtype if paired_with else None)
            groups.setdefault(kind, []).append((t, partner, seeds[i], first_elements[i]))
    for rows in groups.values():
        with torch.cuda.device_of(rows[0][0]):
            for i in range(0, len(rows), prune.MOST_TENSORS):
                _prune_group(rows[i : i + prune.MOST_TENSORS], drop_below(ratio))
    torch.autograd.graph.increment_version([*tensors, *paired_with])


def _prune_group(rows, threshold: int) -> None:
    """Prune rows (tensor, partner or None, seed, first element) with the same dtypes in one launch."""
    flat = [(prune._aligned(t), None if p is None else prune._aligned(p)) for t, p, _, _ in rows]
    table = torch.tensor(
        [
            [t.data_ptr(), 0 if p is None else p.data_ptr(), t.numel(), seed, first]
            for (t, p), (_, _, seed, first) in zip(flat, rows)
        ],
        dtype=torch.int64,
    )
    first, partner = flat[0]
    blocks = triton.cdiv(max(t.numel() for t, _ in flat), prune.SWEEP["BLOCK"])
    random_kernel[(min(blocks, prune.PROGRAMS), len(flat))](
        table.to(first.device, non_blocking=True),
        threshold,
        DTYPE=prune.DTYPES[first.dtype],
        PAIRED=partner is not None,
        PARTNER_DTYPE=prune.DTYPES[first.dtype if partner is None else partner.dtype],
        **prune.SWEEP,
    )
    for (t, p, _, _), (copy, partner_copy) in zip(rows, flat):
        if copy is not t:
            t.copy_(copy)
        if partner_copy is not p:
            p.copy_(partner_copy)
