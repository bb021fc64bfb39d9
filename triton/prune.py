"""prune_ in Triton: exact magnitude pruning of a list of tensors. Contract: relora_kernels/reference/prune.py.

A radix selection on the bits of |t|, which order as the numbers do (NaN last), in a few launches for the
whole list and without synchronising with the host:

    count      histogram of the top 11 bits                                  one read
    select     the bin of the order statistic just below the quantile
    partition  zero the elements below the bin, list those in it             one read, one write
    count, select    the next bits of the listed elements, once or twice
    finish     zero the listed elements up to the threshold

The later steps go over the whole tensor if the bin holds more elements than the list (ties, constant
tensors), if a NaN decides, or if rounding lifts the threshold to an element above the bin.
Memory traffic per element: 12 bytes in float32, 6 in 16 bits (8 and 4 for a partner), plus that of the
listed elements, a few per cent of all.
"""

import itertools

import torch
import triton
import triton.language as tl

from relora_kernels import backend
from relora_kernels._triton import rounding
from relora_kernels.reference.prune import quantile_rank

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SWEEP = {"BLOCK": 2048, "num_warps": 8}
SELECT = {"num_warps": 4}
PROGRAMS = 1056  # per tensor, at most: eight for each SM of an H100
MOST_TENSORS = 65535  # in one launch: CUDA's limit on the grid's y dimension
DIGITS = {2: (11, 4), 4: (11, 10, 10)}  # bits of a key's digits, keyed by element size in bytes
BINS = tl.constexpr(2048)  # of the widest digit; tl.histogram spills above
# The list has room for one element in this many. A normal tensor's bin holds 6.05 % at most, 4 % at ratio 0.9.
LISTED = 16

# Columns, int64, one row per tensor: the host writes `table`, the kernels write `state` (from zeros).
ADDRESS, PARTNER, SIZE, RANK, LIST, ROOM, COLUMNS = (tl.constexpr(i) for i in range(7))
PREFIX, LEFT, ABOVE, TOP, COUNT, THRESHOLD, WHOLE, STATES = (tl.constexpr(i) for i in range(8))
LARGEST = tl.constexpr(0x7FFFFFFF)  # ABOVE and TOP are maxima, so ABOVE holds LARGEST - key


@triton.jit
def elements(address, at, DTYPE: tl.constexpr):
    """Pointers to these elements, as integers. The launcher ensures 16-byte alignment."""
    if DTYPE == "fp32":
        return tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16) + at
    else:
        return tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16) + at


@triton.jit
def key_of(raw, DTYPE: tl.constexpr):
    """|t| from its bits: int32 keys that order as the numbers do."""
    if DTYPE == "fp32":
        return raw & 0x7FFFFFFF
    else:
        return raw.to(tl.int32) & 0x7FFF


@triton.jit
def load_block(pointers, inside, full):
    """Load 16 bytes at a time if the block is full: a mask would split the accesses."""
    if full:
        raw = tl.load(pointers)
    else:
        raw = tl.load(pointers, mask=inside, other=0)
    return raw


@triton.jit
def store_block(pointers, raw, inside, full):
    if full:
        tl.store(pointers, raw)
    else:
        tl.store(pointers, raw, mask=inside)


