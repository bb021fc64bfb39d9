"""prune_: zero the smallest magnitudes, per tensor, in place. Contract: reference/prune.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress, repeat

import torch

from relora_kernels import backend
from relora_kernels.cuda import prune as _cuda
from relora_kernels.ops import LIBRARY, checks
from relora_kernels.ops.checks import Tensors
from relora_kernels.reference import prune as _reference

IMPLEMENTATIONS = {"reference": _reference, "cuda": _cuda}
RANDOM_IMPLEMENTATIONS = {"reference": _reference, "cuda": _cuda}
COUNTS_IMPLEMENTATIONS = {"reference": _reference, "cuda": _cuda}
if backend.triton_missing() is None:
    from relora_kernels._triton import magnitude_counts as _triton_counts
    from relora_kernels._triton import prune as _triton
    from relora_kernels._triton import prune_random as _triton_random

    IMPLEMENTATIONS["triton"] = _triton
    RANDOM_IMPLEMENTATIONS["triton"] = _triton_random
    COUNTS_IMPLEMENTATIONS["triton"] = _triton_counts

LIBRARY.define("_prune_(Tensor(a!)[] tensors, float ratio, Tensor(b!)[] paired_with) -> ()")
LIBRARY.define(
    "_prune_random_(Tensor(a!)[] tensors, float ratio, Tensor(b!)[] paired_with, int[] seeds, "
    "int[] first_elements) -> ()"
)
LIBRARY.define(
    "_magnitude_counts(Tensor[] tensors, Tensor prefixes, int shift, int bits) "
    "-> (Tensor counts, Tensor lowest, Tensor highest)"
)


def _prune(tensors, ratio, paired_with):
    args = tensors, _, paired_with = Tensors(tensors), ratio, Tensors(paired_with)
    module = backend.resolve("prune_", IMPLEMENTATIONS, "why_not", *args)
    _check_memory("prune_", tensors, paired_with)
    module.prune_(*args)


def _prune_random(tensors, ratio, paired_with, *keys):
    args = tensors, _, paired_with, *_ = Tensors(tensors), ratio, Tensors(paired_with), *keys
    module = backend.resolve("prune_random_", RANDOM_IMPLEMENTATIONS, "why_not_random", *args)
    _check_memory("prune_random_", tensors, paired_with)
    module.prune_random_(*args)


def _check_memory(op: str, tensors: Tensors, paired_with: Tensors) -> None:
    """Every element must be writable and belong to one tensor and one index only."""
    checks.writable(op, [*tensors, *paired_with])
    for name, some in (("tensors", tensors), ("paired_with", paired_with)):
        if not some.contiguous:
            for i, t in enumerate(some):
                checks.no_overlap(op, f"{name}[{i}]", t)
    checks.apart(op, tensors, paired_with)


def _magnitude_counts(*args):
    tensors, prefixes, *_ = args
    if not tensors:
        return _magnitude_counts_fake(*args)  # nothing, in the right shapes
    if prefixes.dtype != torch.int64 or prefixes.shape != (len(tensors),):
        raise ValueError(
            f"_magnitude_counts: expected an int64 prefix for each of {len(tensors)} tensors, got "
            f"{checks.describe(prefixes)}"
        )
    module = backend.resolve("magnitude_counts", COUNTS_IMPLEMENTATIONS, "why_not_counts", *args)
    return module.magnitude_counts(*args)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("_prune_", _prune, _device)
    LIBRARY.impl("_prune_random_", _prune_random, _device)
    LIBRARY.impl("_magnitude_counts", _magnitude_counts, _device)


@torch.library.register_fake("relora_kernels::_prune_", lib=LIBRARY)
def _prune_fake(tensors, ratio, paired_with):
    return None


@torch.library.register_fake("relora_kernels::_prune_random_", lib=LIBRARY)
def _prune_random_fake(tensors, ratio, paired_with, seeds, first_elements):
    return None


@torch.library.register_fake("relora_kernels::_magnitude_counts", lib=LIBRARY)
def _magnitude_counts_fake(tensors, prefixes, shift, bits):
    each = prefixes.new_empty(len(tensors), dtype=torch.int64)
    return each.new_empty(len(tensors), 2**bits), each, each.clone()


@torch.no_grad()
def prune_(
    tensors: torch.Tensor | Sequence[torch.Tensor],
    ratio: float,
    paired_with: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> None:
    """Zero, in place, the elements of each tensor with |t| <= quantile(|t|, ratio).

    Equivalent, for each tensor of at most 2^24 elements (from torch 2.14 on of any size), to
    ``t.masked_fill_(~(t.abs() > torch.quantile(t.abs().float(), ratio).to(t.dtype)), 0)``, and for float64
    to the same without ``.float()``. Thresholds are exactly the installed torch.quantile's (linear
    interpolation), at any size; torch 2.14 rounds ranks otherwise, which may move a threshold a little.
    ReLoRA (arXiv 2307.05695) prunes Adam's moments this way at a restart.

    Args:
        tensors: one tensor or a list; float32, bfloat16, float16 or float64; any shape, size >= 0.
            Ties at the threshold are dropped. A tensor holding NaN becomes all zero.
        ratio: share to drop, 0 <= ratio <= 1. 0 still drops the smallest value, 1 drops all.
        paired_with: as many tensors of the same shapes, zeroed by the mask of their partner in `tensors`.

    Raises TypeError or ValueError for anything else, including tensors that share memory, and
    BackendUnavailable if a named backend cannot serve the call; nothing is changed then.
    """
    tensors = _as_list("tensors", tensors)
    paired = [] if paired_with is None else _as_list("paired_with", paired_with)
    ratio = checks.fraction("prune_", "ratio", ratio)
    if paired_with is not None:
        _check_shapes("prune_", tensors, paired)
    devices = [t.device for t in tensors]
    if paired and [t.device for t in paired] != devices:
        for t, partner in zip(tensors, paired):
            checks.plain_tensors("prune_", tensor=t, paired_with=partner)
    parts = list(_by_device(devices, tensors, paired))
    if len(parts) > 1:  # before the first one is pruned; the op checks each one too
        _check_memory("prune_", Tensors(tensors), Tensors(paired))
    for chosen, partners in parts:
        torch.ops.relora_kernels._prune_(chosen, ratio, partners)


def prune_random_(tensors, ratio, paired_with, seeds, first_elements) -> None:
    """Drop each element with probability `ratio`, drawn from (seed of its tensor, flat index) alone.

    `paired_with`: empty, or as long as `tensors`; zeroed by the same masks. `first_elements`: each tensor's
    first flat index, 0 except for a shard. Raises ValueError for a ratio outside [0, 1] and lists of other lengths.
    """
    ratio = checks.fraction("prune_random_", "ratio", ratio)
    for name, keys in (("seeds", seeds), ("first_elements", first_elements)):
        if len(keys) != len(tensors):
            raise ValueError(
                f"prune_random_: expected as many {name} as tensors, {len(tensors)}, got {len(keys)}"
            )
    if paired_with:
        _check_shapes("prune_random_", tensors, paired_with)
    columns = tensors, paired_with, seeds, first_elements
    for chosen, paired, *keys in _by_device([t.device for t in tensors], *columns):
        torch.ops.relora_kernels._prune_random_(chosen, ratio, paired, *keys)


def _check_shapes(op: str, tensors, paired) -> None:
    if len(tensors) != len(paired):
        raise ValueError(
            f"{op}: expected as many paired_with as tensors, {len(tensors)}, got {len(paired)}"
        )
    if [t.shape for t in tensors] != [t.shape for t in paired]:
        i, t, partner = next(
            (i, *pair)
            for i, pair in enumerate(zip(tensors, paired))
            if pair[0].shape != pair[1].shape
        )
        raise ValueError(
            f"{op}: expected paired_with[{i}] of tensors[{i}]'s shape {tuple(t.shape)}, "
            f"got {tuple(partner.shape)}"
        )


def _by_device(devices, *columns):
    """Split the columns (each as long as `devices`, or empty) by device: an op serves one device."""
    of_each = dict.fromkeys(devices)
    for device in of_each:
        chosen = [d == device for d in devices] if len(of_each) > 1 else repeat(True)
        yield [list(compress(column, chosen)) for column in columns]


def _as_list(name: str, tensors) -> list[torch.Tensor]:
    if not isinstance(tensors, (torch.Tensor, Iterable)):
        raise TypeError(f"prune_: expected {name} to be a tensor or a list, got {tensors!r}")
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    if not _usual(tensors):
        for i, t in enumerate(tensors):
            checks.plain_tensors("prune_", **{f"{name}[{i}]": t})
    return tensors


def _usual(tensors) -> bool:
    """Fast path: whether all tensors are ordinary. plain_tensors takes 2 us per tensor, and a model has
    hundreds. Works by attribute over the whole list, so that a tensor costs only its attribute look-ups."""
    return (
        {torch.Tensor, torch.nn.Parameter}.issuperset(map(type, tensors))
        and set(checks.FLOATS).issuperset([t.dtype for t in tensors])
        and {torch.strided}.issuperset([t.layout for t in tensors])
    )
