"""ReLoRaTrainer: a Hugging Face Trainer whose checkpoints survive a kill and resume bit for bit."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Trainer, set_seed
from transformers.trainer_callback import ExportableState

from relora_kernels import ranks, sharding
from relora_kernels.model import relora_layers
from relora_kernels.reference import philox

from . import checkpoint
from .callback import ReLoRaCallback, StopOnSignalCallback

logger = logging.getLogger(__name__)

# Trainer's private methods that are overridden below. If a later transformers dropped one, its
# override would never be called and runs would have no checkpoints, so a missing one is an error.
_HOOKS = (
    "_save_checkpoint",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_scaler",
    "_load_rng_state",
)
_LOSS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")


class ReLoRaTrainer(Trainer):
    """Trainer with checkpoints in safetensors and JSON, written whole or not at all, and verified.

    Takes Trainer's arguments and `fingerprint`: named numbers and strings that a resumed run must
    match (the hash of its corpus, say). The settings of ReLoRA, its schedule and the batches are added.

    - A checkpoint holds the model with W's residuals, optimizer, schedule, random generators of every
      rank, gradient scaler, the sum of losses not logged yet, and the state of every callback that has
      state_dict and load_state_dict. With the same number of processes, a resumed run continues bit
      for bit as if it had never stopped. With another number, the generators are seeded anew and sums
      are taken in another order.
    - `train(resume_from_checkpoint=True)` resumes from the last valid checkpoint in output_dir.
    - A full disk does not stop training: the half-written checkpoint is removed and a warning is
      logged. It is an error only if the run is about to stop early (after a signal, say).
    - A model that `fully_shard` has sharded is used as it is (make the optimizer after sharding);
      Accelerate puts any other model into DDP. Checkpoints hold whole tensors, gathered and written
      by rank 0, on a file system that all ranks see.

    The constructor raises RuntimeError if transformers lacks a method that this class overrides, and
    ValueError for torch_compile with a model sharded by the caller.
    """

    def __init__(self, *args, fingerprint: dict | None = None, **kwargs):
        if missing := [name for name in _HOOKS if not hasattr(Trainer, name)]:
            raise RuntimeError(
                f"ReLoRaTrainer: expected a Trainer with {', '.join(missing)}, got transformers "
                f"{transformers.__version__} without; use transformers 5.17 to 5.23, or the stock "
                f"Trainer with ReLoRaCallback, whose checkpoints are its own"
            )
        super().__init__(*args, **kwargs)
        self.fingerprint = dict(fingerprint or {})
        self._resumed_ranks: list[dict] = []
        sharded = any(sharding.is_sharded(p) for p in self.model.parameters())
        self._sharded_by_caller = sharded and not self.is_fsdp_enabled
        if self._sharded_by_caller:
            if self.args.torch_compile:
                raise ValueError(
                    "ReLoRaTrainer: expected torch_compile=False with a model that fully_shard has sharded, "
                    "got True, which Accelerate leaves out for it; call model.compile() before"
                )
            # Otherwise Accelerate refuses the model, or wraps it in DDP.
            self.model._is_accelerate_prepared = True

    # --- training ------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint:
            resume_from_checkpoint = self._choose(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, StopOnSignalCallback):
                    callback.restore()

    def compute_loss_context_manager(self):
        """Adds autocast, which Accelerate applies only to models that it prepares."""
        stack = super().compute_loss_context_manager()
        if self._sharded_by_caller and (self.args.bf16 or self.args.fp16):
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16
            stack.enter_context(torch.autocast(self.args.device.type, dtype))
        return stack

    def log(self, logs: dict, *args, **kwargs) -> None:
        if "loss" in logs and hasattr(self, "_tr_loss"):
            # Trainer starts the next sum as x - x: after one NaN loss, all later sums would be NaN.
            self._tr_loss.nan_to_num_(0.0, 0.0, 0.0)
        super().log(logs, *args, **kwargs)

    def _choose(self, wanted: str | bool) -> str:
        """The checkpoint to resume from. Rank 0 looks; all ranks use the same one."""
        folder, found = Path(self.args.output_dir if wanted is True else wanted), None
        if ranks.index() == 0:
            if wanted is True:
                found = checkpoint.last_valid(folder)
            elif wrong := checkpoint.problem(folder):
                logger.error("%s: %s", folder, wrong)
            else:
                found = folder
        number = -1
        if found is not None:  # a folder passed by the caller may have any name
            number = int(found.name.rpartition("-")[2]) if wanted is True else 0
        [number] = ranks.maximum([number])
        if number < 0:
            raise ValueError(
                f"resume_from_checkpoint: expected a valid checkpoint of ReLoRaTrainer at {folder}, "
                f"got {checkpoint.problem(folder) if folder.is_dir() else 'no such folder'}"
            )
        return str(folder if wanted is not True else folder / f"checkpoint-{number}")

    # --- saving --------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial=None) -> None:
        if self._relora_schedule and self._relora_schedule.lr_scheduler.restarting is not None:
            raise RuntimeError(
                "ReLoRaTrainer: expected no checkpoint between a merge and its reset, got a restart "
                "that has not come to its end; call schedule.restart_if_due() first"
            )
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        self.store_flos()
        keep = ranks.index() == 0
        tensors = checkpoint.gather_model(self._plain_model, keep)
        state = None if self.args.save_only_model else self._training_state(keep)
        failed, best = 0, self.state.best_model_checkpoint
        if keep:
            self._note_best(folder)
            try:
                checkpoint.write(folder, lambda f: self._fill(f, tensors, state), self._facts())
                checkpoint.delete_old(
                    folder, self.args.save_total_limit, self.state.best_model_checkpoint
                )
            except OSError as error:
                failed, self.state.best_model_checkpoint = 1, best
                logger.warning("training goes on without %s: %s", folder, error)
        [failed] = ranks.maximum([failed])  # the others wait until rank 0 has written
        if not failed:
            self._note_best(folder)
        stopping = (
            self.control.should_training_stop and self.state.global_step < self.state.max_steps
        )
        if failed and stopping:
            raise OSError(f"{folder} could not be written: the run stops at an earlier checkpoint")
        if self.args.push_to_hub and not failed:
            self._push_from_checkpoint(str(folder))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self._sharded_by_caller:
            super().save_model(output_dir, _internal_call)
            return
        output_dir, keep = output_dir or self.args.output_dir, ranks.index() == 0
        tensors = checkpoint.gather_model(self._plain_model, keep)
        failed = int(keep)
        try:
            if keep:
                self._save(output_dir, tensors)
                failed = 0
        finally:
            [failed] = ranks.maximum([failed])  # the others wait until rank 0 has written
        if failed:
            raise OSError(f"save_model: rank 0 could not write {output_dir}; its error tells why")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _fill(self, folder: Path, tensors: dict, state: dict | None) -> None:
        checkpoint.save_tensors(folder / "model.safetensors", tensors)
        model = self._plain_model
        for part in (
            getattr(model, "config", None),
            getattr(model, "generation_config", None),
            self.processing_class,
        ):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(folder)
        if state is not None:
            found: dict[str, torch.Tensor] = {}
            text = json.dumps(checkpoint.pack(state, found))
            (folder / "training.json").write_text(text, encoding="utf-8")
            checkpoint.save_tensors(folder / "training.safetensors", found)
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _training_state(self, keep: bool) -> dict | None:
        """Everything but the model. Moments are gathered from all ranks; None without `keep`."""
        mine = {"random": _random_state(ranks.count()), "loss": self._loss_state()}
        every_rank = ranks.gather_bytes(json.dumps(checkpoint.pack(mine, {})).encode())
        optimizer = _optimizer_state(self._torch_optimizer, self._plain_model, keep)
        if not keep:
            return None
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):  # as Trainer does
                name, state = type(callback).__name__, callback.state()
                stored = self.state.stateful_callbacks.get(name)
                if isinstance(stored, list):
                    stored.append(state)
                else:
                    self.state.stateful_callbacks[name] = state
        scaler = getattr(self.accelerator, "scaler", None)
        return {
            "optimizer": optimizer,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "callbacks": {name: c.state_dict() for name, c in self._stateful_callbacks()},
            "ranks": [json.loads(data) for data in every_rank],
        }

    def _note_best(self, folder: Path) -> None:
        """Set where Trainer looks for the best model (load_best_model_at_end)."""
        if self.state.best_global_step:
            best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
            if best.exists() or best == folder:
                self.state.best_model_checkpoint = str(best)

    def _facts(self) -> dict:
        """What a resumed run must match."""
        args, dataset = self.args, self.train_dataset
        facts = {
            "optimizer": type(self._torch_optimizer).__name__,
            "batch_size": args.train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size,
            "samples": len(dataset) if hasattr(dataset, "__len__") else None,
            "seed": args.seed,
            **self.fingerprint,
        }
        layers = relora_layers(self._plain_model, required=False)
        if layers:
            facts["relora"] = {"layers": [path for path, _ in layers]} | {
                name: _one_or_all([str(value(layer)) for _, layer in layers])
                for name, value in _LAYER_FACTS.items()
            }
        if schedule := self._relora_schedule:
            jagged = schedule.lr_scheduler
            facts["schedule"] = {
                key: getattr(jagged, key)
                for key in ("restart_every", "restart_warmup_steps", "anneal_steps")
            } | {
                key: getattr(schedule, key)
                for key in ("reset_mode", "reset_ratio", "paired", "reset_step")
            }
        return json.loads(json.dumps(facts))

    # --- resuming ------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        saved = checkpoint.read_manifest(folder)["facts"]
        if lines := list(checkpoint.differences(saved, self._facts())):
            raise checkpoint.OtherRun(f"{folder} is of another run: " + "; ".join(lines))
        tensors = checkpoint.load_tensors(folder / "model.safetensors")
        checkpoint.load_model(self._plain_model if model is None else model, tensors)

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        wrong = checkpoint.problem(folder) if ranks.index() == 0 else None
        if ranks.maximum([int(wrong is not None)])[0]:
            logger.warning(
                "the last model stays, %s is not loaded: %s", folder, wrong or "see rank 0"
            )
            return
        logger.info("loading the best model from %s", folder)
        tensors = checkpoint.load_tensors(folder / "model.safetensors")
        checkpoint.load_model(self._plain_model, tensors)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        folder = Path(checkpoint_folder)
        if not (folder / "training.json").is_file():
            raise ValueError(
                f"{folder}: expected training.json, got none: saved with save_only_model?"
            )
        tree = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        state = checkpoint.unpack(tree, checkpoint.load_tensors(folder / "training.safetensors"))
        _load_optimizer(self._torch_optimizer, self._plain_model, state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if state["scaler"] is not None and getattr(self.accelerator, "scaler", None) is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name, callback in self._stateful_callbacks():
            if name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][name])
        self._resumed_ranks = [checkpoint.unpack(rank, {}) for rank in state["ranks"]]

    def _load_scaler(self, checkpoint_folder: str | None) -> None:
        """No-op: _load_optimizer_and_scheduler has already loaded it."""

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        """Called late: skipping to the first batches of the resumed run moves the generators."""
        saved = self._resumed_ranks
        if checkpoint_folder is None or not saved:
            return
        if len(saved) == ranks.count():
            _set_random_state(saved[ranks.index()]["random"])
            losses = saved[ranks.index()]["loss"]
        else:
            logger.warning(
                "resuming on %d processes what %d have saved: random generators (dropout) start anew",
                ranks.count(), len(saved),
            )  # fmt: skip
            step = self.state.global_step
            set_seed(philox.derive_seed("rank", self.args.seed, step, ranks.index()) % 2**32)
            losses = {k: sum(r["loss"].get(k, 0) for r in saved) / len(saved) for k in _LOSS}
        if all(hasattr(self, name) for name in _LOSS):
            self._tr_loss = torch.tensor(float(losses["_tr_loss"]), device=self.args.device)
            self._total_loss_scalar = losses["_total_loss_scalar"]
            self._globalstep_last_logged = int(losses["_globalstep_last_logged"])

    def _loss_state(self) -> dict:
        """The loss since the last row of metrics, which is in private attributes of Trainer."""
        return {name: float(getattr(self, name, 0.0)) for name in _LOSS}

    # --- parts ---------------------------------------------------------------------------------------

    @property
    def _plain_model(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def _relora_schedule(self):
        callbacks = self.callback_handler.callbacks
        return next((c.schedule for c in callbacks if isinstance(c, ReLoRaCallback)), None)

    def _stateful_callbacks(self) -> list[tuple[str, object]]:
        return [
            (type(callback).__name__, callback)
            for callback in self.callback_handler.callbacks
            if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")
        ]


_LAYER_FACTS = {
    "r": lambda layer: layer.r,
    "lora_alpha": lambda layer: layer.lora_alpha,
    "lora_dropout": lambda layer: layer.lora_dropout,
    "use_rslora": lambda layer: layer.use_rslora,
    "trainable_scaling": lambda layer: layer.lora_scaling is not None,
    "merge_rounding": lambda layer: layer.rounding,
    "weight_dtype": lambda layer: layer.weight.dtype,
    "lora_dtype": lambda layer: layer.lora_A.dtype,
    "seed": lambda layer: layer.seed,
}


def _one_or_all(values: list):
    return values[0] if len(set(values)) == 1 else values


# --- optimizer, by parameter name: independent of sharding and world size --------------------------


def _names(optimizer, model) -> list[list[str]]:
    """The names of each group's parameters. ValueError if one is not the model's."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    for i, group in enumerate(groups):
        if None in group:
            raise ValueError(
                f"ReLoRaTrainer: expected the optimizer to hold parameters of the model, got another "
                f"one at param_groups[{i}]['params'][{group.index(None)}]; make it after apply_relora "
                f"and fully_shard"
            )
    return groups


