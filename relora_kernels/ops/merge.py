"""merge_: W += s * B @ A in place, and lists of merges. Formula and rounding: reference/merge.py."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from relora_kernels import backend
from relora_kernels.cuda import merge as _cuda
from relora_kernels.ops import LIBRARY, checks, no_autocast
from relora_kernels.reference import merge as _reference

IMPLEMENTATIONS = {"reference": _reference, "cuda": _cuda}
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
    weight, lora_A, lora_B, scaling, _, residual, _, _ = args
    written = [weight] if residual is None else [weight, residual]
    checks.writable("merge_", written)
    if check:
        checks.apart("merge_", written, read=[lora_A, lora_B])
        check_finite([(weight, lora_A, lora_B, scaling, residual, "merge_")])
    with no_autocast(args[0].device.type):
        module.merge_(*args)


def _merge_many(weights, As, Bs, scalings, rounding, residuals, seeds, first_rows, *restarts):
    checks.writable("merge", [*weights, *residuals, *restarts[0], *restarts[1], *restarts[2]])
    residuals = residuals or [None] * len(weights)
    merges = [
        (weight, A, B, scaling, rounding, residual, seed, first_row)
        for weight, A, B, scaling, residual, seed, first_row in zip(
            weights, As, Bs, scalings, residuals, seeds, first_rows, strict=True
        )
    ]
    served: dict = {}  # implementation -> what it serves, in the list's order
    for merge, restart in zip(merges, zip(*restarts, strict=True), strict=True):
        module = backend.resolve("merge_", IMPLEMENTATIONS, "why_not", *merge)
        served.setdefault(module, []).append((merge, restart))
    for module, pairs in served.items():
        with no_autocast(weights[0].device.type):  # merge_and_restart groups by device
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
    """W <- round(W + scaling * B @ A) in place; returns `weight`. lora_A and lora_B do not change.

    Equivalent to ``weight.copy_(weight.float() + scaling * (lora_B.float() @ lora_A.float()))``.

    Args:
        weight: (out, in), float32, bfloat16, float16 or float64, any strides without overlap.
        lora_A, lora_B: (r, in) and (out, r), one floating dtype. Products are summed in float32
            (float64 for a float64 weight).
        scaling: s, a number.
        rounding: how the sum is rounded to weight's dtype, once.
            ``"nearest"`` loses updates much smaller than the weight (bfloat16, update of 1e-3 of the
            weight's norm: half of it);
            ``"stochastic"`` is unbiased; the random bits depend on (seed, element) alone;
            ``"compensated"`` keeps what rounding drops in `residual` and adds it at the next merge. The
            residual is rounded, too: updates below about 2^-18 of a bfloat16 weight, or 3e-8 in float16,
            do not add up over several merges.
            For float32 and float64 weights, whose sums need no narrowing, all three are nearest.
        residual: (out, in) in weight's dtype, on weight's device or in host memory, zeros before the
            first merge; written in place. Only for ``"compensated"``, which needs it for a 16-bit weight.
        seed: int64, used by ``"stochastic"``.

    Raises ValueError or TypeError for other shapes, dtypes, devices or ranges and for tensors that
    share memory with weight or residual. Raises FloatingPointError if the update is not sure to be finite:
    NaN; a factor's element of 2^120 or more (allowed for a float64 weight); products whose magnitudes, with
    or without the scaling, sum up to half of the range of float32 (float64 for a float64 weight); a sum
    beyond float16's range for a float16 weight. Raises BackendUnavailable if a named backend cannot serve the
    call. W is untouched then.
    """
    scaling = check_arguments(weight, lora_A, lora_B, scaling, rounding, residual, seed)
    return merge_checked(weight, lora_A, lora_B, scaling, rounding, residual, seed, check=True)


@torch.no_grad()
def merge_checked(
    weight, lora_A, lora_B, scaling, rounding, residual, seed, first_row=0, check=False
) -> torch.Tensor:
    """merge_ without check_arguments. With `check` it still refuses tensors that share memory and an update
    that is not finite.

    `first_row` is the logical row of weight[0] if weight and lora_B are rows of a larger layer.
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
    """A layer's merge followed by the restart of its factors. Arguments are already checked."""

    weight: torch.Tensor  # (rows, in), this rank's rows
    lora_A: torch.Tensor  # (r, in), whole
    lora_B: torch.Tensor  # (rows, r); zeroed
    scaling: float
    rounding: str
    residual: torch.Tensor | None  # on weight's device
    seed: int
    first_row: int
    restart_A: torch.Tensor  # lora_A or this rank's rows of it, drawn anew
    merge_count: torch.Tensor  # int64; incremented
    bound: float
    restart_seed: int
    restart_row: int


@torch.no_grad()
def merge_and_restart(restarts: Sequence[Restart]) -> None:
    """Merge the layers and restart their factors, in as few launches as the backend needs.

    After an error each layer is either merged, restarted and counted, or untouched.
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
            raise ValueError(
                f"{op}: expected residual=None with rounding={rounding!r}, got a tensor; leave it out, "
                f"or use rounding='compensated'"
            )
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
    """Raise FloatingPointError if an update (weight, lora_A, lora_B, scaling, residual, name) cannot be
    computed in finite numbers: the factors, sums of products in any order, scaling times those, and for a
    float16 weight the sum with weight and residual.

    |s| r max|A| max|B| bounds every element of the update. So the usual case takes one reduction over all
    factors of a dtype and one copy to the host per device, without temporaries of a tensor's size. |B| |A|
    is computed, in pieces, only for an update that this bound does not settle.
    """
    updates = [u for u in updates if u[1].numel() > 0 and u[2].numel() > 0 and not u[1].is_meta]
    if not updates:
        return
    with contextlib.ExitStack() as stack:
        for device_type in {"cpu", *(u[1].device.type for u in updates)}:
            stack.enter_context(no_autocast(device_type))
        _check_finite(updates)


def _check_finite(updates) -> None:
    scalings = torch.tensor([u[3] for u in updates], dtype=torch.float64)
    for update, narrow, found in zip(updates, scalings.float().tolist(), _magnitudes(updates)):
        weight, lora_A, lora_B, scaling, residual, name = update
        scaling = abs(scaling if weight.dtype == torch.float64 else narrow)
        if _is_bounded(weight.dtype, lora_A.shape[0], scaling, *found):
            continue
        in_range = weight.dtype == torch.float64 or max(found[:2]) < _FACTORS_END
        if in_range and _is_finite(weight, lora_A, lora_B, update[3], residual):
            continue
        work = torch.promote_types(weight.dtype, torch.float32)
        expected = f"lora_B @ lora_A, and scaling times it, in the range of {work}"
        if work == torch.float32:
            expected = f"factors below 2**120, {expected}"
        if weight.dtype == torch.float16:
            expected += ", its sum with weight in float16's"
        raise FloatingPointError(
            f"{name}: expected a finite update of weight {tuple(weight.shape)} {weight.dtype}: {expected}; "
            f"got scaling {update[3]:.4g}, max|lora_A| {found[0]:.4g}, max|lora_B| {found[1]:.4g}; nothing "
            f"was merged. Check lora_A and lora_B for NaN, and the learning rate"
        )


# Factors must be below this, except with float64 weights: from about 2^127.99 on tf32 rounds to infinity, and
# the CUDA kernels need headroom for scales (csrc/merge_sm90.cu).
_FACTORS_END = 2.0**120


def _tf32_error(r: int) -> float:
    """Error bound of a sum of r products of factors rounded to 11 bits, relative to the sum of magnitudes."""
    return 2.0**-10 + (r + 8) * 2.0**-23


def _is_bounded(dtype, r, scaling, A, B, weight, residual) -> bool:
    """Whether the largest magnitudes alone prove the update finite. False if one is NaN."""
    products = r * A * B
    work = torch.promote_types(dtype, torch.float32)
    # A tenth of the range leaves room for the sum's own rounding.
    if not products * max(1.0, scaling) < torch.finfo(work).max / 10:
        return False
    if dtype == torch.float16:  # its range is small, so the sum has to fit too
        update = products * scaling * (1 + _tf32_error(r))
        if not update + weight + residual <= torch.finfo(dtype).max:
            return False
    return dtype == torch.float64 or max(A, B) < _FACTORS_END


# max|t| of each tensor, NaN if it holds one; unlike t.abs().amax(), without a temporary of t's size. On a GPU
# one launch serves a list. On a CPU the norm takes 5.8 ms for 2^21 numbers, amax and amin 0.2 to 0.8 ms.
_LARGEST = {
    "cuda": lambda tensors: torch._foreach_norm(tensors, ord=math.inf),
    "cpu": lambda tensors: [torch.maximum(t.amax(), -t.amin()) for t in tensors],
}


def _magnitudes(updates) -> list[list[float]]:
    """max|t| of each update's lora_A, lora_B and, if weight is float16, weight and residual (else 0)."""
    # (device, dtype, the kernels' dtype) -> {place in `found`: tensor}
    groups: dict[tuple, dict[tuple[int, int], torch.Tensor]] = {}
    for row, (weight, lora_A, lora_B, _, residual, _) in enumerate(updates):
        work = torch.promote_types(weight.dtype, torch.float32)
        read = [lora_A, lora_B]
        if weight.dtype == torch.float16:
            read += [weight, residual]
        for column, t in enumerate(read):
            if t is not None:
                groups.setdefault((t.device, t.dtype, work), {})[row, column] = t
    magnitudes: dict[torch.device, list[torch.Tensor]] = {}
    places: dict[torch.device, list[tuple[int, int]]] = {}
    for (device, _, work), tensors in groups.items():
        largest = torch.stack(_LARGEST[device.type](list(tensors.values())))
        # In the kernels' dtype: what overflows there is inf here, too.
        magnitudes.setdefault(device, []).append(largest.to(work).double())
        places.setdefault(device, []).extend(tensors)
    found = torch.zeros(len(updates), 4, dtype=torch.float64)
    for device, values in magnitudes.items():
        rows, columns = zip(*places[device])
        found[rows, columns] = torch.cat(values).cpu()
    return found.tolist()


def _is_finite(weight, lora_A, lora_B, scaling, residual) -> bool:
    """Checks every element, for any order in which a kernel may sum the products."""
    work = torch.promote_types(weight.dtype, torch.float32)
    a = lora_A.to(work)
    a_abs, rows_at_once = a.abs(), max(1, 2**24 // lora_A.shape[1])
    for row in range(0, lora_B.shape[0], rows_at_once):
        rows = slice(row, row + rows_at_once)
        b = lora_B[rows].to(work)
        products = b.abs() @ a_abs
        fits = products * max(1.0, abs(scaling)) < torch.finfo(work).max / 2
        if weight.dtype == torch.float16:
            total = weight[rows] + (b @ a) * scaling
            if residual is not None:
                total += residual[rows].to(total.device)
            error = products * abs(scaling) * _tf32_error(lora_A.shape[0])
            fits &= (total.abs() + error <= 65504) | ~weight[rows].isfinite()
        if not fits.all():
            return False
    return True