@triton.jit
def count_kernel(
    table_ptr, state_ptr, hist_ptr, list_ptr,
    FIRST: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """hist (tensor, BINS) += counts of the digit above SHIFT, of all elements (FIRST) or of those whose
    higher bits equal the prefix. TOP = the largest key (FIRST), or ABOVE = the least above the prefix."""
    table = table_ptr + tl.program_id(1) * COLUMNS
    state = state_ptr + tl.program_id(1) * STATES
    address = tl.load(table + ADDRESS)
    prefix = tl.load(state + PREFIX)
    total = tl.load(table + SIZE)
    listed = tl.load(state + COUNT)
    use_list = (listed <= tl.load(table + ROOM)) & (not FIRST)
    total = tl.where(use_list, listed, total)
    list_ptr += tl.load(table + LIST)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    extreme = tl.zeros((BLOCK,), dtype=tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(total, BLOCK), tl.num_programs(0)):
        at = block * tl.full((), BLOCK, tl.int64) + tl.arange(0, BLOCK)
        inside = at < total
        if FIRST:
            full = (block + 1) * BLOCK <= total
            keys = key_of(load_block(elements(address, at, DTYPE), inside, full), DTYPE)
            extreme = tl.maximum(extreme, keys)
            counted = inside
        else:
            at = tl.where(use_list, tl.load(list_ptr + at, mask=inside & use_list, other=0), at)
            raw = tl.load(elements(address, at, DTYPE), mask=inside, other=0)
            keys = key_of(raw, DTYPE)
            higher = keys >> (SHIFT + BITS)
            extreme = tl.maximum(extreme, tl.where(inside & (higher > prefix), LARGEST - keys, 0))
            counted = inside & (higher == prefix)
        digit = (keys >> SHIFT) & ((1 << BITS) - 1)
        counts += tl.histogram(digit, BINS, mask=counted)
    bins = tl.arange(0, BINS)
    tl.atomic_add(
        hist_ptr + tl.program_id(1) * BINS + bins,
        counts.to(tl.int64),
        mask=counts > 0,
        sem="relaxed",
    )
    column = TOP if FIRST else ABOVE
    tl.atomic_max(state + column, tl.max(extreme, 0).to(tl.int64), sem="relaxed")


@triton.jit
def select_kernel(
    table_ptr, state_ptr, hist_ptr, weight_ptr,
    FIRST: tl.constexpr, LAST: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Append the digit whose bin holds the rank to the prefix; if LAST, set THRESHOLD and WHOLE."""
    table = table_ptr + tl.program_id(0) * COLUMNS
    state = state_ptr + tl.program_id(0) * STATES
    rank = tl.load(table + RANK) if FIRST else tl.load(state + LEFT)
    bins = tl.arange(0, BINS)
    counts = tl.load(hist_ptr + tl.program_id(0) * BINS + bins)
    digit = tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int32), 0)
    left = rank - tl.sum(tl.where(bins < digit, counts, 0), 0)
    prefix = (tl.load(state + PREFIX) << BITS) | digit
    tl.store(state + PREFIX, prefix)
    tl.store(state + LEFT, left)
    if LAST:
        # The two order statistics around the quantile: the prefix, and the next element's key.
        weight = tl.load(weight_ptr + tl.program_id(0))
        top = tl.load(state + TOP)
        above = LARGEST - tl.load(state + ABOVE)
        here = tl.sum(tl.where(bins == digit, counts, 0), 0)
        next_digit = tl.min(tl.where((bins > digit) & (counts > 0), bins, BINS), 0)
        next_key = tl.where(next_digit < BINS, prefix - digit + next_digit, above)
        next_key = tl.where((left + 1 < here) | (weight == 0.0), prefix, next_key)
        low = key_to_float(prefix, DTYPE)
        high = key_to_float(next_key, DTYPE)
        # As torch.lerp with its fused multiply-add: products of float32 are exact in float64.
        gap = (high - low).to(tl.float64)
        upper = high.to(tl.float64) - gap * (1.0 - weight).to(tl.float64)
        lower = low.to(tl.float64) + gap * weight.to(tl.float64)
        quantile = tl.where(weight < 0.5, lower, upper).to(tl.float32)
        kept_from = float_to_key(quantile, DTYPE).to(tl.int64)
        infinity = 0x7F800000 if DTYPE == "fp32" else (0x7F80 if DTYPE == "bf16" else 0x7C00)
        is_nan = (quantile != quantile) | (top > infinity)
        threshold = tl.where(is_nan, LARGEST, kept_from)
        tl.store(state + THRESHOLD, threshold)
        overflow = tl.load(state + COUNT) > tl.load(table + ROOM)
        tl.store(state + WHOLE, (overflow | (threshold >= above)).to(tl.int64))


@triton.jit
def key_to_float(key, DTYPE: tl.constexpr):
    if DTYPE == "fp32":
        return key.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return rounding.widen(key.to(tl.int16), DTYPE)


@triton.jit
def float_to_key(value, DTYPE: tl.constexpr):
    """The key of a value >= 0, rounded to DTYPE."""
    if DTYPE == "fp32":
        return value.to(tl.int32, bitcast=True)
    else:
        return rounding.narrow(value, DTYPE).to(tl.int32) & 0x7FFF


@triton.jit
def partition_kernel(
    table_ptr, state_ptr, list_ptr,
    SHIFT: tl.constexpr, DTYPE: tl.constexpr, PAIRED: tl.constexpr, PARTNER_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Zero the elements below the first digit's bin, list those in it; ABOVE = the least key above."""
    table = table_ptr + tl.program_id(1) * COLUMNS
    state = state_ptr + tl.program_id(1) * STATES
    address = tl.load(table + ADDRESS)
    partner = tl.load(table + PARTNER)
    size = tl.load(table + SIZE)
    room = tl.load(table + ROOM)
    prefix = tl.load(state + PREFIX)
    list_ptr += tl.load(table + LIST)
    extreme = tl.zeros((BLOCK,), dtype=tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at = block * tl.full((), BLOCK, tl.int64) + tl.arange(0, BLOCK)
        inside = at < size
        full = (block + 1) * BLOCK <= size
        pointers = elements(address, at, DTYPE)
        raw = load_block(pointers, inside, full)
        keys = key_of(raw, DTYPE)
        digit = keys >> SHIFT
        store_block(pointers, tl.where(digit < prefix, 0, raw), inside, full)
        if PAIRED:
            pointers = elements(partner, at, PARTNER_DTYPE)
            raw = load_block(pointers, inside, full)
            store_block(pointers, tl.where(digit < prefix, 0, raw), inside, full)
        extreme = tl.maximum(extreme, tl.where(inside & (digit > prefix), LARGEST - keys, 0))
        listed = (inside & (digit == prefix)).to(tl.int32)
        first = tl.atomic_add(state + COUNT, tl.sum(listed, 0).to(tl.int64), sem="relaxed")
        place = first + tl.cumsum(listed, 0) - listed
        tl.store(list_ptr + place, at, mask=(listed > 0) & (place < room))
    tl.atomic_max(state + ABOVE, tl.max(extreme, 0).to(tl.int64), sem="relaxed")


@triton.jit
def finish_kernel(
    table_ptr, state_ptr, list_ptr,
    DTYPE: tl.constexpr, PAIRED: tl.constexpr, PARTNER_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zero the elements whose keys are at most the threshold, among the listed or (WHOLE) all."""
    table = table_ptr + tl.program_id(1) * COLUMNS
    state = state_ptr + tl.program_id(1) * STATES
    address = tl.load(table + ADDRESS)
    partner = tl.load(table + PARTNER)
    threshold = tl.load(state + THRESHOLD)
    use_list = tl.load(state + WHOLE) == 0
    total = tl.where(use_list, tl.load(state + COUNT), tl.load(table + SIZE))
    list_ptr += tl.load(table + LIST)
    for block in range(tl.program_id(0), tl.cdiv(total, BLOCK), tl.num_programs(0)):
        at = block * tl.full((), BLOCK, tl.int64) + tl.arange(0, BLOCK)
        inside = at < total
        at = tl.where(use_list, tl.load(list_ptr + at, mask=inside & use_list, other=0), at)
        pointers = elements(address, at, DTYPE)
        dropped = inside & (key_of(tl.load(pointers, mask=inside, other=0), DTYPE) <= threshold)
        tl.store(pointers, 0, mask=dropped)
        if PAIRED:
            tl.store(elements(partner, at, PARTNER_DTYPE), 0, mask=dropped)


def why_not(tensors, ratio, paired_with) -> str | None:
    for t in (*tensors, *paired_with):
        if t.dtype not in DTYPES:
            return f"a tensor in {t.dtype}; the kernels take bfloat16, float16 and float32"
        if reason := backend.why_not_in_triton(t, count_kernel):
            return reason
    return None


def prune_(tensors, ratio, paired_with) -> None:
    """Arguments as checked by ops/prune.py, on one device."""
    groups: dict = {}
    for i, t in enumerate(tensors):
        if t.numel() > 0:
            partner = paired_with[i] if paired_with else None
            groups.setdefault((t.dtype, partner.dtype if paired_with else None), []).append(
                (t, partner)
            )
    for pairs in groups.values():
        with torch.cuda.device_of(pairs[0][0]):
            for i in range(0, len(pairs), MOST_TENSORS):
                _prune_group(pairs[i : i + MOST_TENSORS], ratio)
    torch.autograd.graph.increment_version([*tensors, *paired_with])


def _prune_group(pairs, ratio: float) -> None:
    """Prune (tensor, partner or None) pairs with the same dtypes; every launch serves all of them."""
    flat = [(_aligned(t), None if p is None else _aligned(p)) for t, p in pairs]
    first, partner = flat[0]
    device, sizes = first.device, [t.numel() for t, _ in flat]
    ranks = [quantile_rank(n, ratio) for n in sizes]
    room = [n // LISTED + 1024 for n in sizes]
    starts = itertools.accumulate(room, initial=0)  # one value more than tensors; zip drops it
    table = torch.tensor(
        [
            [t.data_ptr(), 0 if p is None else p.data_ptr(), n, k, start, size]
            for (t, p), n, (k, _), start, size in zip(flat, sizes, ranks, starts, room)
        ],
        dtype=torch.int64,
    ).to(device, non_blocking=True)
    weights = torch.tensor([w for _, w in ranks], dtype=torch.float32).to(device, non_blocking=True)
    digits = DIGITS[first.element_size()]
    state = torch.zeros(len(flat), STATES.value, dtype=torch.int64, device=device)
    hists = torch.zeros(len(digits), len(flat), BINS.value, dtype=torch.int64, device=device)
    listed = torch.empty(sum(room), dtype=torch.int64, device=device)
    blocks = triton.cdiv(max(sizes), SWEEP["BLOCK"])
    grid = (min(blocks, PROGRAMS), len(flat))
    kinds = {
        "DTYPE": DTYPES[first.dtype],
        "PAIRED": partner is not None,
        "PARTNER_DTYPE": DTYPES[first.dtype if partner is None else partner.dtype],
    }

    shift = sum(digits)
    for level, (bits, hist) in enumerate(zip(digits, hists)):
        shift -= bits
        count_kernel[grid](
            table, state, hist, listed,
            FIRST=level == 0, BITS=bits, SHIFT=shift, DTYPE=kinds["DTYPE"], **SWEEP,
        )  # fmt: skip
        select_kernel[(len(flat),)](
            table, state, hist, weights,
            FIRST=level == 0, LAST=shift == 0, BITS=bits, DTYPE=kinds["DTYPE"], **SELECT,
        )  # fmt: skip
        if level == 0:
            partition_kernel[grid](table, state, listed, SHIFT=shift, **kinds, **SWEEP)
    finish_kernel[grid](table, state, listed, **kinds, **SWEEP)
    for (t, p), (copy, partner_copy) in zip(pairs, flat):
        if copy is not t:
            t.copy_(copy)
        if partner_copy is not p:
            p.copy_(partner_copy)


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """`t`, or a copy if it is not contiguous or does not start at a multiple of 16 bytes."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()
