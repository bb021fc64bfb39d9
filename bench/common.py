"""The problems that are measured, and how one row of pytest-benchmark is."""

import itertools
import os
import statistics
import subprocess
from pathlib import Path

import peers
import torch
import train_step

from relora_kernels import evidence, measure
from relora_kernels.problems import (
    MODELS,
    Linear,
    Merge,
    Prune,
    from_dict,
    moments,
    projections,
)

ROOT = Path(__file__).resolve().parents[1]
# Pathspecs that exclude a run's own output from git status.
RESULTS = (":!bench/results", ":!relora_kernels/records")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
MAIN_LOOP, PAIR = "main loop", "backward by PAIR"
KEY_SHAPES = [(4096, 4096), (2048, 5461), (1024, 1024)]
# Every (in, out) of the paper's models and of a 7B model. The odd 5461 is compared with 5464.
SHAPES = list(
    dict.fromkeys(
        [
            *KEY_SHAPES,
            (2048, 2048),
            (768, 768),
            (5461, 2048),
            *((i, o) for h, f, _ in MODELS.values() for i, o in projections(h, f)),
            (2048, 5464),
            (5464, 2048),
            (4096, 11008),
            (11008, 4096),
        ]
    )
)
# Problems of lora_linear on a GPU: shapes, tokens, ranks, directions.
LINEAR = [
    ([(4096, 4096), (2048, 5464)], [16384], [128], [MAIN_LOOP]),
    (KEY_SHAPES, [16384], [128], [PAIR]),
    (SHAPES, [16384], [128], [BOTH, FORWARD, BACKWARD]),
    (KEY_SHAPES, [2048, 4096, 8192, 32768], [128], [BOTH]),
    (KEY_SHAPES, [16384], [16, 64, 512], [BOTH]),
]
_HIDDEN, _FEED_FORWARD, _LAYERS = MODELS["1.3b"]
_LARGEST_MODEL = projections(_HIDDEN, _FEED_FORWARD) * _LAYERS
ROUNDINGS = ("nearest", "compensated", "stochastic")
SMALL = {  # for a CPU: just enough to see that everything runs
    "linear": [
        Linear(512, 512, 512, 64, d, "float32", "float32") for d in (BOTH, FORWARD, BACKWARD)
    ],
    "merge": [Merge(((512, 384),), 64, rounding) for rounding in ROUNDINGS],
    "prune": [Prune((1_000_000,)), Prune(moments(projections(256, 344), 32), paired=True)],
}


def problems(op: str, gpu: bool = GPU) -> list:
    """The problems of `op`: the full set on a GPU, a few small ones on a CPU."""
    if not gpu:
        return SMALL[op]
    if op == "linear":
        return list(
            dict.fromkeys(
                Linear(m, *shape, r, direction)
                for shapes, tokens, ranks, directions in LINEAR
                for shape, m, r, direction in itertools.product(shapes, tokens, ranks, directions)
            )
        )
    if op == "merge":
        sizes = [
            (2048, 2048), (4096, 4096), (5461, 2048), (2048, 5461), (1024, 1024), (11008, 4096),
        ]  # fmt: skip
        model = tuple((out, in_) for in_, out in _LARGEST_MODEL)
        return [
            Merge(model, 128),
            *(Merge(shapes, 128, by="KERNEL") for shapes in (model, ((4096, 4096),))),
            *(Merge((size,), 128, rounding) for size in sizes for rounding in ROUNDINGS),
            Merge(model, 128, "compensated"),
            *(Merge(((4096, 4096),), r) for r in (16, 64, 512)),
            Merge(((4096, 4096),), 128, dtype="float32"),
            Merge(((4096, 4096),), 128, factors="bfloat16"),
        ]
    return [
        Prune(moments(_LARGEST_MODEL, 128), paired=True),
        Prune((100_000_000,)),
        Prune(moments(_LARGEST_MODEL, 128)),
        Prune(moments(_LARGEST_MODEL, 128), paired=True, ratio=0.99),  # the paper's
        Prune((100_000_000,), dtype="bfloat16"),
        Prune((2**24,)),
    ]


