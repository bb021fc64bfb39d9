"""How things are measured: a check against fp64, then a timer, next to the device's floors.

A problem is an op at a shape (problems.py); a `Row` is one way to compute it. `run(problem, row, device)`
rejects a row that is wrong by the tests' rule, then times it alternately with the problem's baseline. The
FLOPs and bytes of a problem are lower bounds. Its floor is the longer of the times that they take at the
rates this device reaches (`rates`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch

from relora_kernels import backend

_EXACT_ROWS = 2**24  # elements of an fp64 result that are computed at once


class Wrong(AssertionError):
    """The row's result is further from fp64 than the rule allows. It is not timed."""


class Unavailable(RuntimeError):
    """The row cannot compute this problem here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to compute a problem.

    make(operands) returns the function to time, which takes no arguments. For Linear it returns y,
    differentiable in `leaves`; for Merge and Prune it changes the operands. `computes`: which formula is the
    oracle. `backend`: the backend in force while it runs. `setting()`: a further context to run it in.
    `why_not(operands)`: None, or why it cannot run.
    """

    make: Callable
    backend: str | None = None
    computes: str = "lora"
    why_not: Callable = lambda operands: None
    setting: Callable = contextlib.nullcontext

    @contextlib.contextmanager
    def in_force(self):
        named = backend.use_backend(self.backend) if self.backend else contextlib.nullcontext()
        with named, self.setting():
            yield