def _optimizer_state(optimizer, model, keep: bool) -> dict:
    """Groups and whole state tensors by parameter name. Without `keep`, only joins the gathering."""
    names, states = _names(optimizer, model), {}
    for group, group_names in zip(optimizer.param_groups, names):
        for parameter, name in zip(group["params"], group_names):
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if torch.is_tensor(value):
                    whole = sharding.whole(value.detach())
                    value = whole.cpu() if sharding.is_sharded(value) else whole
                if keep:
                    states.setdefault(name, {})[key] = value
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"parameters": group_names}
        for group, group_names in zip(optimizer.param_groups, names)
    ]
    return {"groups": groups, "state": states}


def _load_optimizer(optimizer, model, saved: dict) -> None:
    names = _names(optimizer, model)
    before = [group["parameters"] for group in saved["groups"]]
    if names != before:
        lines = checkpoint.differences(
            {"parameters": sum(before, [])}, {"parameters": sum(names, [])}
        )
        raise checkpoint.OtherRun(
            "ReLoRaTrainer: expected the optimizer's parameter groups as in the checkpoint: "
            + ("; ".join(lines) or f"{len(before)} groups, got {len(names)}, or another order")
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state, groups, position = {}, [], 0
    for group in saved["groups"]:
        numbers = range(position, position + len(group["parameters"]))
        position += len(numbers)
        groups.append(
            {k: v for k, v in group.items() if k != "parameters"} | {"params": [*numbers]}
        )
        for number, name in zip(numbers, group["parameters"]):
            if name in saved["state"]:
                state[number] = {
                    key: checkpoint.place_like(parameters[number], value)
                    if torch.is_tensor(value)
                    else value
                    for key, value in saved["state"][name].items()
                }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# --- random generators -------------------------------------------------------------------------------


def _random_state(processes: int) -> dict:
    """States of Python, numpy and torch (CPU and this process's GPUs), without tensors."""
    numpy = np.random.get_state()
    devices = []
    if torch.cuda.is_available():
        one = [torch.cuda.current_device()]
        devices = one if processes > 1 else list(range(torch.cuda.device_count()))
    return {
        "python": random.getstate(),
        "numpy": [numpy[0], numpy[1].tolist(), *map(float, numpy[2:])],
        "cpu": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [torch.cuda.get_rng_state(d).numpy().tobytes().hex() for d in devices],
    }


def _set_random_state(saved: dict) -> None:
    def tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(bytes.fromhex(text)), dtype=torch.uint8)

    random.setstate(saved["python"])
    kind, keys, position, has_gauss, gauss = saved["numpy"]
    keys = np.array(keys, dtype=np.uint32)
    np.random.set_state((kind, keys, int(position), int(has_gauss), gauss))
    torch.set_rng_state(tensor(saved["cpu"]))
    if torch.cuda.is_available():
        current = torch.cuda.current_device()
        devices = [current] if len(saved["cuda"]) == 1 else range(len(saved["cuda"]))
        for device, state in zip(devices, saved["cuda"]):
            torch.cuda.set_rng_state(tensor(state), device)