def by_worth(gpu: bool) -> list:
    """All problems, most important first, so that a short time budget covers what matters."""

    def key(problem) -> int:
        if not isinstance(problem, Linear):
            return 1 if problem in (merges[:9] + prunes[:2]) else 3
        shape = problem.in_features, problem.out_features
        usual = problem.tokens == 16384 and problem.r == 128
        if usual and problem.direction != BACKWARD:
            return 0 if shape in KEY_SHAPES or problem.direction == MAIN_LOOP else 2
        return 2 if usual else 4

    merges, prunes = problems("merge", gpu), problems("prune", gpu)
    return sorted(dict.fromkeys([*problems("linear", gpu), *merges, *prunes]), key=key)


def run_case(case: dict) -> dict:
    """Run one case of gpu_check.py, in its worker: the machine, a train step, or a row of a problem."""
    device = torch.device("cuda", 0) if case["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda" and not GPU:
        raise RuntimeError("expected a CUDA GPU that torch can use, got none")
    if case["kind"] == "machine":
        return machine(device)
    if case["kind"] == "train":
        return train_step.run(case, device)
    problem = from_dict(case["problem"])
    return measure.run(problem, peers.rows(problem)[case["row"]], device, case["seconds"])


def parameters(problems: list) -> list:
    """pytest parameters of every row of every problem; the rows of one problem are neighbours."""
    import pytest

    return [
        pytest.param(problem, row, id=f"{problem.name} - {row}")
        for problem in dict.fromkeys(problems)
        for row in peers.rows(problem)
    ]


def measure_row(benchmark, problem, name: str) -> None:
    """Check the row, then time it by Python's clock, including the wait for the device. On a GPU, also
    by the device's clock, in turns with the baseline (extra_info: median_s, baseline_s)."""
    import pytest

    row = peers.rows(problem)[name]
    try:
        info = {
            "row": name,
            **measure.facts(problem, DEVICE),
            **measure.check(problem, row, DEVICE),
        }
    except measure.Unavailable as error:
        pytest.skip(str(error))
    if GPU:
        info |= measure.times(problem, row, DEVICE)
    sets = measure.operands(problem, DEVICE)
    steps = itertools.cycle(problem.steps(row, sets))
    restores = itertools.cycle([o.restore for o in sets] if hasattr(sets[0], "restore") else [])
    benchmark.group = problem.name
    benchmark.pedantic(
        lambda: next(steps)(),
        setup=lambda: next(restores, lambda: None)(),
        rounds=20 if GPU else 5,
        warmup_rounds=3 if GPU else 1,
    )
    if benchmark.stats is not None:  # None under --benchmark-disable
        info.setdefault("median_s", benchmark.stats.stats.median)
        info.setdefault("fraction_of_floor", info["floor_s"] / info["median_s"])
    benchmark.extra_info.update(info)


_IN_TURNS: dict[str, dict[str, list[float]]] = {}  # group -> function -> seconds of each sample


def measure_in_turns(benchmark, group: str, name: str, functions: dict) -> None:
    """Report one of several functions that are timed in turns; extra_info gets all medians."""
    if group not in _IN_TURNS:
        steps = {n: [function] for n, function in functions.items()}
        # By Python's clock on a GPU, too: the device's clock would miss the overhead measured here.
        _IN_TURNS[group] = measure.timings(steps, torch.device("cpu"), seconds=1.0)
    found = _IN_TURNS[group]
    # Sample by sample, so that what slows the machine down for a while slows both sides of a ratio.
    ratios = [mine / by_hand for mine, by_hand in zip(found[name], found["by hand"])]
    benchmark.group = group
    benchmark.extra_info.update(
        row=name, group=group, median_s=statistics.median(found[name]),
        in_turns={n: statistics.median(samples) for n, samples in found.items()},
        ratio_to_by_hand=statistics.median(ratios),
    )  # fmt: skip
    benchmark.pedantic(functions[name], rounds=30, iterations=5, warmup_rounds=3)


def machine(device: torch.device = DEVICE) -> dict:
    """Device, versions and commit of a run, and the rates that its floors are computed from."""
    return {
        **evidence.identity(device),
        "cuda": torch.version.cuda or "none",
        "l2_bytes": measure.l2_bytes(device),
        "commit": commit(),
        "rates": measure.rates(device),
    }


def commit() -> str:
    """The commit that is measured, with a + if files differ from it (other than results of earlier
    runs). Set RELORA_KERNELS_COMMIT to name it in a copy of the tree without git history."""
    if os.environ.get("RELORA_KERNELS_COMMIT"):
        return os.environ["RELORA_KERNELS_COMMIT"]

    def git(*arguments) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *RESULTS)
        return git("rev-parse", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
