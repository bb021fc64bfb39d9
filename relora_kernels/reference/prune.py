"""prune_: zero the elements of smallest magnitude, per tensor, in place.

    thr  = quantile(|t| in float32, ratio)   torch.quantile's linear interpolation, then t's dtype
    keep = |t| > thr                         strictly: ties at the threshold are dropped

The contract for special values: a NaN anywhere makes the threshold NaN, so nothing is kept and the
tensor becomes all zero. inf ranks above every finite number. A dropped element becomes +0, whatever
it was: no mask is multiplied, so a dropped inf or NaN does not become NaN.
"""

from __future__ import annotations

import ctypes
import math

import torch

from relora_kernels.reference import philox

NONE_ABOVE = 2**63 - 1  # magnitude_counts: no key is that large
# torch.quantile computes the ranks of float32 tensors in float32 and takes at most 2^24 elements; from torch 2.14 on
# (pytorch/pytorch#187574) in float64, of the ratio in float32, at any size. The installed torch is followed: of these
# eleven elements the rank at 0.9 is 9 in float32, and 8.9999998 in float64.
_ELEVEN = torch.tensor([0.0] * 9 + [1.0, 1.0], dtype=torch.float32, device="cpu")
_FLOAT64_RANKS = torch.quantile(_ELEVEN, 0.9).item() < 1.0


def why_not(tensors, ratio, paired_with) -> str | None:
    return None


def why_not_random(tensors, ratio, paired_with, seeds, first_elements) -> str | None:
    return None


def why_not_counts(tensors, prefixes, shift, bits) -> str | None:
    return None


def prune_(tensors, ratio, paired_with) -> None:
    """Prune each tensor separately. `paired_with` is empty, or as long and zeroed by the same masks."""
    for i, t in enumerate(tensors):
        if t.numel() == 0:
            continue
        magnitude = t.abs()
        drop = ~(magnitude > magnitude_quantile(magnitude, ratio).to(t.dtype))
        t.masked_fill_(drop, 0.0)
        if paired_with:
            paired_with[i].masked_fill_(drop, 0.0)


def drop_below(ratio: float) -> int:
    """Random pruning drops an element whose 32 random bits are below this."""
    return round(ratio * 2**32)


def prune_random_(tensors, ratio, paired_with, seeds, first_elements=None) -> None:
    """Drop each element with probability `ratio`, keyed by (seed of the tensor, flat index).

    first_elements: the flat index of each tensor's first element, 0 by default. With it, rows of a
    sharded tensor draw the bits that they have in the whole one.
    """
    threshold = drop_below(ratio)
    for i, t in enumerate(tensors):
        n, first = t.numel(), first_elements[i] if first_elements else 0
        drop = torch.empty(n, dtype=torch.bool, device=t.device)
        for start in range(0, n, 2**24):  # 2^24 at once: draws take about 50 bytes per element
            count = min(2**24, n - start)
            at = (0, first + start)
            bits = philox.bits32(seeds[i], philox.STREAM_PRUNE, (1, count), at, t.device)
            drop[start : start + count] = bits[0] < threshold
        t.masked_fill_(drop.view(t.shape), 0.0)
        if paired_with:
            paired_with[i].masked_fill_(drop.view(t.shape), 0.0)


