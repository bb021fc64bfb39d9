"""Magnitude pruning of sharded tensors: each rank keeps its rows; thresholds are those of the whole tensors.

This is the radix selection of csrc/prune.cu over all ranks: each rank counts the digits of its own elements,
the counts are added up, and all ranks pick the same bin. Collectives are batched over all tensors of a dtype:
one all_reduce of 1 to 64 KB per tensor for each digit (two for 16 bits, three for 32, six for 64), and one for
the next key.
"""

from __future__ import annotations

import torch

from relora_kernels import sharding
from relora_kernels.ops.prune import prune_
from relora_kernels.reference import prune as reference

# Bits of a key's digits, highest first, by bytes per element: histograms of up to 2 to 64 KB per tensor.
DIGITS = {2: (8, 7), 4: (11, 10, 10), 8: (13, 10, 10, 10, 10, 10)}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def prune_sharded_(tensors, ratio: float, paired_with=None) -> None:
    """prune_(tensors, ratio, paired_with) for lists in which some or all tensors are DTensors.

    Supported are rows over one mesh dimension (also empty and uneven shards) and replicas; a partner must be
    sharded like its tensor. The result equals pruning the whole tensors bit for bit. A collective over the
    tensors' shard dimensions: call on every rank with the same list.
    """
    partners = list(paired_with) if paired_with else [None] * len(tensors)
    whole, groups = [], {}
    for t, partner in zip(tensors, partners, strict=True):
        dim = sharding.row_dimension(t)
        if partner is not None and (sharding.row_dimension(partner), partner.shape) != (
            dim,
            t.shape,
        ):
            raise ValueError(
                f"prune_sharded_: expected partners sharded as their tensors are, got "
                f"{tuple(t.shape)} over {dim} and {tuple(partner.shape)} over "
                f"{sharding.row_dimension(partner)} (mesh dimensions; None: not sharded)"
            )
        if dim is None:
            whole.append((t, partner))
        elif t.numel():
            key = (t.device_mesh.get_group(dim), t.dtype)
            groups.setdefault(key, []).append((t, partner))
    if whole:
        first, second = zip(*(map(_local, pair) for pair in whole))
        prune_(first, ratio, second if paired_with else None)
    for (process_group, _), pairs in groups.items():
        _prune_group(process_group, pairs, ratio)


def _local(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else sharding.local_rows(t)[0]


def _prune_group(process_group, pairs, ratio: float) -> None:
    """(tensor, partner or None) pairs of one dtype over one process group."""
    local = [_local(t) for t, _ in pairs]
    thresholds = _thresholds(process_group, local, [t.numel() for t, _ in pairs], ratio)
    for rows, (_, partner), threshold in zip(local, pairs, thresholds):
        drop = ~(rows.abs() > threshold)
        rows.masked_fill_(drop, 0.0)
        if partner is not None:
            _local(partner).masked_fill_(drop, 0.0)


def _thresholds(process_group, local, sizes, ratio: float) -> list[torch.Tensor]:
    """quantile(|t|, ratio) of each whole tensor, computed from all ranks' rows; in the tensors' dtype."""
    from torch.distributed import ReduceOp, all_reduce

    dtype, device = local[0].dtype, local[0].device
    work = torch.float64 if dtype == torch.float64 else torch.float32
    count = torch.ops.relora_kernels._magnitude_counts
    ranks = [reference.quantile_rank(n, ratio, work) for n in sizes]
    left = torch.tensor([low for low, _ in ranks]).to(device, non_blocking=True)
    prefix = torch.zeros_like(left)
    digits = DIGITS[dtype.itemsize]
    shift = sum(digits)
    for bits in digits:
        shift -= bits
        counts = count(local, prefix, shift, bits)[0]  # (T, 2^bits)
        all_reduce(counts, group=process_group)
        up_to = counts.cumsum(1)
        digit = (up_to <= left[:, None]).sum(1)
        here, before = (c.gather(1, digit[:, None])[:, 0] for c in (counts, up_to - counts))
        left, prefix = left - before, prefix << bits | digit
    # The next order statistic: the same key if it is tied, else the next key that any rank has.
    _, above, greatest = count(local, prefix, 0, 0)
    extremes = torch.stack([above, -greatest])
    all_reduce(extremes, ReduceOp.MIN, group=process_group)
    lows = _values(prefix, dtype).to(work)
    highs = _values(torch.where(left + 1 < here, prefix, extremes[0]), dtype).to(work)
    infinity = reference.magnitude_keys(torch.full((1,), torch.inf, dtype=dtype, device=device))
    is_nan = -extremes[1] > infinity
    return [
        torch.where(nan, torch.nan, reference.lerp(low, high if weight else low, weight)).to(dtype)
        for low, high, nan, (_, weight) in zip(lows, highs, is_nan, ranks)
    ]


def _values(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return keys.to(_INTEGERS[dtype.itemsize]).view(dtype)