def errors(name: str, got: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """(largest absolute error, relative error in the Frobenius norm); Wrong if `got` is not finite.

    Works in pieces: the fp64 differences of a large result would take more memory than its operands.
    """
    if got.shape != exact.shape:
        raise Wrong(f"{name} has shape {tuple(got.shape)} instead of {tuple(exact.shape)}")
    largest = squares = total = torch.zeros((), dtype=torch.float64, device=exact.device)
    rows = max(1, _EXACT_ROWS // max(1, exact[0].numel() if exact.dim() else 1))
    for ours, right in zip(got.split(rows), exact.split(rows)):
        difference = ours.double() - right
        largest = torch.maximum(largest, difference.abs().max())
        squares, total = squares + difference.square().sum(), total + right.square().sum()
    largest, squares, total = largest.item(), squares.item(), total.item()
    if not math.isfinite(squares):
        raise Wrong(f"{name} is not finite")
    return largest, math.sqrt(squares / total) if total > 0 else 0.0


def l2_bytes(device: torch.device) -> int:
    """Size of the device's L2 cache; 32 MiB is assumed for a CPU."""
    if device.type != "cuda":
        return 2**25
    return torch.cuda.get_device_properties(device).L2_cache_size


def copies(problem, device: torch.device) -> int:
    """Number of operand sets to cycle through, so that no call finds its operands in L2: enough for twice
    the cache, at most 64. One on a CPU, where measuring only tries out the plumbing."""
    if device.type != "cuda":
        return 1
    return max(1, min(64, math.ceil(2 * l2_bytes(device) / problem.resident_bytes)))


def timings(
    steps: dict[str, list[Callable]],
    device: torch.device,
    seconds: float = 0.2,
    restore: dict[str, list[Callable]] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call for each name, one figure per sample.

    A name's functions differ only in their operands and are called in turn. Names alternate sample by
    sample, so that clocks and temperature are the same for all. On a GPU a sample is the time between two
    events with up to 20 calls in between. The device sleeps while the calls are queued, so that Python's
    launch time is not measured. `restore`: called before each sample, not timed; a sample is one call then.
    """
    turns = {name: itertools.cycle(functions) for name, functions in steps.items()}
    before = {n: itertools.cycle(f) for n, f in (restore or {}).items()}
    cost, launch = {}, {}
    for name, functions in steps.items():  # warm-up; the last call gives the cost of one
        for _ in range(max(2, len(functions))):
            if name in before:
                next(before[name])()
            synchronise(device)
            start = time.perf_counter()
            next(turns[name])()
            launch[name] = time.perf_counter() - start
            synchronise(device)
            cost[name] = max(time.perf_counter() - start, 1e-7)
    calls = {n: 1 if n in before else max(1, min(20, math.ceil(1e-3 / cost[n]))) for n in steps}
    round_s = sum(calls[name] * cost[name] for name in steps)
    samples = max(5, min(200, int(seconds / round_s)))
    found = {name: [] for name in steps}
    for _ in range(samples):
        for name in steps:
            if name in before:
                next(before[name])()
            found[name].append(_sample(turns[name], calls[name], launch[name], device))
    if device.type != "cuda":
        return found
    torch.cuda.synchronize(device)
    return {
        name: [start.elapsed_time(end) / 1e3 / calls[name] for start, end in pairs]
        for name, pairs in found.items()
    }


def _sample(turn, calls: int, launch_s: float, device: torch.device):
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            next(turn)()
        return (time.perf_counter() - start) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # In clock cycles, at 2 GHz at most. No longer than 20 ms: it does not help a step that itself waits for
    # the device.
    torch.cuda._sleep(int(2e9 * min(0.02, 1.5 * calls * launch_s)))
    start.record()
    for _ in range(calls):
        next(turn)()
    end.record()
    return start, end


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def rates(device: torch.device) -> dict[str, float]:
    """Rates that this device reaches now: bytes/s of a copy, reads plus writes, and FLOP/s of torch.mm.

    GPU: 1 GiB copied, 8192^3 in bfloat16 on random data. CPU: 64 MiB, 512^3 in float32.
    """
    gpu = device.type == "cuda"
    size, n = (2**30, 8192) if gpu else (2**26, 512)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (
        torch.randn(n, n, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
        for _ in "ab"
    )
    steps = {"copy": [lambda: target.copy_(source)], "gemm": [lambda: torch.mm(a, b)]}
    found = {k: statistics.median(v) for k, v in timings(steps, device, 0.3).items()}
    return {"copy_bytes_per_s": 2 * size / found["copy"], "flop_per_s": 2 * n**3 / found["gemm"]}


def floor_s(problem, device: torch.device) -> float:
    """The time for the problem's FLOPs or for its bytes at `rates`, whichever is longer."""
    reached = rates(device)
    return max(problem.flops / reached["flop_per_s"], problem.bytes / reached["copy_bytes_per_s"])


# The operands of the last problem only, because the rows of one problem are measured one after the other.
_prepared: dict = {}


def operands(problem, device: torch.device) -> list:
    """`copies` sets of operands, the same for every row and direction of the problem."""
    key = problem.same_operands(), device
    if key not in _prepared:
        _prepared.clear()
        torch.manual_seed(0)
        many = copies(problem, device)
        _prepared[key] = [problem.prepare(device) for _ in range(many)]
    return _prepared[key]


def release() -> None:
    """Free the last problem's operands."""
    _prepared.clear()


def check(problem, row: Row, device: torch.device) -> dict:
    """{error, error_over_eager, peak_bytes, ...} of one call. Raises Wrong or Unavailable if the row must
    not be timed."""
    o = operands(problem, device)[0]
    reason = row.why_not(o)
    if reason is not None:
        raise Unavailable(reason)
    return {**problem.check(row, o), "peak_bytes": _peak_bytes(problem, row, o, device)}


def _peak_bytes(problem, row: Row, o, device: torch.device) -> int | None:
    """Memory that a call takes on top of its operands; None on a CPU."""
    if device.type != "cuda":
        return None
    step = problem.steps(row, [o])[0]
    synchronise(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before


def facts(problem, device: torch.device) -> dict:
    """What a record says about a problem besides its times."""
    return {
        "problem": problem.to_dict(),
        "group": problem.name,
        "flops": problem.flops,
        "bytes": problem.bytes,
        "floor_s": floor_s(problem, device),
        "copies": copies(problem, device),
        "l2_bytes": l2_bytes(device),
    }


def times(problem, row: Row, device: torch.device, seconds: float = 0.2) -> dict:
    """Time the row alternately with the problem's baseline: medians of both, in seconds."""
    sets = operands(problem, device)
    baseline = problem.baseline()
    steps = {"row": problem.steps(row, sets), "baseline": problem.steps(baseline, sets)}
    restore = {}
    if row.computes != "copy" and hasattr(sets[0], "restore"):
        restore = {"row": [o.restore for o in sets]}
    found = timings(steps, device, seconds, restore)
    low, median, high = statistics.quantiles(found["row"], n=10)[::4]
    return {
        "median_s": median,
        "p10_s": low,
        "p90_s": high,
        "samples": len(found["row"]),
        "baseline": problem.BASELINE,
        "baseline_s": statistics.median(found["baseline"]),
        "fraction_of_floor": floor_s(problem, device) / median,
    }


def run(problem, row: Row, device: torch.device, seconds: float = 0.2) -> dict:
    """Check, then time. Returns {"status": "ok", ...}, or "wrong" or "unavailable" with a "reason"."""
    try:
        checked = check(problem, row, device)
    except Unavailable as error:
        return {**facts(problem, device), "status": "unavailable", "reason": str(error)}
    except Wrong as error:
        return {**facts(problem, device), "status": "wrong", "reason": str(error)}
    record = {**facts(problem, device), **checked, **times(problem, row, device, seconds)}
    fits = problem.evidence_class(operands(problem, device)[0])
    return {**record, "status": "ok", "evidence": fits}