def magnitude_counts(tensors, prefixes, shift, bits):
    """Histograms of one digit of the magnitude keys, for a radix selection over several ranks.

    A key is an element's bits without the sign (an int64 here). Keys are ordered like magnitudes, NaN last.

    Args:
        tensors: T tensors of one dtype on one device.
        prefixes: (T,) int64 on that device. Keys with key >> (shift + bits) == prefix are counted.
        shift, bits: the digit is (key >> shift) mod 2^bits.

    Returns three int64 tensors: counts (T, 2^bits); lowest (T,), the least key with
    key >> (shift + bits) > prefix, NONE_ABOVE if there is none; highest (T,), the greatest key, -1 for an
    empty tensor.
    """
    results = []
    for t, prefix in zip(tensors, prefixes):
        counts = torch.zeros(2**bits + 1, dtype=torch.int64, device=t.device)
        lowest, highest = counts.new_full((), NONE_ABOVE), counts.new_full((), -1)
        for keys in magnitude_keys(t).split(2**24) if t.numel() else ():
            keys = keys.to(torch.int64)
            higher = keys >> (shift + bits)
            digit = torch.where(higher == prefix, (keys >> shift) & (2**bits - 1), 2**bits)
            counts.scatter_add_(0, digit, torch.ones_like(digit))
            above = torch.where(higher > prefix, keys, NONE_ABOVE)
            lowest = torch.minimum(lowest, above.amin())
            highest = torch.maximum(highest, keys.amax())
        results.append((counts[:-1], lowest, highest))
    return tuple(torch.stack(column) for column in zip(*results))


def magnitude_keys(t: torch.Tensor) -> torch.Tensor:
    """(numel,) integers as wide as t's elements: their bits without the sign."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.contiguous().view(integer).flatten() & torch.iinfo(integer).max


def magnitude_quantile(magnitude: torch.Tensor, ratio: float) -> torch.Tensor:
    """torch.quantile(magnitude.float().flatten(), ratio) for any size; a 0-dim float32 tensor.

    Order statistics k and k + 1 take one selection and one pass, without a sort and without
    torch.quantile's limit of 2^24 elements. (float64 stays float64.)
    """
    flat = magnitude.flatten()
    work = torch.float64 if flat.dtype == torch.float64 else torch.float32
    low_rank, weight = quantile_rank(flat.numel(), ratio, work)
    low = _order_statistic(flat, low_rank)
    # The next order statistic: `low` again if it is tied, else the smallest element above it.
    at_most = (flat <= low).sum()
    above = torch.where(flat > low, flat, torch.inf).amin()
    high = torch.where((at_most >= low_rank + 2) | (weight == 0.0), low, above)
    threshold = lerp(low.to(work), high.to(work), weight)
    return torch.where(flat.isnan().any(), torch.nan, threshold)


def _order_statistic(flat: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th smallest element, from 0. On a CPU kthvalue takes quadratic time for descending values."""
    if flat.device.type != "cpu":
        return torch.kthvalue(flat, k + 1).values
    if k < flat.numel() // 2:
        return flat.topk(k + 1, largest=False, sorted=False).values.amax()
    return flat.topk(flat.numel() - k, sorted=False).values.amin()


def quantile_rank(n: int, ratio: float, work: torch.dtype = torch.float32) -> tuple[int, float]:
    """(k, w): the quantile lies between order statistics k and k + 1 (from 0), at fraction w.

    rank = ratio * (n - 1), rounded as by the installed torch.quantile (see rank_rule).
    """
    if work == torch.float32:
        ratio, float_ranks = rank_rule(ratio)
        work = torch.float32 if n <= float_ranks else torch.float64
    rank = (torch.tensor(ratio, dtype=work) * torch.tensor(n - 1, dtype=work)).item()
    low = min(math.floor(rank), n - 1)
    return low, rank - low if low < n - 1 else 0.0


def rank_rule(ratio: float) -> tuple[float, int]:
    """(ratio, float_ranks): multiply this ratio in float32 for tensors of up to `float_ranks` elements, in float64
    for larger ones, whose ranks float32 cannot represent."""
    return (ctypes.c_float(ratio).value, 0) if _FLOAT64_RANKS else (ratio, 2**24)


def lerp(a: torch.Tensor, b: torch.Tensor, weight: float) -> torch.Tensor:
    """torch.lerp: a + w (b - a) below w = 1/2, b - (b - a)(1 - w) above, with a fused multiply-add."""
    return torch.lerp(a, b, a.new_full((), weight))  # a fill: no wait for the host
