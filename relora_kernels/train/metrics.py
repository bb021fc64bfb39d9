"""Reporting during a run: rows of metrics, and the sinks that take them."""

import errno
import json
import logging
import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class MetricsCallback(TrainerCallback):
    """Turns what the Trainer reports into rows, and hands each row to every sink.

    A row holds phase, step, tokens, seconds, cycle, and either loss, lr, grad_norm,
    tokens_per_second and peak_memory (MiB), or eval_loss, or restart (true) and lr, or skipped (true),
    or what `diagnostics` measured. Steps and tokens are counted over both phases. Put it after
    ReLoRaCallback. A failing sink is reported once and does not stop the training.
    """

    def __init__(
        self,
        sinks: list[Callable[[dict], None]],
        phase: str,
        first_step: int,
        tokens_per_step: int,
        seconds: float = 0.0,
        schedule=None,
        guard=None,
        diagnostics=None,
    ):
        self.sinks, self.phase, self.schedule = sinks, phase, schedule
        self.first_step, self.tokens_per_step = first_step, tokens_per_step
        self.started = time.perf_counter() - seconds
        self.failed: set[int] = set()
        self.cycle, self.guard, self.skipped = None, guard, 0
        self.diagnostics = diagnostics

    def on_train_begin(self, args, state, control, **kwargs):
        self.cycle = self.schedule and self.schedule.cycle
        self.skipped = self.guard.skipped if self.guard else 0
        self._restart_clock(state)

    def on_step_end(self, args, state, control, **kwargs):
        if self.guard and self.guard.skipped != self.skipped:
            self.skipped = self.guard.skipped
            self._emit(state, skipped=True)
        if self.diagnostics and (measured := self.diagnostics.take()):
            self._emit(state, **measured)
        if self.schedule and self.schedule.cycle != self.cycle:
            self.cycle = self.schedule.cycle
            lr = self.schedule.lr_scheduler.get_last_lr()[0]
            self._emit(state, restart=True, lr=lr)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:  # evaluation and the end of training log here too
            return
        steps = state.global_step - self.clock_step
        seconds = time.perf_counter() - self.clock
        self._emit(
            state,
            loss=logs["loss"],
            lr=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=steps * self.tokens_per_step / seconds,
            peak_memory=peak_memory_mib(),
        )
        self._restart_clock(state)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._emit(state, eval_loss=metrics["eval_loss"])
        self._restart_clock(state)

    def on_save(self, args, state, control, **kwargs):
        self._restart_clock(state)

    def _restart_clock(self, state):
        """Keep validation and checkpoints out of tokens_per_second."""
        self.clock, self.clock_step = time.perf_counter(), state.global_step

    def _emit(self, state, **values):
        if not state.is_world_process_zero:
            return
        step = self.first_step + state.global_step
        row = {
            "phase": self.phase,
            "step": step,
            "tokens": step * self.tokens_per_step,
            "seconds": round(time.perf_counter() - self.started, 3),
            "cycle": self.cycle,
            **values,
        }
        for i, sink in enumerate(self.sinks):
            try:
                sink(row)
            except Exception as error:
                if i not in self.failed:
                    self.failed.add(i)
                    logger.warning("metrics are being lost, training goes on: %r", error)


def peak_memory_mib() -> float:
    """This process's peak: allocated GPU memory if there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def json_lines(path: Path) -> Callable[[dict], None]:
    """A sink that appends each row to `path`, whole or (if the disk is full) not at all."""

    def write(row: dict) -> None:
        # JSON has no NaN or inf: such a loss or norm is written as null.
        finite = {
            k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()
        }
        line = (json.dumps(finite, allow_nan=False) + "\n").encode()
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                os.fsync(file.fileno())  # on disk before the checkpoint of this step is
            except OSError:
                file.truncate(end)  # the next row must not be joined to half a row
                raise

    return write


def tensorboard(folder: Path, purge_step: int | None = None) -> Callable[[dict], None] | None:
    """A sink for TensorBoard, or None if it is not installed.

    A restart is a mark of height 1 under relora/restart, and a line of text with its cycle. Entries
    of an interrupted run from `purge_step` on are hidden.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer, marked = SummaryWriter(folder, purge_step=purge_step), -1

    def write(row: dict) -> None:
        nonlocal marked
        scalars = {k: v for k, v in row.items() if k not in ("phase", "step", "seconds")}
        if "restart" in row:
            marked = row["step"]
        elif row["cycle"] is not None and row["step"] > marked:
            scalars["restart"] = 0  # between the marks, so that they stand out as spikes
        for name, value in scalars.items():
            if value is not None:
                writer.add_scalar(f"{row['phase']}/{name}", value, row["step"])
        if "restart" in row:
            text = f"step {row['step']}: merged, A and B start anew, cycle {row['cycle']} begins"
            writer.add_text("restarts", text, row["step"])
        writer.flush()

    return write


class Progress:
    """A sink that prints validations and restarts; in a terminal, also one bar over all phases."""

    def __init__(self, steps: int):
        # disable=None: tqdm shows the bar only in a terminal
        self.bar = tqdm(total=steps, unit="step", disable=None, dynamic_ncols=True)
        self.last = {}

    def __call__(self, row: dict) -> None:
        self.last |= row
        if "restart" in row:
            self._say(f"restart {row['cycle']}: merged, A and B start anew")
        elif "eval_loss" in row:
            self._say(f"validation {row['eval_loss']:.4f}  {self._status()}")
        self.bar.update(row["step"] - self.bar.n)
        self.bar.set_postfix_str(self._status())

    def close(self) -> None:
        self.bar.close()

    def _say(self, text: str) -> None:
        row, steps = self.last, self.bar.total
        place = f"step {row['step']:>{len(str(steps))}}/{steps}  {row['phase']:<10}"
        tqdm.write(f"{place}  {text}".rstrip())

    def _status(self) -> str:
        row = self.last
        if "loss" not in row:
            return ""
        cycle = "" if row["cycle"] is None else f"cycle {row['cycle']}  "
        return (
            f"{cycle}training {row['loss']:.4f}  lr {row['lr']:.2e}  "
            f"{row['tokens_per_second']:,.0f} tokens/s  {row['peak_memory']:,.0f} MiB"
        )
