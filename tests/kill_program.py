"""Kills runs of relora-train at random points, resumes each, and reports whether the result is the same.

`kill_program.py FOLDER FIRST LAST SEED [FLAG ...]` prints one line of JSON per kill point. Runs are forked
after the imports, before torch computes anything (a fork does not copy threads). A kill point is the n-th
call of one of the functions below: SIGKILL ends the process before it, after it, or in the middle of
what it writes.
"""

import gc
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch
import train_runs
from train_runs import digest, rows_to_compare

from relora_kernels import files, schedule
from relora_kernels.reference import merge
from relora_kernels.train import checkpoint, cli

# Optimizer steps; the two halves of a restart and one layer's merge; between the phases; the export; files.
WATCHED = [
    (torch.optim.AdamW, "step"),
    (schedule, "merge_and_reinit"),
    (merge, "merge_"),
    (schedule, "reset_optimizer"),
    (cli, "apply_relora"),
    (cli, "merge_and_unload"),
    (cli.LlamaForCausalLM, "save_pretrained"),
    (Path, "rename"),
    (checkpoint, "save_file"),
    (checkpoint, "_measure"),
    (os, "fsync"),
    (os, "rename"),
    (checkpoint.shutil, "rmtree"),
    (files, "write_text"),
]


def _name(owner, name):
    return f"{owner.__name__}.{name}"


def watch(kill_at=None, seen=None):
    """Counts the calls of WATCHED; at call `kill_at`[0] kills the process as `kill_at`[1] says."""
    calls = iter(range(10**9))

    def wrap(owner, name):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            number = next(calls)
            if seen is not None:
                seen.append(_name(owner, name))
            how = kill_at[1] if kill_at and number == kill_at[0] else None
            if how == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if how == "half" and name == "save_file":
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            if how:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, call)

    for entry in WATCHED:
        wrap(*entry)


def forked(log, work):
    """Runs `work` in a child. Returns its exit code, which is `work`'s result, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                try:
                    code = work()
                except SystemExit as end:
                    code = end.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def draw(seen, first, last, rng):
    """Kill points `first` to `last`, as (call, how). They take the watched functions in turn."""
    calls, drawn = {}, []
    for number, name in enumerate(seen):
        calls.setdefault(name, []).append(number)
    names = [_name(*watched) for watched in WATCHED]
    for i in range(first, last):
        number = rng.choice(calls[names[i % len(names)]])
        drawn.append((number, rng.choice(["before", "after", "half"])))
    return drawn


def main(folder, first, last, seed, *flags):
    folder, rng = Path(folder), random.Random(int(seed))
    run = train_runs.flags(folder / "words.txt", "OUT", **train_runs.ODD_INTERVALS) + list(flags)
    # The plots and the sample after the export take as long as the training, and are not compared.
    cli.report.plot_metrics = cli.report.sample_text = lambda *args: ""
    gc.freeze()  # keeps the imports out of Accelerate's garbage collections: a second per run

    def start(out, **kill):
        def work():
            seen = []
            watch(seen=seen, **kill)
            code = cli.main([str(out) if flag == "OUT" else flag for flag in run])
            (folder / "seen.json").write_text(json.dumps(seen))
            return code

        return forked(folder / "first.log", work)

    reference = folder / "reference"
    assert start(reference) == 0, (folder / "first.log").read_text()
    expected = digest(reference), rows_to_compare(reference)
    seen = json.loads((folder / "seen.json").read_text())
    for number, how in draw(seen, int(first), int(last), rng):
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        ended = start(out, kill_at=(number, how))
        begun = (out / "config.yaml").exists()  # else there is nothing to resume, and nothing lost
        again = ["--resume", "--output_dir", str(out)] if begun else []
        again = again or [str(out) if flag == "OUT" else flag for flag in run]
        if not begun:
            shutil.rmtree(out, ignore_errors=True)
        resumed = forked(folder / "second.log", lambda: cli.main(again))
        log = (folder / "second.log").read_text()
        print(
            json.dumps(
                {
                    "point": [seen[number], number, how],
                    "killed": ended == -signal.SIGKILL,
                    "resumed": resumed,
                    "same_weights": resumed == 0 and digest(out) == expected[0],
                    "same_rows": resumed == 0 and rows_to_compare(out) == expected[1],
                    "left_over": [p.name for p in (out / "checkpoint").glob("*/tmp-*")],
                    "log": log[-2000:] if resumed else "",
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
