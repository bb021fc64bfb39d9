"""What each part of ReLoRA brings: a grid of relora-train runs at equal tokens, a table and plots.

    python bench/ablation.py                                   micro, core grid, seed 0
    python bench/ablation.py --grid core rank cycle --seeds 0 1 2
    python bench/ablation.py --size 60m --train_files corpus/ --minutes 8     as often as it takes
    python bench/ablation.py --report                          the table and plots of what is there

Unknown options are passed to relora-train in every run.

A run is a relora-train folder, <output>/<run>-<seed>. Finished runs are skipped, interrupted ones
resumed; runs made with other options are refused. Runs of one seed share a warm start if theirs would
be the same. Equal steps and batches mean equal tokens. A run that gave up because its gradients were
no longer finite is over, too; the table says so. However this driver is killed, its runs save a
checkpoint and end (on Linux).

Exit code 0: all runs are over. 1: a run failed; the others continue, and the next call retries it.
2: bad options. 3: --minutes ran out; the runs that are named are left for the next call.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import yaml
from ablation_report import diverged_at, write_report
from tqdm import tqdm

from relora_kernels.train import SkipNonFiniteCallback
from relora_kernels.train.args import parse_args
from relora_kernels.train.output import RunFolder

# run -> its changes to the size's defaults. "steps" stands for the number of steps, a rate of "x 2" for
# twice the default, "<= 25" for the default but at most 25; {} is the project's defaults.
ONE_CYCLE, BF16 = {"cycle_steps": "steps"}, {"bf16": "true"}
# As the authors' code: factors and their moments in bf16, too, each moment pruned by its own mask.
UPSTREAM = BF16 | {"lora_dtype": "bfloat16", "merge_rounding": "nearest", "no_paired": True}
ROUNDINGS = ("nearest", "stochastic", "compensated")
GRIDS = {
    "core": {
        "full-rank": {"warm_start_steps": "steps"},
        "lora": ONE_CYCLE,
        "relora": {},
        "lora-from-scratch": {"warm_start_steps": 0} | ONE_CYCLE,
        "relora-from-scratch": {"warm_start_steps": 0},
        "relora-no-jagged": {"restart_warmup_steps": 0},
        "reset-none": {"reset_mode": "none"},
        "reset-zero": {"reset_mode": "zero"},
        "reset-random": {"reset_mode": "random"},
        "reset-paired-20": {"restart_warmup_steps": 20},
        "reset-independent-20": {"restart_warmup_steps": 20, "no_paired": True},
        **{f"bf16-{rounding}": BF16 | {"merge_rounding": rounding} for rounding in ROUNDINGS},
        "upstream": UPSTREAM,
        # As much restart warm-up as independent masks need.
        "upstream-warmup100": UPSTREAM | {"restart_warmup_steps": 100, "cycle_steps": 200},
    },
    # Many small merges, as at the end of a long run or in fine-tuning.
    "rounding": {
        f"bf16-small-{rounding}": BF16
        | {"merge_rounding": rounding, "learning_rate": "x 0.05", "cycle_steps": 10}
        | {"restart_warmup_steps": 0}
        for rounding in ROUNDINGS
    },
    "rank": {
        f"{kind}-r{r}": {"lora_r": r, **changes}
        for r in (1, 4, 16, 32, 128)
        for kind, changes in (("lora", ONE_CYCLE), ("relora", {}))
    },
    "cycle": {
        f"relora-cycle{n}": {"cycle_steps": n, "restart_warmup_steps": f"<= {n // 2}"}
        for n in (50, 200, 300, 500, 1000)
    },
    "rate": {
        f"{kind}-lr{factor}": {"learning_rate": f"x {factor}", **changes}
        for factor in (2, 4)
        for kind, changes in (("lora", ONE_CYCLE), ("relora", {}))
    },
}

SIZES = ("micro", "60m", "130m")
# The runs whose warm start the others of the same seed take. bf16 runs need one of their own.
DONOR, BF16_DONOR = "lora", "bf16-compensated"
# relora-train options reserved for this driver; settings that may differ between the runs of a table.
OWN = ("--config", "--output_dir", "--overwrite", "--preset", "--resume", "--seed",
       "--warm_start_from")  # fmt: skip
FREE = ("micro_batch_size", "seed", "sharding", "warm_start_from")
TRAIN = [sys.executable, "-m", "relora_kernels.train"]
# If this process is killed, its runs get SIGTERM, at which they save and end. They drop the current folder, which
# Python puts first in sys.path: it may hold the sources instead of what is installed.
if sys.platform == "linux":
    TRAIN = [sys.executable, "-c", "import os, runpy, signal, sys\n"
             "if not sys.path[0]: del sys.path[0]\n"
             "from relora_kernels.worker import die_with_the_parent\n"
             "die_with_the_parent(int(sys.argv.pop(1)), signal.SIGTERM)\n"
             "runpy.run_module('relora_kernels.train', run_name='__main__', alter_sys=True)",
             str(os.getpid())]  # fmt: skip
LEFT = 3  # exit code


def main() -> None:
    options = parse_options()
    output = Path(options.output or f"ablation-{options.size}")
    names = chosen(options.grid, options.only)
    seeds = options.seeds or (seeds_in(output) if options.report else [0])
    runs = [(n, s) for s in dict.fromkeys(seeds) for n in names]
    if wrong := mixed(runs, output, None if options.report else options.base):
        _refuse(f"runs in {output} differ, give another --output: " + "; ".join(wrong[:5]))
    failed = [] if options.report else train_all(runs, options, output)
    over = [(name, seed) for name, seed in runs if is_over(output / f"{name}-{seed}")]
    left = [f"{name}-{seed}" for name, seed in runs if (name, seed) not in over]
    if over:
        write_report(output, over)
        print(f"{len(over)} runs in {output}/table.md and its plots", end=", ")
    print(f"{len(left)} to do" + (f": {', '.join(left)}" if left and not options.report else ""))
    if failed or not over and options.report:
        sys.exit("ablation: " + ("; ".join(failed) or f"no finished run in {output}"))
    if left and not options.report:
        print(f"ablation: {options.minutes} minutes are over; call again to go on", file=sys.stderr)
        sys.exit(LEFT)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="micro")
    parser.add_argument("--grid", nargs="+", choices=GRIDS, help="default: core; all for --report")
    parser.add_argument("--only", nargs="+", help="runs of the grids by name")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0; all for --report")
    parser.add_argument("--output", help="folder of the runs; default ablation-<size>")
    parser.add_argument("--train_files", nargs="+", help="text; default: Python's standard library")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of each run; default: the preset's"
    )
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else 2,
                        help="runs at a time")  # fmt: skip
    parser.add_argument("--minutes", type=float, help="be done within so long (a tenth is kept for "
                        "saving and the table); the next call goes on")  # fmt: skip
    parser.add_argument("--report", action="store_true", help="train nothing")
    options, more = parser.parse_known_args()  # more: for relora-train, in every run
    if taken := [word for word in more if word.split("=")[0] in OWN]:
        parser.error(f"expected options that all runs can share, got {', '.join(taken)}")
    if options.jobs < 1:
        parser.error(f"expected --jobs >= 1, got {options.jobs}")
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"expected --minutes > 0, got {options.minutes}")
    if wrong := [seed for seed in options.seeds or () if not 0 <= seed < 2**32]:
        parser.error(f"expected --seeds from 0 to 2^32 - 1, got {wrong[0]}")
    if options.output and Path(options.output).exists() and not Path(options.output).is_dir():
        parser.error(f"expected --output to be a folder, got the file {options.output}")
    options.grid = options.grid or (list(GRIDS) if options.report else ["core"])
    options.words = ["--preset", options.size, "--diagnostics", "true", *more]
    if options.steps is not None:
        options.words += ["--steps", str(options.steps)]
    if options.train_files:
        options.words += ["--train_files", *options.train_files]
    options.base = parse_args(options.words)  # exits with a message for a bad option
    return options


def chosen(grids: list[str], only: list[str] | None) -> list[str]:
    names = list(dict.fromkeys(name for grid in grids for name in GRIDS[grid]))
    if unknown := set(only or ()) - set(names):
        _refuse(f"expected --only out of {', '.join(names)}, got {', '.join(unknown)}")
    return list(dict.fromkeys(only or names))


def _refuse(why: str) -> NoReturn:
    print(f"ablation: {why}", file=sys.stderr)
    sys.exit(2)


def seeds_in(output: Path) -> list[int]:
    runs = [path.parent for path in output.glob("*-*/metrics.jsonl")]
    runs = [run for run in runs if run.name.rpartition("-")[2].isdecimal()]  # not a user's folder
    return sorted({int(run.name.rpartition("-")[2]) for run in runs if is_over(run)})


def changes_of(name: str) -> dict:
    return next(grid[name] for grid in GRIDS.values() if name in grid)


def mixed(runs: list, output: Path, base) -> list[str]:
    """Settings in which existing runs differ from `base` or each other, beyond what their names say."""
    seen = {key: (value, "these options") for key, value in base.settings().items()} if base else {}
    wrong = []
    for name, seed in runs:
        folder = output / f"{name}-{seed}"
        if not is_over(folder) and not can_resume(folder):
            continue
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        settings["corpus"] = json.loads((folder / "corpus.json").read_text())["sha256"]
        own = {key.removeprefix("no_") for key in changes_of(name)}
        for key in settings.keys() - own - set(FREE):
            value, other = seen.setdefault(key, (settings[key], folder.name))
            if value != settings[key]:
                wrong.append(f"{folder.name}: {key} {settings[key]}, {other}: {value}")
    return sorted(wrong)


# ---- Training ------------------------------------------------------------------------------------


def train_all(runs: list, options, output: Path) -> list[str]:
    """Train each run in its own process, `jobs` at a time, each seed's warm-start donors first.

    Returns a line for each run that failed.
    """
    deadline = time.monotonic() + 54 * options.minutes if options.minutes else float("inf")
    waiting = sorted((r for r in runs if not is_over(output / f"{r[0]}-{r[1]}")),
                     key=lambda r: (r[1], r[0] not in (DONOR, BF16_DONOR)))  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    steps = options.base.steps
    done = sum(progress(output / f"{n}-{s}", steps) for n, s in runs)
    bar = tqdm(total=len(runs) * steps, initial=done, unit="step", mininterval=5,
               dynamic_ncols=True)  # fmt: skip
    running: dict[str, subprocess.Popen] = {}
    failed: list[str] = []
    try:
        while (waiting or running) and time.monotonic() < deadline:
            for name, seed in list(waiting):
                if len(running) >= options.jobs:
                    break
                if can_start(name, seed, output, running):
                    waiting.remove((name, seed))
                    running[f"{name}-{seed}"] = start(name, seed, options, output)
            time.sleep(1)
            for run, process in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    if gave_up(output / run):
                        tqdm.write(f"{run}: diverged, see {output / run}.log")
                    elif process.returncode:
                        failed.append(f"{run}: exit {process.returncode}, see {output / run}.log")
                        tqdm.write(failed[-1])
            bar.set_postfix_str(", ".join(running), refresh=False)
            bar.update(sum(progress(output / f"{n}-{s}", steps) for n, s in runs) - bar.n)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)  # it saves a checkpoint and ends
        for process in running.values():
            process.wait()
        bar.close()
    return failed


def can_start(name: str, seed: int, output: Path, running) -> bool:
    donor = f"{donor_of(name)}-{seed}"
    return donor not in running or has_warm_start(output / donor)


def donor_of(name: str) -> str | None:
    """The run whose warm start `name` takes, if its own would be the same."""
    changes = changes_of(name)
    donor = BF16_DONOR if "bf16" in changes else DONOR
    return None if name == donor or "warm_start_steps" in changes else donor


def has_warm_start(run: Path) -> bool:
    return is_finished(run) or (run / "checkpoint" / "relora").exists()


def start(name: str, seed: int, options, output: Path) -> subprocess.Popen:
    folder = output / f"{name}-{seed}"
    command = [*TRAIN, "--output_dir", folder]
    if can_resume(folder):
        command += ["--resume", "true"]
    else:
        command += flags(name, seed, options)
        donor = output / f"{donor_of(name)}-{seed}"
        if has_warm_start(donor):
            command += ["--warm_start_from", donor]
        if folder.exists():
            command += ["--overwrite", "true"]
    with open(f"{folder}.log", "ab") as log:
        return subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT)


def flags(name: str, seed: int, options) -> list:
    base = options.base
    settings = {"seed": seed, "steps": base.steps, **changes_of(name)}
    if "learning_rate" in settings:
        factor = float(settings["learning_rate"].removeprefix("x "))
        settings["learning_rate"] = factor * base.learning_rate
        settings["warm_start_learning_rate"] = base.warm_start_learning_rate
    words = list(options.words)
    for key, value in settings.items():
        value = base.steps if value == "steps" else value
        if str(value).startswith("<= "):
            value = min(getattr(base, key), int(value.removeprefix("<= ")))
        words += [f"--{key}"] if value is True else [f"--{key}", value]
    return words


def can_resume(run: Path) -> bool:
    return (run / "config.yaml").exists() and any(run.glob("checkpoint/*/checkpoint-*"))


def is_finished(run: Path) -> bool:
    return (run / "summary.json").exists()


def gave_up(run: Path) -> bool:
    """Whether SkipNonFiniteCallback ended the run. Resumed, it would end again."""
    rows = [] if is_finished(run) else RunFolder(run).rows()
    start = diverged_at([row for row in rows if "eval_loss" not in row])
    return start is not None and rows[-1]["step"] - start >= SkipNonFiniteCallback().limit


def is_over(run: Path) -> bool:
    return is_finished(run) or gave_up(run)


def progress(run: Path, steps: int) -> int:
    """Steps done, from the last row of metrics.jsonl."""
    if is_finished(run):
        return steps
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):  # not begun, or caught in the middle of a line
        return 0


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # ends the runs too
    main()
