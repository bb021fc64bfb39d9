"""Callbacks for any Hugging Face Trainer: ReLoRA's restarts, non-finite steps, signals."""

import logging
import os
import signal
import time

import torch
from transformers import TrainerCallback

from relora_kernels import ranks, sharding
from relora_kernels.optimizer import keeper
from relora_kernels.schedule import refuse_deepspeed

logger = logging.getLogger(__name__)

# Seconds: launchers forward signals that the terminal or the scheduler has already sent.
_SAME_SIGNAL = 2.0


class ReLoRaCallback(TrainerCallback):
    """Runs ReLoRA's restarts in any Trainer. Also give the Trainer the schedule's learning rate:

        Trainer(model, args, ..., optimizers=(optimizer, schedule.lr_scheduler),
                callbacks=[ReLoRaCallback(schedule)])

    Trainer ends a step in this order: optimizer, learning rate, gradients to zero, this callback,
    then logging, evaluation and checkpoint. So a checkpoint never lies between a boundary's
    learning rate and its merge.

    With FSDP2, leave cpu_ram_efficient_loading off: it handles neither persistent buffers, such as
    merge_count, nor residuals (Accelerate 1.15).

    Raises when training begins: TypeError under DeepSpeed and ValueError under FSDP's first version,
    because a merge cannot reach their flat copies of the parameters; ValueError if the Trainer steps
    another optimizer or scheduler than the schedule's.
    """

    def __init__(self, schedule):
        self.schedule = schedule

    def on_train_begin(
        self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs
    ):
        refuse_deepspeed("ReLoRaCallback", model, optimizer)
        if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
            raise TypeError(
                "ReLoRaCallback: expected TrainingArguments without deepspeed, whose flat copies of "
                "the parameters a merge cannot reach; use fsdp='full_shard' with "
                "fsdp_config={'fsdp_version': 2}, or plain data parallelism"
            )
        if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
            raise ValueError(
                "ReLoRaCallback: expected FSDP's second version, got FullyShardedDataParallel, which "
                "flattens parameters; set fsdp_config={'fsdp_version': 2}"
            )
        if lr_scheduler is not self.schedule.lr_scheduler:
            raise ValueError(
                "ReLoRaCallback: expected the Trainer to step schedule.lr_scheduler, got "
                f"{type(lr_scheduler).__name__}: pass optimizers=(optimizer, schedule.lr_scheduler)"
            )
        if optimizer is not None and keeper(optimizer) is not keeper(self.schedule.optimizer):
            raise ValueError(
                "ReLoRaCallback: expected the Trainer to step schedule.optimizer, whose moments are reset "
                f"and whose rate restarts, got another {type(keeper(optimizer)).__name__}: pass "
                "optimizers=(optimizer, schedule.lr_scheduler)"
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.schedule.restart_if_due():
            logger.info("step %d: merged, cycle %d begins", state.global_step, self.schedule.cycle)


class SkipNonFiniteCallback(TrainerCallback):
    """Skips optimizer steps whose gradients hold NaN or inf: parameters and moments stay as they were.

    Trainer calls it between clipping, which lets such gradients pass, and the optimizer's step. The
    learning rate and the restarts keep counting. After more than `limit` such steps in a row, a
    checkpoint of the clean weights is written and training ends with FloatingPointError. `skipped`
    counts all of them, `in_a_row` the latest; ReLoRaTrainer's checkpoints store both. By then the
    gradients are the same on all ranks, so all ranks skip the same steps.
    """

    def __init__(self, limit: int = 10):
        self.limit, self.skipped, self.in_a_row = limit, 0, 0
        self.first_step = 0  # steps before this phase, for messages
        self.gave_up = ""

    def state_dict(self) -> dict:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if sharding.whole(torch.nn.utils.get_total_norm(gradients)).isfinite():
            self.in_a_row = 0
            return
        if getattr(optimizer, "scaler", None) is None:
            for parameter in model.parameters():
                parameter.grad = None  # optimizers skip parameters without a gradient
        # Otherwise fp16's gradient scaler skips the step; it must see these gradients to scale less.
        self.skipped += 1
        self.in_a_row += 1
        step = self.first_step + state.global_step + 1
        logger.warning("step %d skipped: its gradients are not finite", step)
        if self.in_a_row > self.limit:
            self.gave_up = (
                f"expected finite gradients, got NaN or inf in {self.in_a_row} steps in a row up to "
                f"step {step}; the weights are those of step {step - self.in_a_row}. Lower the "
                f"learning rate, or look at the data of these steps"
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.gave_up:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.gave_up:
            raise FloatingPointError(self.gave_up)


class StopOnSignalCallback(TrainerCallback):
    """On SIGTERM or SIGINT: finish the step, save, and end the process with code 128 + signal.

    train() raises SystemExit with 143 for SIGTERM and 130 for SIGINT. With several processes, it is
    enough if one gets the signal: all stop after the same step, the next one at the latest. A second
    signal, two seconds or more after the first, has the effect that it had before training began.
    Works only in the main thread, like Python's signal handlers.
    """

    def __init__(self):
        self.first_step = 0  # steps before this phase, for messages
        self.received, self.received_at, self.stopping = 0, 0.0, 0
        self._votes, self._before = None, {}

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before.setdefault(number, signal.signal(number, self._receive))

    def restore(self) -> None:
        """Reinstall the signal handlers from before training."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number, frame) -> None:
        now = time.monotonic()
        if self.received and now - self.received_at < _SAME_SIGNAL:
            return
        if self.received:
            self.restore()
            signal.raise_signal(number)
            return
        self.received, self.received_at = number, now
        name = signal.Signals(number).name
        # The signal may have interrupted print, which is not reentrant.
        os.write(2, f"{name}: finishing the step, then saving; again: at once\n".encode())

    def on_step_end(self, args, state, control, **kwargs):
        # With several processes, use the previous step's votes: they have arrived, so nothing waits.
        votes, self._votes = self._votes, ranks.start_maximum([self.received])
        if ranks.count() == 1:
            votes = self._votes
        self.stopping = self.stopping or (votes()[0] if votes else 0)
        if self.stopping:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()
        if self.stopping and state.global_step < state.max_steps:
            if state.is_world_process_zero:
                step = self.first_step + state.global_step
                name = signal.Signals(self.stopping).name
                logger.warning("stopped by %s after step %d; resume to go on", name, step)
            raise SystemExit(128 + self.stopping)
