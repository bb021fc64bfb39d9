"""merge_: W += s * B @ A in place, and lists of merges. Formula and rounding: reference/merge.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from relora_kernels import backend
from relora_kernels.cuda import merge as _cuda
from relora_kernels.ops import LIBRARY, checks
from relora_kernels.reference import merge as _reference

IMPLEMENTATIONS = {"reference": _reference, "cuda": _cuda}  # in `auto`'s order: see backend.py
if backend.triton_missing() is None:
    from relora_kernels._triton import merge as _triton

    IMPLEMENTATIONS["triton"] = _triton

LIBRARY.define(
    "_merge_(Tensor(a!) weight, Tensor lora_A, Tensor lora_B, float scaling, str rounding, "
    "Tensor(b!)? residual, int seed, int first_row, bool check) -> ()"
)
LIBRARY.define(
    "_merge_many_(Tensor(a!)[] weights, Tensor[] lora_As, Tensor[] lora_Bs, float[] scalings, "
    "str rounding, Tensor(b!)[] residuals, int[] seeds, int[] first_rows, Tensor(c!)[] restart_As, "
    "Tensor(d!)[] restart_Bs, Tensor(e!)[] merge_counts, float[] bounds, int[] restart_seeds, "
    "int[] restart_rows) -> ()"
)


def _merge(*args):
    *args, check = args
    module = backend.resolve("merge_", IMPLEMENTATIONS, "why_not", *args)
    if check:
        weight, lora_A, lora_B, scaling, _, residual, _, _ = args
        written = [weight] if residual is None else [weight, residual]
        checks.apart("merge_", written, read=[lora_A, lora_B])
        check_finite([(weight, lora_A, lora_B, scaling, residual, "merge_")])
    module.merge_(*args)


def _merge_many(weights, As, Bs, scalings, rounding, residuals, seeds, first_rows, *restarts):
    residuals = residuals or [None] * len(weights)
    merges = [
        (weight, A, B, scaling, rounding, residual, seed, first_row)
        for weight, A, B, scaling, residual, seed, first_row in zip(
            weights, As, Bs, scalings, residuals, seeds, first_rows, strict=True
        )
    ]
    served: dict = {}  # implementation: what it serves, in the list's order
    for merge, restart in zip(merges, zip(*restarts, strict=True), strict=True):
        module = backend.resolve("merge_", IMPLEMENTATIONS, "why_not", *merge)
        served.setdefault(module, []).append((merge, restart))
    for module, pairs in served.items():
        module.merge_many_(*map(list, zip(*pairs)))


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("_merge_", _merge, _device)
    LIBRARY.impl("_merge_many_", _merge_many, _device)


@torch.library.register_fake("relora_kernels::_merge_many_", lib=LIBRARY)
def _merge_many_fake(*args):
    return None


@torch.library.register_fake("relora_kernels::_merge_", lib=LIBRARY)
def _merge_fake(weight, lora_A, lora_B, scaling, rounding, residual, seed, first_row, check):
    return None


@torch.no_grad()
def merge_(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    rounding: str = "nearest",
    residual: torch.Tensor | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """W <- round(W + scaling * B @ A) in place; returns `weight`. lora_A and lora_B are left alone.

    Equivalent to ``weight.copy_(weight.float() + scaling * (lora_B.float() @ lora_A.float()))``.

    Args:
        weight: (out, in), float32, bfloat16, float16 or float64, any strides without overlap.
        lora_A, lora_B: (r, in) and (out, r), one floating dtype. Products are summed in float32
            (float64 for a float64 weight).
        scaling: s, a number.
        rounding: how the sum is rounded to weight's dtype, once.
            ``"nearest"`` loses updates much smaller than the weight (bfloat16, update of 1e-3 of the
            weight's norm: half of it);
            ``"stochastic"`` is unbiased; random bits are a function of (seed, element) alone;
            ``"compensated"`` keeps what rounding drops in `residual` and adds it at the next merge.
            For float32 and float64 weights, whose sums need no narrowing, all three are nearest.
        residual: (out, in) in weight's dtype, on weight's device or in host memory, zeros before the
            first merge; written in place. Expected with ``"compensated"`` and only there.
        seed: int64, used by ``"stochastic"``.

    Raises ValueError or TypeError for other shapes, dtypes, devices or ranges and for tensors that
    share memory with weight or residual, and FloatingPointError where the update, or a float16 sum,
    is not finite; W is untouched then.
    """
    scaling = check_arguments(weight, lora_A, lora_B, scaling, rounding, residual, seed)
    return merge_checked(weight, lora_A, lora_B, scaling, rounding, residual, seed, check=True)


@torch.no_grad()
def merge_checked(
    weight, lora_A, lora_B, scaling, rounding, residual, seed, first_row=0, check=False
) -> torch.Tensor:
    """merge_ for arguments that have been checked; `check`: all but the update's being finite.

    `first_row` is the logical row of weight[0], where weight and lora_B are rows of a larger layer.
    """
    staged = residual
    if residual is not None and residual.device != weight.device:
        staged = residual.to(weight.device, non_blocking=True)
    torch.ops.relora_kernels._merge_(
        weight, lora_A, lora_B, scaling, rounding, staged, seed, first_row, check
    )
    if staged is not residual:
        residual.copy_(staged)
    return weight


class Restart(NamedTuple):
    """A layer's merge with the restart of its factors behind it, arguments checked."""

    weight: torch.Tensor  # (rows, in), this rank's rows
    lora_A: torch.Tensor  # (r, in), whole
    lora_B: torch.Tensor  # (rows, r); zeroed
    scaling: float
    rounding: str
    residual: torch.Tensor | None  # on weight's device
    seed: int
    first_row: int
    restart_A: torch.Tensor  # lora_A or this rank's rows of it, drawn anew
    merge_count: torch.Tensor  # int64, gains 1
    bound: float
    restart_seed: int
    restart_row: int


@torch.no_grad()
def merge_and_restart(restarts: Sequence[Restart]) -> None:
    """Merge the layers and restart their factors, in as few launches as the backend can.

    Where it raises, each layer has been merged, restarted and counted, or is untouched.
    """
    groups: dict = {}
    for restart in restarts:
        key = restart.weight.device, restart.rounding, restart.residual is None
        groups.setdefault(key, []).append(restart)
    for (_, rounding, _), group in groups.items():
        column = {name: [getattr(r, name) for r in group] for name in Restart._fields}
        torch.ops.relora_kernels._merge_many_(
            column["weight"], column["lora_A"], column["lora_B"], column["scaling"], rounding,
            [residual for residual in column["residual"] if residual is not None],
            column["seed"], column["first_row"], column["restart_A"], column["lora_B"],
            column["merge_count"], column["bound"], column["restart_seed"], column["restart_row"],
        )  # fmt: skip


def check_arguments(weight, lora_A, lora_B, scaling, rounding, residual, seed) -> float:
    op = "merge_"
    checks.plain_tensors(op, weight=weight, lora_A=lora_A, lora_B=lora_B)
    checks.lora_shapes(op, weight, lora_A, lora_B)
    checks.no_overlap(op, "weight", weight)
    checks.one_of(op, "rounding", rounding, checks.ROUNDINGS)
    narrow = weight.dtype in (torch.bfloat16, torch.float16)
    if residual is not None:
        if rounding != "compensated":
            raise ValueError(f"{op}: residual goes with rounding='compensated', got {rounding!r}")
        checks.plain_tensors(op, residual=residual)
        if residual.shape != weight.shape or residual.dtype != weight.dtype:
            raise ValueError(
                f"{op}: expected residual of weight's shape and dtype "
                f"{checks.describe(weight)}, got {checks.describe(residual)}"
            )
        checks.no_overlap(op, "residual", residual)
        if residual.device not in (weight.device, torch.device("cpu")):
            raise ValueError(
                f"{op}: expected residual on {weight.device} or in host memory, "
                f"got {residual.device}"
            )
    elif rounding == "compensated" and narrow:
        raise ValueError(
            f"{op}: rounding='compensated' needs residual, a tensor of weight's shape and dtype "
            f"(torch.zeros_like(weight) before the first merge), got None"
        )
    checks.int64(op, "seed", seed)
    return checks.finite_number(op, "scaling", scaling)


def check_backend(weight, lora_A, lora_B, rounding: str) -> None:
    """Raise BackendUnavailable if the backend in force cannot serve this merge."""
    args = (weight, lora_A, lora_B, 1.0, rounding, None, 0, 0)
    backend.resolve("merge_", IMPLEMENTATIONS, "why_not", *args)


@torch.no_grad()
def check_finite(updates) -> None:
    """Raise FloatingPointError if an update (weight, lora_A, lora_B, scaling, residual, name) is not
    finite, or a float16 sum with it.

    |s| r max|A| max|B| bounds every element of the update, so one reduction over all factors of a
    dtype and one copy to the host per device settle the usual case, without temporaries of a tensor's
    size; the product is formed, in pieces, only for an update whose bound does not settle it.
    """
    updates = [u for u in updates if u[1].numel() > 0 and u[2].numel() > 0 and not u[1].is_meta]
    if not updates:
        return
    for (weight, lora_A, lora_B, scaling, residual, name), bound in zip(updates, _bounds(updates)):
        if bound < _largest(weight.dtype) or _is_finite(weight, lora_A, lora_B, scaling, residual):
            continue
        raise FloatingPointError(
            f"{name}: expected a finite update of weight {tuple(weight.shape)} {weight.dtype}, got "
            f"inf or NaN in scaling * lora_B @ lora_A or in its sum; nothing was merged. Check "
            f"lora_A and lora_B for NaN, and the learning rate"
        )


# max|t| of each tensor, NaN if one is in it; unlike t.abs().amax() without a temporary of t's size. One
# launch for a list on a GPU; on a CPU the norm takes 5.8 ms for 2^21 numbers, the extremes 0.2 to 0.8.
_LARGEST = {
    "cuda": lambda tensors: torch._foreach_norm(tensors, ord=math.inf),
    "cpu": lambda tensors: [torch.maximum(t.amax(), -t.amin()) for t in tensors],
}


def _bounds(updates) -> list[float]:
    """Of every element of each update, or of a float16 sum; NaN where a NaN is in what it comes from."""
    # (device, dtype, the kernels' dtype) -> {place in `found`: tensor}
    groups: dict[tuple, dict[tuple[int, int], torch.Tensor]] = {}
    for row, (weight, lora_A, lora_B, scaling, residual, _) in enumerate(updates):
        work = torch.promote_types(weight.dtype, torch.float32)
        read = [lora_A, lora_B]
        if weight.dtype == torch.float16:  # its own range ends soon: the sum counts
            read += [weight, residual]
        for column, t in enumerate(read):
            if t is not None:
                groups.setdefault((t.device, t.dtype, work), {})[row, column] = t
    magnitudes: dict[torch.device, list[torch.Tensor]] = {}
    places: dict[torch.device, list[tuple[int, int]]] = {}
    for (device, _, work), tensors in groups.items():
        largest = torch.stack(_LARGEST[device.type](list(tensors.values())))
        # As the kernels hold them: what is inf there makes a bound of inf or, beside zeros, NaN.
        magnitudes.setdefault(device, []).append(largest.to(work).double())
        places.setdefault(device, []).extend(tensors)
    found = torch.zeros(len(updates), 4, dtype=torch.float64)
    for device, values in magnitudes.items():
        rows, columns = zip(*places[device])
        found[rows, columns] = torch.cat(values).cpu()
    scalings = torch.tensor([u[3] for u in updates], dtype=torch.float64).abs()
    wide = torch.tensor([u[0].dtype == torch.float64 for u in updates])
    scalings = scalings.where(wide, scalings.float().double())
    ranks = torch.tensor([u[1].shape[0] for u in updates])
    return (found[:, :2].prod(1) * scalings * ranks + found[:, 2:].sum(1)).tolist()


def _largest(dtype: torch.dtype) -> float:
    # A tenth of float32's range leaves room for the sum's own rounding; float16's limit is W's own.
    return 65504.0 if dtype == torch.float16 else torch.finfo(torch.float32).max / 10


def _is_finite(weight, lora_A, lora_B, scaling, residual) -> bool:
    work = torch.promote_types(weight.dtype, torch.float32)
    rows_at_once = max(1, 2**24 // lora_A.shape[1])
    for row in range(0, lora_B.shape[0], rows_at_once):
        rows = slice(row, row + rows_at_once)
        update = (lora_B[rows].to(work) @ lora_A.to(work)) * scaling
        if weight.dtype == torch.float16:
            total = weight[rows] + update
            if residual is not None:
                total = total + residual[rows].to(total.device)
            update = torch.where(weight[rows].isfinite(), total.to(weight.dtype), update)
        if not update.isfinite().all():
            return False
    return True
